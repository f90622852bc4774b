"""A Hugging Face directory as a source of weights: `config.json` and safetensors, or the `.bin` files before them."""

import functools
import pathlib
import zipfile
from typing import Any

import torch
from torch import Tensor

from megatron_retro.data.tokenizer import Tokenizer, tokenizer_in
from megatron_retro.errors import UserError
from megatron_retro.interop.families import Config, Mapped, family_of
from megatron_retro.reading import parse_json, read_text
from megatron_retro.storage import fingerprint
from megatron_retro.training.checkpoint import shape_of, weight_flags
from megatron_retro.training.fit import Source

PROBES = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?",
    "  def f(x):\n\treturn {x: 3.14159e-10}  # §\n\n",
    "Größe, naïve, Ελλάδα, Москва, 東京, ไทย, 🙂",
)


class HuggingFaceDirectory(Source):
    """A GPT of one of the families; see `fit.Source`.

    Raises:
        UserError: the family is unknown, its config does not fit, or files are missing or damaged.
    """

    kind = "Hugging Face model"
    chunk_length: int | None = None

    def __init__(self, path: pathlib.Path):
        config = Config.read(path)
        config.only("quantization_config", None, otherwise=None)
        self.path, self._family = path, family_of(config)
        flags = {**self._family.flags(config), "retro_add_retriever": False}
        self.max_positions: int = flags["max_position_embeddings"]
        self.longest = self._family.longest(config)
        self._model = shape_of({**flags, "seq_length": self.max_positions}).model
        self.flags: dict[str, Any] = weight_flags(flags)
        self.vocab_size = config.whole("vocab_size")
        self.tokenizer_digest = config.get("tokenizer_digest")  # where it was exported here
        self._mapped = {mapped.ours: mapped for mapped in self._family.tensors(self._model)}

    @functools.cached_property
    def _stored(self) -> "TensorFiles":
        return TensorFiles(self.path, self._family.prefix)

    def names(self) -> list[str]:
        wanted = {name for mapped in self._mapped.values() for name in mapped.theirs}
        there = self._stored.names()
        if missing := sorted(wanted - there):
            raise UserError(
                f"{self.path}: tensor {missing[0]} is missing ({len(missing)} of {len(wanted)}); complete it"
            )
        if unknown := sorted(there - wanted - set(self.left_out())):
            raise UserError(
                f"{self.path}: tensor {unknown[0]} {list(self._stored.shape(unknown[0]))} has no place in a model of "
                f"its config.json ({len(unknown)} such); take the files that belong together"
            )
        return list(self._mapped)

    def called(self, name: str) -> str:
        return " + ".join(self._mapped[name].theirs)

    def left_out(self) -> list[str]:
        is_tied = not self.flags["untie_embeddings_and_output_weights"]
        heads = {"lm_head.weight", "embed_out.weight"} if is_tied else set()
        endings = self._family.no_weights
        return sorted(name for name in self._stored.names() if name in heads or name.endswith(endings))

    def shape(self, name: str) -> tuple[int, ...]:
        with torch.device("meta"):
            return tuple(self._joined(self._mapped[name], [torch.empty(s) for s in self._shapes(name)]).shape)

    def tensor(self, name: str) -> Tensor:
        mapped = self._mapped[name]
        return self._joined(mapped, [self._stored.tensor(theirs) for theirs in mapped.theirs])

    def _shapes(self, name: str) -> list[tuple[int, ...]]:
        return [self._stored.shape(theirs) for theirs in self._mapped[name].theirs]

    def _joined(self, mapped: Mapped, tensors: list[Tensor]) -> Tensor:
        try:
            return mapped.join(tensors)
        except RuntimeError:  # of numbers of rows that divide into no heads
            theirs, shapes = mapped.theirs, [list(tensor.shape) for tensor in tensors]
            raise UserError(
                f"{self.path}: tensors {', '.join(theirs)} of {shapes} do not fit its config.json "
                f"({self._model.num_attention_heads} heads of {self._model.kv_channels}, "
                f"{self._model.num_query_groups} groups)"
            ) from None

    def tokenizer_file(self) -> pathlib.Path | None:
        return tokenizer_in(self.path)

    def check_tokenizer(self, digest: str, file: pathlib.Path) -> None:
        if own := self.tokenizer_file():
            check_same_ids(own, file)


