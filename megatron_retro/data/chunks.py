"""Chunks over token files: the table from chunk ids to tokens, documents and splits.

Document d with n tokens has ceil(n / C) chunks, so the table is the running sum of chunks per document:
O(documents), and no second copy of the tokens. Chunk and document ids run over all corpora of a work dir in the
manifest's order. Everything read from a corpus goes through `ChunkTable.tokens`.
"""

import dataclasses
import functools
import pathlib
import struct

import numpy as np

from megatron_retro.errors import UserError
from megatron_retro.reading import load_array
from megatron_retro.workdir import WorkDir

SPLITS = ("train", "valid", "test")

_INDEX_MAGIC = b"MMIDIDX\0\0"
_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, sequences, documents + 1
_TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}

_FIBONACCI = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One token file `.bin/.idx`; a document's sequences lie one behind the other, so it is one run of tokens."""

    name: str
    tokens: np.ndarray  # [num_tokens] memory-mapped, as stored
    start: np.ndarray  # [num_documents] int64: position of each document's first token in `tokens`
    length: np.ndarray  # [num_documents] int64: its number of tokens
    weight: float  # of the corpus in training's mixture; 0: by its size
    retrieved: bool = True  # whether its chunks may be neighbors

    @classmethod
    def open(cls, name: str, prefix: str, weight: float = 0.0, retrieved: bool = True) -> "Corpus":
        """Open Megatron's `<prefix>.bin` and `<prefix>.idx`.

        Raises:
            UserError: a file is missing or damaged, or the `.idx` points outside the `.bin`.
        """
        for suffix in (".bin", ".idx"):
            if not pathlib.Path(prefix + suffix).is_file():
                raise UserError(f"corpus {name!r}: no file {prefix}{suffix}; --data-path takes the path without suffix")
        size = pathlib.Path(prefix + ".bin").stat().st_size
        if not size:
            raise UserError(f"corpus {name!r}: {prefix}.bin is empty; give a corpus with tokens")
        try:
            dtype, lengths, pointers, documents = _read_index(pathlib.Path(prefix + ".idx"))
            _check_index(dtype, lengths, pointers, documents, size)
        except ValueError as error:
            raise UserError(
                f"corpus {name!r}: {prefix}.idx {error}; write it again, from what the {size} bytes of {prefix}.bin "
                "were made from"
            ) from None
        ends = np.append(0, np.cumsum(lengths, dtype=np.int64))
        starts = np.append(pointers // dtype.itemsize, 0)
        first, last = documents[:-1], documents[1:]
        tokens = np.memmap(prefix + ".bin", dtype=dtype, mode="r")
        return cls(name, tokens, starts[first], ends[last] - ends[first], weight, retrieved)


def sequences(prefix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What Megatron's `<prefix>.idx` says of the sequences that documents consist of.

    Returns:
        (first token in the `.bin`, tokens, each [num_sequences] int64; first sequence of each document and behind the
        last one's last, [num_documents + 1] int64).

    Raises:
        UserError: it is none.
    """
    try:
        dtype, lengths, pointers, documents = _read_index(pathlib.Path(f"{prefix}.idx"))
    except (ValueError, OSError) as error:
        raise UserError(f"--data-path {prefix}: its .idx {error}; write it again") from None
    return pointers // dtype.itemsize, lengths.astype(np.int64), documents


def _read_index(path: pathlib.Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Megatron's `.idx`, its arrays mapped into memory.

    Returns:
        (dtype of the tokens, length in tokens and position in bytes of each sequence, first sequence of each document
        and behind the last one's last).

    Raises:
        ValueError: it is none.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(_INDEX_HEADER.size)
    if len(header) < _INDEX_HEADER.size or not header.startswith(_INDEX_MAGIC):
        raise ValueError("is not Megatron's: it does not begin as one")
    _, version, code, num_sequences, num_documents = _INDEX_HEADER.unpack(header)
    if version != 1 or code not in _TOKEN_TYPES:
        raise ValueError(f"has version {version} and token type {code}, not version 1 and one of {list(_TOKEN_TYPES)}")
    needed = _INDEX_HEADER.size + 12 * num_sequences + 8 * num_documents
    if num_documents < 2:
        raise ValueError("names no document")
    if size < needed:
        raise ValueError(
            f"has {size} bytes, its {num_sequences} sequences and {num_documents - 1} documents take {needed}"
        )
    mapped, begin, arrays = np.memmap(path, np.uint8, "r"), _INDEX_HEADER.size, []
    for count, dtype in ((num_sequences, np.int32), (num_sequences, np.int64), (num_documents, np.int64)):
        arrays.append(np.frombuffer(mapped, dtype, count, begin))
        begin += arrays[-1].nbytes
    return np.dtype(_TOKEN_TYPES[code]), arrays[0], arrays[1], arrays[2]


def _check_index(
    dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, num_bytes: int
) -> None:
    """Check what a `.idx` says against a `.bin` of `num_bytes`; arrays as `_read_index` returns them.

    Raises:
        ValueError: tells what is wrong.
    """
    if num_bytes % dtype.itemsize:
        raise ValueError(f"has tokens of {dtype.itemsize} bytes, of which the .bin is no whole number")
    if documents[0] < 0 or documents[-1] > len(lengths) or (documents[1:] < documents[:-1]).any():
        raise ValueError(f"has documents that do not follow one another within its {len(lengths)} sequences")
    if not len(lengths):
        return
    if lengths.min() < 0 or pointers.min() < 0 or pointers.max() > num_bytes or (pointers % dtype.itemsize).any():
        raise ValueError("has sequences of negative length, or that begin outside the .bin or in the midst of a token")
    ends = pointers + lengths.astype(np.int64) * dtype.itemsize
    if ends.max() > num_bytes:
        raise ValueError(f"names tokens behind the {num_bytes // dtype.itemsize} of the .bin")
    begins = np.zeros(len(lengths) + 1, bool)  # of documents
    begins[documents] = True
    if ((pointers[1:] != ends[:-1]) & ~begins[1:-1]).any():
        raise ValueError("has documents whose sequences do not lie one behind the other")


def removed_documents(path: pathlib.Path) -> np.ndarray:
    """The documents that a work dir has removed: ids over all corpora, ascending int64.

    Raises:
        UserError: the file is damaged.
    """
    return np.array(load_array(path, np.int64, (None,)))


def open_corpora(work: WorkDir, excluded: list[str]) -> list[Corpus]:
    """The corpora of a work dir; those named in `excluded` are not retrieved.

    Raises:
        UserError: a file is missing or broken.
    """
    return [
        Corpus.open(entry["name"], str(work.path / entry["prefix"]), entry["weight"], entry["name"] not in excluded)
        for entry in work.facts("corpus")["corpora"]
    ]


class ChunkTable:
    """All chunks of a work dir's corpora.

    Attributes:
        chunk_length: C, tokens a chunk.
        first_chunk: [num_documents + 1] int64, first chunk id of each document.
        corpus_documents: [num_corpora + 1] int64, first document id of each corpus.
        removed: [num_documents] bool, documents that are in no split any more.
        vocab_size: ids of the tokenizer that made the tokens; None where that is not known.
        in_order: whether splits are taken from a corpus one behind the other, as Megatron does, not spread evenly.
    """

    def __init__(
        self,
        corpora: list[Corpus],
        chunk_length: int,
        removed: np.ndarray | None = None,
        vocab_size: int | None = None,
        *,
        in_order: bool = False,
    ):
        """`removed` holds document ids (int64)."""
        self.corpora, self.chunk_length, self.vocab_size = corpora, chunk_length, vocab_size
        self.in_order = in_order
        self.corpus_documents = np.cumsum([0] + [len(corpus.length) for corpus in corpora])
        self._start = np.concatenate([corpus.start for corpus in corpora])
        self._length = np.concatenate([corpus.length for corpus in corpora])
        self.first_chunk = running_sum(-(-self._length // chunk_length))
        self.removed = np.zeros(len(self._length), bool)
        if removed is not None and len(removed):
            if not 0 <= removed.min() <= removed.max() < len(self.removed):
                raise UserError(
                    f"the removed documents are {removed.min()} … {removed.max()}, the corpora hold "
                    f"{len(self.removed)}; restore the work dir's chunks/removed files, or build a new work dir"
                )
            self.removed[removed] = True

    @classmethod
    def open(cls, work: WorkDir) -> "ChunkTable":
        """Open the corpora that the manifest names; the stored tables must equal what the corpora give.

        Raises:
            UserError: a corpus is missing or does not fit its `chunks/<name>.npy`.
        """
        facts = work.facts("chunks")
        corpora = open_corpora(work, facts.get("excluded_corpora", []))
        removed = removed_documents(work.path / facts["removed"]) if facts.get("removed") else None
        vocab_size, in_order = work.facts("tokenizer")["vocab_size"], facts.get("in_order", False)
        table = cls(corpora, facts["chunk_length"], removed, vocab_size, in_order=in_order)
        for number, corpus in enumerate(corpora):
            path = work.directory("chunks") / f"{corpus.name}.npy"
            stored = load_array(path, np.int64, (None,))
            begin, end = table.corpus_documents[number : number + 2]
            expected = table.first_chunk[begin : end + 1] - table.first_chunk[begin]
            if not np.array_equal(stored, expected):
                raise UserError(
                    f"--retro-work-dir {work.path}: chunks/{corpus.name}.npy holds {stored[-1:].sum()} chunks in "
                    f"{len(stored) - 1} documents, the corpus {expected[-1]} in {len(expected) - 1}; "
                    "restore the corpus, or build a new work dir"
                )
        return table

    @property
    def num_documents(self) -> int:
        return len(self._length)

    @property
    def num_chunks(self) -> int:
        return int(self.first_chunk[-1])

    @property
    def num_tokens(self) -> int:
        return int(self._length.sum())

    @functools.cached_property
    def corpus_chunks(self) -> np.ndarray:
        """First chunk id of each corpus, [num_corpora + 1] int64."""
        return self.first_chunk[self.corpus_documents]

    def document(self, chunk: np.ndarray) -> np.ndarray:
        """The document of each chunk id (same shape, int64)."""
        return np.searchsorted(self.first_chunk, chunk, side="right") - 1

    def document_chunks(self, chunk: np.ndarray) -> np.ndarray:
        """[n] chunk ids -> [n, 2] int64: first chunk id of each one's document and of the next document."""
        document = self.document(chunk)
        return np.stack([self.first_chunk[document], self.first_chunk[document + 1]], axis=1)

    def lengths(self, chunk: np.ndarray) -> np.ndarray:
        """The tokens of each chunk id (same shape, int64)."""
        document = self.document(chunk)
        return np.minimum(
            self._length[document] - (chunk - self.first_chunk[document]) * self.chunk_length, self.chunk_length
        )

    def is_last(self, chunk: np.ndarray) -> np.ndarray:
        """Whether each chunk is the last of its document (same shape, bool)."""
        return self.first_chunk[self.document(chunk) + 1] == chunk + 1

    def tokens(self, chunk: np.ndarray, num_tokens: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
        """What stands from each chunk's start on, never past the end of its document.

        `num_tokens` C reads the chunk, C + 1 the chunk and its labels, 2C a neighbor with its continuation.

        Args:
            chunk: [n] int64 chunk ids; -1 reads nothing.
            num_tokens: tokens a row.
            pad: fills the row behind its tokens.

        Returns:
            (tokens [n, num_tokens] int64, lengths [n] int64).

        Raises:
            IndexError: an id that is no chunk.
            UserError: a token is outside the vocabulary.
        """
        if len(chunk) and not (chunk.min() >= -1 and chunk.max() < self.num_chunks):
            raise IndexError(f"chunk ids {chunk.min()} … {chunk.max()} of a table of {self.num_chunks} chunks")
        document = self.document(np.maximum(chunk, 0))
        offset = (chunk - self.first_chunk[document]) * self.chunk_length
        length = np.where(chunk >= 0, np.minimum(self._length[document] - offset, num_tokens), 0)
        begin = self._start[document] + offset
        tokens = np.full((len(chunk), num_tokens), pad, np.int64)
        of_corpus = np.where(chunk >= 0, corpus_of(self.corpus_documents, document), -1)
        for number, corpus in enumerate(self.corpora):
            rows = np.flatnonzero(of_corpus == number)
            if len(rows):
                position = begin[rows, None] + np.arange(num_tokens)
                tokens[rows] = np.asarray(corpus.tokens).take(position, mode="clip")
        tokens[np.arange(num_tokens) >= length[:, None]] = pad  # what belongs to the next document
        if self.vocab_size is not None and len(chunk) and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            self._refuse_tokens(tokens, document)
        return tokens, length

    def _refuse_tokens(self, tokens: np.ndarray, document: np.ndarray) -> None:
        """Tell where the first token outside the vocabulary is, in rows [n, num_tokens] of documents [n]."""
        row, place = np.argwhere((tokens < 0) | (tokens >= (self.vocab_size or 0)))[0]
        number = int(corpus_of(self.corpus_documents, document[row]))
        raise UserError(
            f"document {self.corpora[number].name}:{document[row] - self.corpus_documents[number]} holds token id "
            f"{tokens[row, place]}, the work dir's tokenizer has {self.vocab_size} ids; restore the corpus, or build a "
            "new work dir with the tokenizer that made it"
        )

    def database_documents(self, split_weights: tuple[float, ...]) -> np.ndarray:
        """Ascending ids of the documents whose chunks may be neighbors: those of the train split of such corpora."""
        documents = self.documents_in("train", split_weights)
        retrieved = np.array([corpus.retrieved for corpus in self.corpora])
        return documents[retrieved[corpus_of(self.corpus_documents, documents)]]

    def documents_in(self, split: str, weights: tuple[float, ...]) -> np.ndarray:
        """Ids of the documents in a split, ascending (int64); removed ones are in none.

        A document's split follows from its number in its corpus alone (Fibonacci hashing: evenly spread, exact to
        about one document, unchanged when the corpus grows); of a Megatron project, it is the one it had there.

        Args:
            split: "train", "valid" or "test".
            weights: share of each split, in any unit.
        """
        bounds = np.cumsum([0.0, *weights]) / sum(weights)
        number = SPLITS.index(split)
        if self.in_order:
            sizes = [len(corpus.length) for corpus in self.corpora]
            ends = [[round(bound * size) for bound in bounds[number : number + 2]] for size in sizes]
            begin, end = (np.array(ends) + self.corpus_documents[:-1, None]).T
            documents = ranges(begin, end)
            return documents[~self.removed[documents]]
        local = np.concatenate([np.arange(len(corpus.length)) for corpus in self.corpora])
        share = ((local.astype(np.uint64) + np.uint64(1)) * _FIBONACCI >> np.uint64(11)).astype(np.float64) / 2**53
        return np.flatnonzero((bounds[number] <= share) & (share < bounds[number + 1]) & ~self.removed)

    def chunks_of(self, documents: np.ndarray) -> np.ndarray:
        """The chunk ids of documents, document after document (int64)."""
        return ranges(self.first_chunk[documents], self.first_chunk[documents + 1])


class Stream:
    """The chunks of documents laid end to end: from stream position to chunk id, in O(documents) memory."""

    def __init__(self, table: ChunkTable, documents: np.ndarray):
        self._first_chunk = table.first_chunk[documents]
        self._begin = running_sum(table.first_chunk[documents + 1] - self._first_chunk)

    def __len__(self) -> int:
        return int(self._begin[-1])

    def chunks(self, position: np.ndarray) -> np.ndarray:
        """The chunk at each stream position (same shape, int64); -1 behind the end."""
        inside = np.minimum(position, len(self) - 1)
        document = np.searchsorted(self._begin, inside, side="right") - 1
        return np.where(position < len(self), self._first_chunk[document] + inside - self._begin[document], -1)


def corpus_of(bounds: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The corpus of each document or chunk id (same shape, int64), by the corpora's first ids [num_corpora + 1]."""
    return np.searchsorted(bounds, ids, side="right") - 1


def running_sum(counts: np.ndarray) -> np.ndarray:
    """[0, c0, c0 + c1, …] as int64."""
    return np.append(0, np.cumsum(counts, dtype=np.int64)).astype(np.int64)


def ranges(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Concatenation of `arange(begin[i], end[i])` over i (int64)."""
    sizes = end - begin
    offset = np.repeat(begin - running_sum(sizes)[:-1], sizes)
    return offset + np.arange(len(offset))
