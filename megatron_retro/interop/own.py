"""A model of this project as a source of weights, one tensor at a time.

It is a checkpoint, whatever layout it was saved at, or a RETRO that was exported to Hugging Face's form.
"""

import functools
import pathlib
from typing import Any

from torch import Tensor

from megatron_retro import mcore
from megatron_retro.config import flags
from megatron_retro.data.tokenizer import tokenizer_in
from megatron_retro.errors import UserError
from megatron_retro.interop.families import Config
from megatron_retro.interop.hugging_face import TensorFiles, check_same_ids
from megatron_retro.training import checkpoint, checkpoint_files
from megatron_retro.training.fit import Source

RETRO_TYPE = "retro_megatron"  # `model_type` of an exported RETRO


class OwnCheckpoint(Source):
    """A GPT or RETRO that was trained here; see `fit.Source`."""

    kind = "checkpoint"

    def __init__(self, path: pathlib.Path):
        self.path, self.state = path, checkpoint.read_state(path)
        shape = checkpoint.shape_of(self.state.config)
        self.flags: dict[str, Any] = checkpoint.weight_flags(flags.to_dict(shape))
        self.longest: int | None = self.flags.get("max_position_embeddings")
        if not self.state.data_digest:  # converted, and what it was up to there
            self.longest = shape.model.max_position_embeddings
        self.tokenizer_digest = self.state.tokenizer_digest
        self.vocab_size = self.state.vocab_size
        reads = self.flags["retro_add_retriever"]
        self.chunk_length: int | None = self.state.chunk_length if reads else None

    @functools.cached_property
    def _stored(self) -> mcore.StoredWeights:
        return mcore.StoredWeights(str(self.path))

    def verify(self) -> None:
        checkpoint_files.verify(self.path)

    def names(self) -> list[str]:
        return list(self._stored.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shapes[name]

    def tensor(self, name: str) -> Tensor:
        return self._stored.tensor(name)

    def check_tokenizer(self, digest: str, file: pathlib.Path) -> None:
        if digest != self.state.tokenizer_digest:
            raise UserError(
                f"the checkpoint {self.path} was trained with the tokenizer {self.state.tokenizer_digest}, the work "
                f"dir's is {digest}; use a work dir built with that tokenizer"
            )


class ExportedRetro(Source):
    """A RETRO that `tools/convert_checkpoint.py` exported, or that was trained on as such; see `fit.Source`.

    Its `config.json` holds our flags, its tensors have our names.
    """

    kind = "exported RETRO"

    def __init__(self, path: pathlib.Path):
        config = Config.read(path)
        self.path: pathlib.Path = path
        self.tokenizer_digest = config.get("tokenizer_digest")
        shape = checkpoint.shape_of(config.values)
        self.flags: dict[str, Any] = checkpoint.weight_flags(flags.to_dict(shape))
        self.longest: int | None = self.flags.get("max_position_embeddings")
        self.max_positions = config.whole("max_position_embeddings")
        self.vocab_size: int = config.whole("vocab_size")
        self.chunk_length: int | None = config.whole("retro_chunk_length")

    @functools.cached_property
    def _stored(self) -> TensorFiles:
        return TensorFiles(self.path)

    def names(self) -> list[str]:
        return sorted(self._stored.names())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(name)

    def tensor(self, name: str) -> Tensor:
        return self._stored.tensor(name)

    def tokenizer_file(self) -> pathlib.Path | None:
        return tokenizer_in(self.path)

    def check_tokenizer(self, digest: str, file: pathlib.Path) -> None:
        if digest != self.tokenizer_digest and (own := self.tokenizer_file()):
            check_same_ids(own, file)
