"""Weights to start from: a model that is there already, of which this one has more parts, or as many.

A GPT's weights have the same names here as in a RETRO, so fitting RETRO to it (arXiv 2112.04426, §4.3) copies them and
leaves the rest as it begins. Chunked cross-attention begins with an output of zero: at step 0 the model is the GPT.
"""

import collections
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_retro import distributed, mcore
from megatron_retro.config.flags import flag_name
from megatron_retro.errors import UserError
from megatron_retro.model.model import RetroModel

_EMBEDDING = "embedding.word_embeddings.weight"
_ENCODER_EMBEDDING = f"decoder.encoder.{_EMBEDDING}"
BY_TOKEN = (_EMBEDDING, _ENCODER_EMBEDDING, "output_layer.weight")  # a row a token

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # others are weights with a scale elsewhere


class Source(Protocol):
    """A model on disk.

    Attributes:
        path: the directory that holds it.
        kind: what it is, for people.
        flags: those of `ModelConfig` and `RetroConfig` that its weights depend on.
        longest: positions up to which it is what these flags compute; None for any number.
        vocab_size: rows of its embedding.
        chunk_length: C; None where it does not matter to the weights.
        tokenizer_digest: of the tokenizer that it was trained with here; None where it was not.
    """

    tokenizer_digest: str | None = None
    path: pathlib.Path
    kind: str
    flags: dict[str, Any]
    longest: int | None
    vocab_size: int
    chunk_length: int | None

    def verify(self) -> None:
        """Compare its files with fingerprints, by default it has none; ranks share the reading, all call it.

        Raises:
            UserError: a file is not what it was.
        """
        return

    def names(self) -> list[str]:
        """Our names of its weights.

        Raises:
            UserError: it lacks some that it should have, or has some that nothing here is made for.
        """

    def called(self, name: str) -> str:
        """Its own names of what is one of our tensors; by default it has ours."""
        return name

    def left_out(self) -> list[str]:
        """Its own names of tensors that are no weights; by default there are none."""
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, in the layout of one tensor-parallel rank."""

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in that layout, on the CPU, in the dtype that it is stored in."""

    def check_tokenizer(self, digest: str, file: pathlib.Path) -> None:
        """Compare with a work dir's tokenizer.

        Raises:
            UserError: the same text would have other ids.
        """


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What became of the model's tensors, over all ranks.

    Attributes:
        copied: names of those that the source has.
        new: of those that it has not; they start as in any training.
        numbers: parameters copied.
    """

    copied: list[str]
    new: list[str]
    numbers: int

    def lines(self, source: Source) -> list[str]:
        """For people; every tensor is named."""
        told = [f"from {source.kind} {source.path}: {len(self.copied)} tensors, {self.numbers:,} parameters"]
        if self.new:
            told.append(f"new, not in it ({len(self.new)}): {grouped(self.new)}")
        if left_out := source.left_out():
            told.append(f"in it, but no weights ({len(left_out)}): {grouped(left_out)}")
        return told


def adopt(given: dict[str, Any], source: Source, flag: str = "--retro-fit-from") -> dict[str, Any]:
    """Flags with the model's shape as the source has it.

    Args:
        given: flags that the user gave.
        flag: that names the source, for messages.

    Raises:
        UserError: one of them is not the source's; names it and both values.
    """
    adopted = dict(given)
    for name, value in source.flags.items():
        if name == "retro_add_retriever" and not value:
            continue  # a GPT may become a RETRO
        if name in given and given[name] != value and str(given[name]) != str(value):
            raise UserError(f"{flag_name(name)} is {given[name]}, {flag} {source.path} has {value}; leave the flag out")
        adopted[name] = value
    return adopted


def check(
    source: Source, flag: str = "--retro-fit-from", *, seq_length: int, chunk_length: int, vocab_size: int
) -> None:
    """Check the data against a source.

    Args:
        flag: that names the source, for messages.
        vocab_size: of the work dir's tokenizer, not padded.

    Raises:
        UserError: names both values.
    """
    where = f"{flag} {source.path}"
    if source.longest is not None and seq_length > source.longest:
        raise UserError(f"--seq-length {seq_length} is more than the {source.longest} positions of {where}")
    if source.chunk_length not in (None, chunk_length):
        raise UserError(f"{where} reads chunks of {source.chunk_length} tokens, the work dir's have {chunk_length}")
    if vocab_size > source.vocab_size:
        raise UserError(
            f"{where} knows {source.vocab_size} tokens, the work dir's tokenizer has {vocab_size}; build the work dir "
            "with the model's own tokenizer (--tokenizer-model)"
        )


@torch.no_grad()
def fit(stages: list[RetroModel], source: Source, flag: str = "--retro-fit-from") -> Fitted:
    """Copy what the source has into this rank's part of the model; every rank calls it.

    Rows of tokens that the source does not know (of a padded vocabulary) become the mean of those it knows: their
    logit is then below the mean of the others, so they hardly count.

    Args:
        flag: that names the source, for messages.

    Raises:
        UserError: a tensor is missing, has no place, or another shape; names it and both shapes.
    """
    source.verify()
    theirs, where = set(distributed.together(source.names)), f"{flag} {source.path}"
    parameters = {name: weight for stage in stages for name, weight in named_weights(stage)}
    everywhere = sorted({name for of_rank in distributed.all_gather(list(parameters)) for name in of_rank})
    copied, new = [name for name in everywhere if name in theirs], [name for name in everywhere if name not in theirs]
    if unplaced := sorted(theirs - set(everywhere)):
        raise UserError(
            f"{where}: tensor {unplaced[0]} {list(source.shape(unplaced[0]))} has no place in a model of its flags "
            f"({len(unplaced)} such: {grouped(unplaced)}); take the files that belong together"
        )
    may_begin = not source.flags["retro_add_retriever"]  # what a RETRO adds to a GPT
    if missing := [name for name in new if not (may_begin and is_retrieval(name))]:
        raise UserError(f"{where} has no tensor {missing[0]} ({grouped(missing)}); complete it")
    distributed.together(functools.partial(_copy, parameters, theirs, source, where))
    return Fitted(copied, new, sum(torch.Size(source.shape(name)).numel() for name in copied))


def named_weights(stage: RetroModel) -> Iterator[tuple[str, Tensor]]:
    """A last stage's copy of the embedding is called by the embedding's name."""
    for name, weight in stage.named_parameters():
        is_copy = stage.share_embeddings_and_output_weights and name == "output_layer.weight"
        yield _EMBEDDING if is_copy else name, weight


def _copy(parameters: dict[str, Tensor], theirs: set[str], source: Source, where: str) -> None:
    for name, weight in parameters.items():
        of_source = name
        if name == _ENCODER_EMBEDDING and name not in theirs and source.shape(_EMBEDDING)[1] == weight.shape[1]:
            of_source = _EMBEDDING  # copying a token that was read needs no map between two vocabularies
        if of_source not in theirs:
            continue
        ranks, gated = _ranks_of(weight), ".mlp.linear_fc1." in name and source.flags["swiglu"]
        (rows, *others), found = _whole_shape(weight, ranks), list(source.shape(of_source))
        known = source.vocab_size if name in BY_TOKEN else rows
        if found != [known, *others]:
            raise UserError(
                f"{where}: tensor {source.called(of_source)} is {found}, by the model's flags "
                f"it is {[known, *others]}; take the files that belong together"
            )
        whole = source.tensor(of_source)
        if whole.dtype not in _DTYPES or not whole.isfinite().all():
            raise UserError(
                f"{where}: tensor {source.called(of_source)} of {str(whole.dtype).removeprefix('torch.')} holds what "
                "is no finite number, or none without a scale; take a model in fp32, fp16 or bf16"
            )
        if known < rows:
            whole = torch.cat([whole, whole.mean(0, dtype=torch.float32).to(whole.dtype).expand(rows - known, -1)])
        weight.copy_(_shard(whole, weight, ranks, gated))


def _ranks_of(weight: Tensor) -> int:
    """Tensor-parallel ranks that share a parameter."""
    is_shared = getattr(weight, "tensor_model_parallel", False)
    return mcore.parallel_state.get_tensor_model_parallel_world_size() if is_shared else 1


def _whole_shape(weight: Tensor, ranks: int) -> list[int]:
    shape = list(weight.shape)
    if ranks > 1:
        shape[weight.partition_dim] *= ranks  # type: ignore[attr-defined]
    return shape


def _shard(whole: Tensor, weight: Tensor, ranks: int, gated: bool) -> Tensor:
    """This rank's part; gate and linear half of a SwiGLU are divided each."""
    if ranks == 1:
        return whole
    rank, axis = mcore.parallel_state.get_tensor_model_parallel_rank(), weight.partition_dim  # type: ignore[attr-defined]
    halves = whole.chunk(2, axis) if gated else (whole,)
    return torch.cat([half.chunk(ranks, axis)[rank] for half in halves], axis)


# ------------------------------------------------------------------------------------------------ frozen


def is_retrieval(name: str) -> bool:
    """Whether a parameter belongs to what a RETRO has and a GPT has not."""
    return "cross_attn" in name or "cross_attention" in name or name.startswith("decoder.encoder.")


def freeze(stages: Iterable[RetroModel]) -> None:
    """Let training change encoder and chunked cross-attention alone."""
    for stage in stages:
        for name, weight in stage.named_parameters():
            weight.requires_grad_(is_retrieval(name))


# ------------------------------------------------------------------------------------------------ names


def grouped(names: Iterable[str]) -> str:
    """Names in few words: those that differ in their layer's number are one."""
    numbers: dict[str, list[int]] = collections.defaultdict(list)
    for name in names:
        parts = re.split(r"(?<=\.)(\d+)(?=\.)", name)
        numbers["{}".join(parts[::2])].extend(map(int, parts[1:2]))
    return ", ".join(name.format(_ranges(found)) if found else name for name, found in numbers.items())


def _ranges(numbers: list[int]) -> str:
    ordered, runs = sorted(set(numbers)), list[list[int]]()
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return told if len(ordered) == 1 else f"{{{told}}}"
