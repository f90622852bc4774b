"""How likely a model finds given tokens, with neighbors found live for the chunks before them."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_retro import mcore
from megatron_retro.inference.reader import Reader
from megatron_retro.model.model import RetroModel


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens on the grid of chunks, of which those from `first` on are scored, each by all before it."""

    tokens: list[int]
    first: int


def windows(tokens: list[int], first: int, context: int, chunk_length: int) -> Iterator[Row]:
    """Rows of at most `context` tokens that together score tokens[first:] once, with as much before it as fits.

    Args:
        first: a multiple of C, at least C.
        context: a multiple of C, at least 2 C.
    """
    while first < len(tokens):
        end = min(len(tokens), first + context - chunk_length)
        begin = -(-max(0, end - context) // chunk_length) * chunk_length
        yield Row(tokens[begin:end], first - begin)
        first = end


class Scorer:
    """Scores rows with a model that is one process.

    Args:
        model: in evaluation mode.
        chunk_length: C.
        reader: finds neighbors; None turns retrieval off.
        num_neighbors: K.
        silent: ids of fillers; a chunk of nothing else reads nothing.
    """

    def __init__(
        self, model: RetroModel, chunk_length: int, reader: Reader | None, num_neighbors: int, silent: set[int]
    ):
        self._model, self._chunk_length, self._reader = model, chunk_length, reader
        self._num_neighbors, self._silent = num_neighbors, silent

    @torch.inference_mode()
    def score(self, rows: list[Row]) -> list[tuple[float, bool]]:
        """Of each row: the log-probability of its scored tokens, in nats, and whether each is the likeliest."""
        length, device = self._chunk_length, mcore.device()
        num_chunks = max(-(-len(row.tokens) // length) for row in rows)
        tokens_BxS = torch.zeros(len(rows), num_chunks * length, dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens_BxS[number, : len(row.tokens)] = torch.tensor(row.tokens)
        near_tokens, near_lengths = self._neighbors(rows, num_chunks) if self._reader else (None, None)
        logits_BxSxV = self._model(
            tokens_BxS.to(device), neighbor_tokens_BxLxKxR=near_tokens, neighbor_lengths_BxLxK=near_lengths
        )
        found = []
        for row, logits_SxV in zip(rows, logits_BxSxV, strict=True):
            wanted = torch.tensor(row.tokens[row.first :], device=device)
            logits = logits_SxV[row.first - 1 : len(row.tokens) - 1].float()
            chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
            found.append((float(chosen.double().sum()), bool((logits.argmax(-1) == wanted).all())))
        return found

    def _neighbors(self, rows: list[Row], num_chunks: int) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, K, 2C] and lengths [B, L, K] of the chunks that are complete and have tokens behind them."""
        assert self._reader
        length, shape = self._chunk_length, (len(rows), num_chunks, self._num_neighbors)
        tokens = torch.zeros(*shape, 2 * length, dtype=torch.int64, device=mcore.device())
        lengths = torch.zeros(shape, dtype=torch.int64, device=mcore.device())
        chunks = {
            (number, begin // length): row.tokens[begin : begin + length]
            for number, row in enumerate(rows)
            for begin in range(0, len(row.tokens) - length, length)
            if not self._silent.issuperset(row.tokens[begin : begin + length])
        }
        if chunks:
            reads = self._reader.read(list(chunks.values()))
            for (number, chunk), near, sizes in zip(chunks, reads.tokens_nxKxR, reads.lengths_nxK, strict=True):
                tokens[number, chunk], lengths[number, chunk] = near, sizes
        return tokens, lengths
