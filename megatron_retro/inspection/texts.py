"""Chunks as text: what they say, where they stand, and where in their text a token begins."""

import numpy as np

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.data.tokenizer import Tokenizer

_ROWS = 8192  # decoded at once


class ChunkTexts:
    """Texts of chunks, cut at tokens.

    Args:
        table: all chunks.
        tokenizer: theirs.
        chunks: [n] int64 ids of the chunks to decode.

    Attributes:
        text: by chunk id.
    """

    def __init__(self, table: ChunkTable, tokenizer: Tokenizer, chunks: np.ndarray):
        self._table, self._tokenizer = table, tokenizer
        whole = np.full(len(chunks), table.chunk_length)
        self.text = dict(zip(chunks.tolist(), self._beginnings(chunks, whole), strict=True))

    def offsets(self, chunks: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Where in its chunk's text each token begins, [n] int64, in UTF-16 units, as JavaScript counts.

        A token that begins inside of a character is said to begin with the character.

        Args:
            chunks: [n] int64 ids of decoded chunks.
            tokens: [n] int64 positions in them, from 0 to the number of tokens.
        """
        keys = np.stack([chunks, tokens], axis=1)
        wanted, inverse = np.unique(keys, axis=0, return_inverse=True)
        found = np.empty(len(wanted), np.int64)
        for begin in range(0, len(wanted), _ROWS):
            chunk, token = wanted[begin : begin + _ROWS].T
            texts = [self.text[number] for number in chunk.tolist()]
            for row, pair in enumerate(zip(texts, self._beginnings(chunk, token), strict=True)):
                found[begin + row] = utf16_length(_common_beginning(*pair))
        return found[inverse.reshape(-1)]

    def _beginnings(self, chunks: np.ndarray, num_tokens: np.ndarray) -> list[str]:
        """The text of the first tokens of each chunk."""
        texts: list[str] = []
        for begin in range(0, len(chunks), _ROWS):
            here = slice(begin, begin + _ROWS)
            tokens, lengths = self._table.tokens(chunks[here], self._table.chunk_length, self._tokenizer.pad)
            lengths = np.minimum(lengths, num_tokens[here])
            rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
            texts += self._tokenizer.decode(rows)
        return texts


def _common_beginning(text: str, beginning: str) -> str:
    if text.startswith(beginning):
        return beginning
    pairs = zip(text, beginning, strict=False)
    return text[: next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), len(text))]


def utf16_length(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2