def check_same_ids(own: pathlib.Path, file: pathlib.Path) -> None:
    """Compare a model's tokenizer with the one that is to be used, a work dir's or a flag's.

    Raises:
        UserError: the same text has other ids.
    """
    if fingerprint(own) == fingerprint(file):
        return
    theirs, ours = (Tokenizer.open(path).encode(list(PROBES)) for path in (own, file))
    for text, their_ids, our_ids in zip(PROBES, theirs, ours, strict=True):
        if their_ids != our_ids:
            raise UserError(
                f"the model's tokenizer {own} writes {text!r} as {their_ids[:8]}…, {file} as {our_ids[:8]}…; take "
                f"--tokenizer-model {own}, for the work dir too"
            )


class TensorFiles:
    """The tensors of a directory, by name; read when they are asked for.

    Args:
        prefix: put before names that lack it, where the file has none with it.
    """

    def __init__(self, path: pathlib.Path, prefix: str = ""):
        self.path = path
        self._files: dict[str, pathlib.Path] = {}
        self._open: dict[pathlib.Path, Any] = {}
        files = self._find()
        bare = prefix and not any(name.startswith(prefix) for name in files)
        for name, file in files.items():
            self._files[prefix + name if bare and not name.startswith(("lm_head", "embed_out")) else name] = file
        self._prefix = prefix if bare else ""

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        held = self._opened(self._files[name])
        own = self._own_name(name)
        return tuple(held[own].shape if isinstance(held, dict) else held.get_slice(own).get_shape())

    def tensor(self, name: str) -> Tensor:
        held, own = self._opened(self._files[name]), self._own_name(name)
        return held[own] if isinstance(held, dict) else held.get_tensor(own)

    def _own_name(self, name: str) -> str:
        return name.removeprefix(self._prefix) if self._prefix else name

    def _find(self) -> dict[str, pathlib.Path]:
        """Name -> file of each tensor."""
        for whole in ("model.safetensors", "pytorch_model.bin"):
            index = self.path / f"{whole}.index.json"
            if (self.path / whole).is_file():
                return dict.fromkeys(self._names_in(self.path / whole), self.path / whole)
            if index.is_file():
                return self._listed(index)
        raise UserError(
            f"{self.path} holds no model.safetensors, pytorch_model.bin or index of several; complete the directory"
        )

    def _listed(self, index: pathlib.Path) -> dict[str, pathlib.Path]:
        try:
            listed = dict(parse_json(read_text(str(index), index))["weight_map"])
            files = {str(name): self.path / pathlib.PurePath(file).name for name, file in listed.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is not an index of tensors ({error}); restore it") from None
        for file in sorted(set(files.values())):
            there = self._names_in(file)
            for name in (name for name, of_file in files.items() if of_file == file):
                if name not in there:
                    raise UserError(f"{file} holds no tensor {name}, which {index.name} puts there; restore it")
        return files

    def _names_in(self, file: pathlib.Path) -> set[str]:
        return set(self._opened(file).keys())

    def _opened(self, file: pathlib.Path) -> Any:
        if file not in self._open:
            try:
                if file.suffix == ".safetensors":
                    from safetensors import safe_open

                    self._open[file] = safe_open(str(file), "pt")
                else:
                    mapped = zipfile.is_zipfile(file)  # files of before 2020 are none, and cannot be
                    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
                    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
                        raise ValueError("it is no dictionary of tensors")
                    self._open[file] = tensors
            except Exception as error:  # each library raises kinds of its own
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(f"{file} cannot be read ({reason}); restore it") from None
        return self._open[file]
