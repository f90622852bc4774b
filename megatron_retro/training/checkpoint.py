"""Checkpoints: one directory an update, complete or absent (`checkpoint_files.py`).

    iter_0000100/          megatron-core's sharded weights and optimizer state,
                 run.json  the run's flags and counters, and what it was trained on

Random states are not stored: every step draws from streams seeded by (seed, step).
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_retro import distributed, mcore, storage
from megatron_retro.config import flags
from megatron_retro.config.model import ModelConfig, ParallelConfig, RetroConfig
from megatron_retro.config.training import PretrainConfig
from megatron_retro.errors import UserError
from megatron_retro.reading import parse_json
from megatron_retro.training import checkpoint_files

# What the weights' shapes and meaning depend on: a checkpoint's values must be the run's.
_FREE = {"hidden_dropout", "attention_dropout", "init_method_std", "seq_length", "max_position_embeddings"}
_FREE |= {"retro_work_dir", "retro_num_neighbors", "retro_retrieval_dropout", "retro_random_neighbor_prob"}
_FREE |= {"retro_max_overlap"}


@dataclasses.dataclass
class RunState:
    """How far a run has come, and on what.

    Attributes:
        iteration: updates done.
        consumed_samples: training samples read.
        config: the run's flags (`flags.to_dict`).
        vocab_size: padded.
        chunk_length: C.
        tokenizer_digest: of the tokenizer (the work dir's "tokenizer" record).
        data_digest: of tokenizer, corpus and chunks (the work dir's "chunks" record).
        losses, bad_in_a_row: see `bad_steps.LossWatch`.
    """

    iteration: int
    consumed_samples: int
    config: dict[str, Any]
    vocab_size: int
    chunk_length: int
    tokenizer_digest: str
    data_digest: str
    losses: list[float] = dataclasses.field(default_factory=list)
    bad_in_a_row: int = 0


def save(directory: str, model: torch.nn.Module, optimizer: Any, state: RunState) -> pathlib.Path:
    """Write a checkpoint; every rank calls it. A crash leaves the one before it in place.

    Args:
        optimizer: None for weights alone.

    Raises:
        UserError: the disk is full, or cannot be written to.
    """
    root = pathlib.Path(directory)
    final = root / checkpoint_files.name_of(state.iteration)
    partial = root / f"{final.name}.partial"
    try:
        _together(partial, lambda: checkpoint_files.clear(final, partial))
        mcore.save_state(model, optimizer, str(partial))
        prints = distributed.all_gather(_together(partial, lambda: checkpoint_files.sync_share(partial)))
        _together(partial, lambda: _publish(final, partial, state, prints))
    except UserError:
        if distributed.rank() == 0:
            storage.remove(partial)
        raise
    return final


def _together(partial: pathlib.Path, work: Callable[[], Any]) -> Any:
    """`distributed.together`; what a full disk says on one rank, all say."""

    def explained() -> Any:
        with storage.explained(partial):
            return work()

    return distributed.together(explained)


def read_state(path: pathlib.Path) -> RunState:
    """The run state of a checkpoint found by `find`."""
    try:
        return RunState(**parse_json((path / "run.json").read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / 'run.json'} is not a run's state ({error}); load another checkpoint") from None


def check_same_run(state: RunState, config: PretrainConfig, vocab_size: int, chunk_length: int, digest: str) -> None:
    """Check that a run may go on from a checkpoint.

    Raises:
        UserError: names the first differing value, and both.
    """
    ours = flags.to_dict(config)
    fields = [field for group in (ModelConfig, RetroConfig) for field in dataclasses.fields(group)]
    retrieves = config.active_retro is not None
    for field in fields:
        name = field.name
        if name in _FREE or (not retrieves and name.startswith("retro_") and name != "retro_add_retriever"):
            continue
        _same(flags.flag_name(name), state.config.get(name, field.default), ours[name])
    distributed_optimizer = "use_distributed_optimizer"  # its state is laid out in a way of its own
    _same(
        flags.flag_name(distributed_optimizer),
        state.config.get(distributed_optimizer, False),
        ours[distributed_optimizer],
    )
    _same("the padded vocabulary", state.vocab_size, vocab_size)
    _same("the work dir's chunk length", state.chunk_length, chunk_length)
    what = " with --sft-data and --qa-prompt" if config.instructions.sft_data else ""
    _same(f"the work dir's digest of tokenizer, corpus and chunks{what}", state.data_digest, digest)


def trains_alike(state: RunState, config: PretrainConfig) -> bool:
    """Whether a run's losses are what a checkpoint's run would have had: model, samples and optimizer are the same."""
    ours = flags.to_dict(config)
    groups = (config.model, config.retro, config.data, config.instructions, config.optimization)
    names = {field.name for group in groups for field in dataclasses.fields(group)}
    names -= {"train_iters", "lr_decay_iters", "lr_warmup_iters", "num_workers"}
    return all(state.config.get(name) == ours[name] for name in names)


def model_config_of(state: RunState) -> tuple[ModelConfig, RetroConfig | None]:
    """The finished shape that a checkpoint's weights have."""
    config = shape_of(state.config)
    return config.model, config.retro if config.retro.retro_add_retriever else None


@dataclasses.dataclass
class Shape:
    """A model's flags."""

    model: ModelConfig
    retro: RetroConfig
    parallel: ParallelConfig


def shape_of(values: dict[str, Any]) -> Shape:
    """The finished shape that flags name; those that are no model's are passed over."""
    config = flags.from_dict(Shape, {name: values[name] for name in _shape_names() if name in values})
    config.model.finish()
    config.retro.finish(config.model)
    return config


def weight_flags(values: dict[str, Any]) -> dict[str, Any]:
    """Those of a model's flags that its weights depend on; of a GPT without any of retrieval."""
    left_out = _FREE | {"make_vocab_size_divisible_by", "retro_freeze_decoder"}
    if values["position_embedding_type"] != "rope":
        left_out -= {"max_position_embeddings"}
    reads = bool(values.get("retro_add_retriever"))
    names = [name for name in _shape_names() if name in values and name not in left_out]
    kept = [name for name in names if reads or not name.startswith("retro_") or name == "retro_add_retriever"]
    return {name: values[name] for name in kept}


def _shape_names() -> list[str]:
    return [field.name for group in (ModelConfig, RetroConfig) for field in dataclasses.fields(group)]


def _same(what: str, checkpoint: Any, run: Any) -> None:
    if checkpoint != run:
        raise UserError(
            f"--load: {what} is {checkpoint} in the checkpoint, {run} in this run; "
            "use the checkpoint's value, or start a new run without --load"
        )


def _write_state(partial: pathlib.Path, state: RunState) -> str:
    """Write run.json; its fingerprint."""
    text = json.dumps(dataclasses.asdict(state), indent=1, sort_keys=True)
    storage.write_atomically(partial / "run.json", lambda file: file.write(text.encode()))
    return storage.fingerprint(partial / "run.json")


def _publish(final: pathlib.Path, partial: pathlib.Path, state: RunState, prints: list[dict[str, str]]) -> None:
    if distributed.rank() == 0:
        files = {name: print_ for of_rank in prints for name, print_ in of_rank.items()}
        checkpoint_files.publish(final, partial, {**files, "run.json": _write_state(partial, state)})
