"""A checkpoint of this project as a source of weights, one tensor at a time, whatever layout it was saved at."""

import functools
import pathlib
from typing import Any

from torch import Tensor

from megatron_retro import mcore
from megatron_retro.config import flags
from megatron_retro.errors import UserError
from megatron_retro.training import checkpoint


class OwnCheckpoint:
    """A GPT or RETRO that was trained here; see `fit.Source`."""

    kind = "checkpoint"

    def __init__(self, path: pathlib.Path):
        self.path, self.state = path, checkpoint.read_state(path)
        shape = checkpoint.shape_of(self.state.config)
        self.flags: dict[str, Any] = checkpoint.weight_flags(flags.to_dict(shape))
        self.longest: int | None = self.flags.get("max_position_embeddings")
        self.vocab_size = self.state.vocab_size
        reads = self.flags["retro_add_retriever"]
        self.chunk_length: int | None = self.state.chunk_length if reads else None

    @functools.cached_property
    def _stored(self) -> mcore.StoredWeights:
        return mcore.StoredWeights(str(self.path))

    def names(self) -> list[str]:
        return list(self._stored.shapes)

    def called(self, name: str) -> str:
        return name

    def left_out(self) -> list[str]:
        return []

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
