"""Samples of instruction tuning: conversations as tokens, packed into samples of whole chunks.

An example takes whole chunks: each prompt ends with one, its answer follows (see `questions.laid_out`). Every chunk of
an example reads neighbors but the last one, whose neighbors only the example behind it could read. Examples that share
a sample do not see each other. Only tokens of answers, and the ends behind them, are predicted.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_retro.data.chunks import ChunkTable, Stream, running_sum
from megatron_retro.data.questions import Conversation, encoded, laid_out
from megatron_retro.data.samples import Batch, chunks_that_read, interleave
from megatron_retro.data.tokenizer import Tokenizer

# Streams of random numbers that never meet: default_rng((seed, stream, …)).
_ORDER_STREAM, _NEIGHBOR_STREAM = 10, 11


class Ragged:
    """Rows of different lengths: row i is `values[first[i] : first[i + 1]]`."""

    def __init__(self, values: np.ndarray, first: np.ndarray):
        self.values, self.first = values, first

    @classmethod
    def of(cls, rows: Sequence[Sequence[Any]], dtype: type) -> "Ragged":
        values: np.ndarray = np.fromiter((value for row in rows for value in row), dtype, sum(map(len, rows)))
        return cls(values, running_sum(np.array([len(row) for row in rows], np.int64)))

    @classmethod
    def joined(cls, parts: list["Ragged"]) -> "Ragged":
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(np.concatenate([part.values for part in parts]), running_sum(lengths))

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.first[row] : self.first[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.first)


@dataclasses.dataclass
class Examples:
    """Conversations of a file, or of a share of it, as tokens.

    Attributes:
        tokens: int32, a row an example.
        is_answer: bool, of each token.
        contexts: int32, a row a text, cut to what is read.
        num_contexts: [N] int64, how many of them belong to each example; 0 where the work dir is asked.
        lines: [N] int64, of the file, from 1.
        counts: examples that were "cut" and "skipped", contexts "cut contexts" and "left out".
    """

    tokens: Ragged
    is_answer: Ragged
    contexts: Ragged
    num_contexts: np.ndarray
    lines: np.ndarray
    counts: dict[str, int]

    @classmethod
    def of(
        cls,
        conversations: list[Conversation],
        tokenizer: Tokenizer,
        *,
        chunk_length: int,
        max_tokens: int,
        fill: int,
        num_neighbors: int,
    ) -> "Examples":
        """Encode and lay out. An example that is too long is cut, and skipped where none of its answers would be left.

        Args:
            max_tokens: of an example.
            fill: see `questions.filler`.
            num_neighbors: K, the most contexts that are read.
        """
        turns = [turn for conversation in conversations for turn in conversation.turns]
        pairs, counts = iter(encoded(turns, tokenizer)), collections.Counter[str]()
        rows, masks, lines, texts, num_texts = [], [], [], [], []
        for conversation in conversations:
            its_pairs = [next(pairs) for _ in conversation.turns]
            row, is_answer = laid_out(its_pairs, chunk_length, fill, tokenizer.eod)
            if not any(is_answer[:max_tokens]):
                counts["skipped"] += 1
                continue
            counts["cut"] += len(row) > max_tokens
            rows.append(row[:max_tokens])
            masks.append(is_answer[:max_tokens])
            lines.append(conversation.line)
            texts += conversation.ctxs[:num_neighbors]
            num_texts.append(len(conversation.ctxs[:num_neighbors]))
            counts["left out"] += len(conversation.ctxs) - num_texts[-1] if num_neighbors else 0
        contexts = tokenizer.encode(texts)
        counts["cut contexts"] = sum(len(text) > 2 * chunk_length for text in contexts)
        return cls(
            Ragged.of(rows, np.int32),
            Ragged.of(masks, np.bool_),
            Ragged.of([text[: 2 * chunk_length] for text in contexts], np.int32),
            np.array(num_texts, np.int64),
            np.array(lines, np.int64),
            dict(counts),
        )

    @classmethod
    def joined(cls, parts: list["Examples"]) -> "Examples":
        """Those of several shares of a file, in their order."""
        counts = collections.Counter[str]()
        for part in parts:
            counts.update(part.counts)
        return cls(
            Ragged.joined([part.tokens for part in parts]),
            Ragged.joined([part.is_answer for part in parts]),
            Ragged.joined([part.contexts for part in parts]),
            np.concatenate([part.num_contexts for part in parts]),
            np.concatenate([part.lines for part in parts]),
            dict(counts),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def num_chunks(self, chunk_length: int) -> np.ndarray:
        """Of each example, [N] int64."""
        return -(-self.tokens.lengths // chunk_length)

    def num_queries(self, chunk_length: int) -> np.ndarray:
        """How many chunks of each example ask the work dir, [N] int64: all but the last, none with contexts."""
        return np.where(self.num_contexts > 0, 0, self.num_chunks(chunk_length) - 1)

    def queries(self, chunk_length: int) -> np.ndarray:
        """Those chunks, example after example, [queries, C] int32."""
        numbers = self.num_queries(chunk_length)
        rows = [self.tokens[example][: number * chunk_length] for example, number in enumerate(numbers.tolist())]
        return np.concatenate([np.zeros(0, np.int32), *rows]).reshape(-1, chunk_length)


@dataclasses.dataclass
class ExampleSource:
    """A file's examples, packed, with what the work dir has for them.

    Attributes:
        path: of the file.
        weight: of the file in the mixture; 0: by its samples.
        neighbors: [queries, K_saved] int64 chunk ids, best first, -1 for none.
        samples: the examples that share one, by sample (see `packed`).
    """

    path: pathlib.Path
    examples: Examples
    weight: float
    neighbors: np.ndarray
    samples: list[np.ndarray]


class InstructionSamples:
    """Sample n of the examples of some files, for every n from 0 on: a function of (seed, n) alone.

    Each epoch reads the samples of a file in another order.

    Args:
        table: the work dir's chunks, where neighbors and random ones are read.
        database: ids of the documents that random neighbors come from.
        chunks_a_sample: L.
        seed: of the order.
        pad: token id that fills up what examples leave.
        num_samples: how many will be asked for; None means one epoch.
        num_neighbors: K, 0 for a model that reads nothing.
        retrieval_dropout, random_neighbor_prob: as in `Samples`.
    """

    def __init__(
        self,
        table: ChunkTable,
        sources: list[ExampleSource],
        *,
        database: np.ndarray,
        chunks_a_sample: int,
        seed: int,
        pad: int,
        num_samples: int | None = None,
        num_neighbors: int = 2,
        retrieval_dropout: float = 0.0,
        random_neighbor_prob: float = 0.0,
    ):
        self.table, self.chunks_a_sample = table, chunks_a_sample
        self._sources, self._seed, self._pad = sources, seed, pad
        self._num_neighbors, self._dropout, self._random = num_neighbors, retrieval_dropout, random_neighbor_prob
        self._database = Stream(table, database)
        self._first_query = [running_sum(source.examples.num_queries(table.chunk_length)) for source in sources]
        self._first_context = [running_sum(source.examples.num_contexts) for source in sources]
        sizes = [len(source.samples) for source in sources]
        self.epoch_size = sum(sizes)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of each source: epoch, order
        weights = [source.weight or size for source, size in zip(sources, sizes, strict=True)]
        self._source_of, self._index_of = interleave(weights, num_samples or self.epoch_size)

    def __len__(self) -> int:
        return len(self._source_of)

    def examples(self, sample: int) -> tuple[int, np.ndarray]:
        """(number of the file, the examples of it that are in a sample); none for sample -1."""
        if sample < 0:
            return 0, np.zeros(0, np.int64)
        source = int(self._source_of[sample])
        bins = self._sources[source].samples
        epoch, position = divmod(int(self._index_of[sample]), len(bins))
        known, order = self._orders.get(source, (-1, np.arange(0)))
        if known != epoch:
            order = np.random.default_rng((self._seed, source, epoch, _ORDER_STREAM)).permutation(len(bins))
            self._orders[source] = epoch, order
        return source, bins[order[position]]

    def batch(self, sample_ids: np.ndarray, retrieval: str = "on") -> Batch:
        """Read samples, as `Samples.batch` does."""
        length, num_samples = self.table.chunk_length, len(sample_ids)
        num_positions = self.chunks_a_sample * length
        tokens_BxS = np.full((num_samples, num_positions), self._pad, np.int64)
        labels_BxS, mask_BxS = tokens_BxS.copy(), np.zeros((num_samples, num_positions), np.float32)
        examples_BxS = np.zeros((num_samples, num_positions), np.int64)
        for row, sample in enumerate(sample_ids.tolist()):
            source, members = self.examples(sample)
            begin = 0
            for number, example in enumerate(members):
                its = self._sources[source].examples
                tokens, is_answer = its.tokens[example], its.is_answer[example]
                end = begin + len(tokens)
                tokens_BxS[row, begin:end] = tokens
                labels_BxS[row, begin : end - 1], mask_BxS[row, begin : end - 1] = tokens[1:], is_answer[1:]
                examples_BxS[row, begin:] = number
                begin += -(-len(tokens) // length) * length
        batch = Batch(
            tokens_BxS=torch.from_numpy(tokens_BxS),
            labels_BxS=torch.from_numpy(labels_BxS),
            loss_mask_BxS=torch.from_numpy(mask_BxS),
            order_BxS=None,
            neighbor_tokens_BxLxKxR=None,
            neighbor_lengths_BxLxK=None,
            neighbor_chunks_M=None,
            sample_ids=sample_ids,
            examples_BxS=torch.from_numpy(examples_BxS) if examples_BxS.any() else None,
        )
        if not self._num_neighbors or retrieval == "off":
            return batch
        tokens, lengths = self._neighbors(sample_ids, retrieval)
        return dataclasses.replace(
            batch,
            neighbor_tokens_BxLxKxR=torch.from_numpy(tokens),
            neighbor_lengths_BxLxK=torch.from_numpy(lengths),
            neighbor_chunks_M=chunks_that_read(np.where(lengths > 0, 0, -1)),
        )

    def described(self, sample_ids: np.ndarray) -> list[dict[str, Any]]:
        """Where the examples of samples stand: "examples", as file:line."""
        rows = [self.examples(sample) for sample in sample_ids.tolist()]
        return [
            {"examples": [f"{self._sources[source].path}:{line}" for line in self._lines(source, members)]}
            for source, members in rows
        ]

    def _lines(self, source: int, members: np.ndarray) -> list[int]:
        return self._sources[source].examples.lines[members].tolist()

    def _neighbors(self, sample_ids: np.ndarray, retrieval: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, L, K, R] and lengths [B, L, K] of what samples read, after training's retrieval dropout."""
        length, shape = self.table.chunk_length, (len(sample_ids), self.chunks_a_sample, self._num_neighbors)
        tokens = np.full((*shape, 2 * length), self._pad, np.int64)
        lengths, ids = np.zeros(shape, np.int64), np.full(shape, -1)
        for row, sample in enumerate(sample_ids.tolist()):
            draw = np.random.default_rng((self._seed, max(sample, 0), _NEIGHBOR_STREAM))
            share = draw.random()
            if share < self._dropout:
                continue
            source, members = self.examples(sample)
            begin = 0
            for example in members:
                end = begin + int(self._sources[source].examples.num_chunks(length)[example])
                self._read(source, int(example), tokens[row, begin : end - 1], lengths[row, begin:], ids[row, begin:])
                begin = end
            if (retrieval == "random" or share < self._dropout + self._random) and len(self._database):
                reads = (lengths[row] > 0) | (ids[row] >= 0)
                chosen = self._database.chunks(draw.integers(len(self._database), size=ids[row].shape))
                ids[row], lengths[row] = np.where(reads, chosen, -1), 0
        found = ids >= 0
        if found.any():
            tokens[found], lengths[found] = self.table.tokens(ids[found], 2 * length, self._pad)
        return tokens, lengths

    def _read(self, source: int, example: int, tokens: np.ndarray, lengths: np.ndarray, ids: np.ndarray) -> None:
        """Fill in what the chunks [m, K, …] of an example but its last read: its texts, or ids of the work dir's."""
        its, num_chunks = self._sources[source], len(tokens)
        first, number = self._first_context[source][example], its.examples.num_contexts[example]
        for k in range(min(number, self._num_neighbors)):
            text = its.examples.contexts[first + k]
            tokens[:, k, : len(text)], lengths[:num_chunks, k] = text, len(text)
        if not number:
            row = self._first_query[source][example]
            ids[:num_chunks] = its.neighbors[row : row + num_chunks, : self._num_neighbors]


def packed(num_chunks: np.ndarray, chunks_a_sample: int) -> list[np.ndarray]:
    """Which examples share a sample: each goes, the longest first, where least room is left that suffices.

    Args:
        num_chunks: [N] int64, of each example, at most `chunks_a_sample`.

    Returns:
        Ascending numbers of examples, by sample.
    """
    samples: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(chunks_a_sample + 1)]  # samples by chunks that are left
    for example in np.argsort(-num_chunks, kind="stable").tolist():
        size = int(num_chunks[example])
        room = next((room for room in range(size, chunks_a_sample + 1) if with_room[room]), None)
        if room is None:
            samples.append([])
            sample, room = len(samples) - 1, chunks_a_sample
        else:
            sample = with_room[room].pop()
        samples[sample].append(example)
        with_room[room - size].append(sample)
    return [np.array(sorted(members), np.int64) for members in samples]
