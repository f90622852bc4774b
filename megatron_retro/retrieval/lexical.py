"""Neighbors by shared words: BM25 over the database's chunks, alone or to rank the nearest embeddings anew.

Of query chunk q and database chunk c, with the counts n of a word w in each of them,

    score(q, c) = sum over w of  n(w, q) · idf(w) · n(w, c) / (n(w, c) + k1 · (1 - b + b · |c| / mean |c|))
    idf(w)      = ln(1 + (N - df(w) + 1/2) / (df(w) + 1/2))

where df(w) of the N chunks hold w, and |c| is the number of words in c; k1 = 1.5, b = 0.75. This is the weighting of
Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", in the form of Lucene and as
bm25s has it by default: every summand is computed when the index is built (Lù 2024, arXiv 2407.03618).

A word is a run of letters and digits with their combining marks, in lower case. So `snake_case` is two words, and
what a chunk's end leaves of a name still counts. A character of a script that is written without spaces is a word of
its own. There is neither a stemmer nor a list of stop words, which would each be one language's. In their place, words
that stand in more than a fifth of the chunks are dropped, and do not count for |c|. On 240,000 chunks of English and
code these are twelve words, a sixth of the index and more than half of a query's time; a sixth of the best neighbors
change without them, but the share of the ten best that stem from the query's own document (let in for this) does not.

The directory of an index holds bm25s's files and the documents that it was built from; nothing is pickled.

    data.csc.index.npy      the summands, word after word, [postings] float32
    indices.csc.index.npy   the position of each one's chunk in the database, ascending in a word, [postings] int32
    indptr.csc.index.npy    where each word begins, [words + 1] int64
    vocab.index.json        word -> number
    params.index.json       k1, b and the like
    documents.npy           ids of the database's documents, ascending, [documents] int64
"""

import collections
import functools
import itertools
import pathlib
import unicodedata
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megatron_retro.data.chunks import ChunkTable, Stream, ranges, running_sum
from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.errors import UserError
from megatron_retro.reading import WAY_OUT, load_array
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import chunk_texts
from megatron_retro.retrieval.retriever import Retriever
from megatron_retro.storage import replacing, save_npy

_CHUNKS_AT_ONCE = 4096  # whose texts are held
_BLOCK = 256  # scores of which only the best is looked at first

# A word is dropped that stands in more than this share of the chunks, and in more than this number of them.
_FREQUENT_SHARE, _FREQUENT_COUNT = 0.2, 1000

# Scripts that put no spaces between words: Thai and Lao, Burmese, Khmer, kana, Han.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


@functools.cache
def word_pattern() -> str:
    """The regular expression of a word; `\\w` knows no combining marks, on which many scripts of India rely."""
    marks = "".join(chr(code) for code in range(0x10000) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
    letter = rf"[^\W_{_UNSPACED}]"
    return rf"{letter}+(?:[{marks}]+{letter}*)*|(?![\W_])[{_UNSPACED}][{marks}]*"


class Bm25Index:
    """An index of words.

    Attributes:
        documents: [num_documents] int64, ascending ids of the documents that it was built from.
        num_chunks: N.
    """

    def __init__(self, bm25: Any, documents: np.ndarray):
        """`bm25` is a `bm25s.BM25` with its index."""
        self._bm25, self.documents = bm25, documents
        self.num_chunks: int = bm25.scores["num_docs"]
        self._words = _word_tokenizer()
        self._words.word_to_id = bm25.vocab_dict

    @classmethod
    def build(
        cls,
        directory: pathlib.Path,
        table: ChunkTable,
        tokenizer: Tokenizer,
        database: Database,
        advance: Callable[[int], None] = lambda num_chunks: None,
    ) -> None:
        """Index the database's chunks; the directory appears when it is complete. Same input, same bytes.

        A chunk of 64 tokens takes some 1.5 kB of memory while this runs, and 0.22 kB of disk: of each different word
        in it 8 bytes are stored, and some 40 needed to sort them.

        Args:
            directory: to be made.
            table: all chunks.
            tokenizer: of the corpora.
            database: the chunks to index.
            advance: told the number of chunks whose words have been read.

        Raises:
            FileExistsError: there is such a directory.
        """
        import bm25s

        if directory.exists():
            raise FileExistsError(f"{directory} exists")
        assert len(database) < 2**31, "bm25s numbers chunks in int32"
        rows = _read_words(table, tokenizer, database, advance)
        bm25 = bm25s.BM25()
        with np.errstate(invalid="ignore"):  # 0 / 0 where no chunk has a word
            bm25.index(rows, create_empty_token=False, show_progress=False)
        with replacing(directory) as temporary:
            temporary.mkdir()
            with unittest.mock.patch.object(np, "save", lambda file, array, **_: save_npy(pathlib.Path(file), array)):
                bm25.save(temporary, show_progress=False)
            save_npy(temporary / "documents.npy", np.flatnonzero(database.is_member))

    @classmethod
    def open(cls, directory: pathlib.Path) -> "Bm25Index":
        """Open what `build` made; the large arrays stay on disk, mapped into memory.

        Raises:
            UserError: it is missing or damaged.
        """
        import bm25s

        try:
            bm25 = bm25s.BM25.load(directory, mmap=True, allow_pickle=False, show_progress=False)
            arrays = {name: np.asarray(bm25.scores[name]) for name in ("data", "indices", "indptr")}
            bm25.scores |= arrays  # still mapped; slices of a np.memmap are slow to make
            _check_arrays(**arrays, num_docs=bm25.scores["num_docs"], vocab=bm25.vocab_dict)
        except Exception as error:  # the library looks at nothing
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{directory} is no index of words ({reason}); {WAY_OUT}") from None
        return cls(bm25, np.array(load_array(directory / "documents.npy", np.int64, (None,))))

    def words(self, texts: list[str]) -> list[list[int]]:
        """Numbers of the words of each text, as often as they stand in it; words that no chunk has are left out."""
        return self._words.tokenize(texts, update_vocab=False, allow_empty=False, show_progress=False)

    def scores(self, words: list[int]) -> np.ndarray:
        """The score of every chunk for the words of a query, [N] float32."""
        return self._bm25.get_scores_from_ids(words) if words else np.zeros(self.num_chunks, np.float32)

    @property
    def num_words(self) -> int:
        return len(self._bm25.vocab_dict)

    def rows(self) -> Any:
        """The summands by chunk: a `scipy.sparse.csr_matrix` [N, num_words] float32, 8 bytes of memory a summand."""
        import scipy.sparse

        scores = self._bm25.scores
        shape = (self.num_chunks, self.num_words)
        return scipy.sparse.csc_matrix((scores["data"], scores["indices"], scores["indptr"]), shape).tocsr()


def _check_arrays(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, num_docs: Any, vocab: Any) -> None:
    """Check that an index's arrays fit one another, but for what would have to be read whole."""
    kinds = [(array.dtype, array.ndim) for array in (data, indices, indptr)]
    assert kinds == [(np.float32, 1), (np.int32, 1), (np.int64, 1)], "arrays of other types"
    assert isinstance(num_docs, int) and isinstance(vocab, dict), "no number of chunks or no words"
    assert len(data) == len(indices) and indptr[0] == 0 and indptr[-1] == len(data), "arrays of other lengths"
    assert (indptr[1:] >= indptr[:-1]).all(), "words that overlap"
    assert all(isinstance(number, int) and 0 <= number < len(indptr) - 1 for number in vocab.values()), "unknown words"


class _Words:
    """The words of all chunks, in the form that bm25s reads: an object with `ids` (lists by chunk) and `vocab`."""

    def __init__(self, words: np.ndarray, counts: np.ndarray, vocab: dict[str, int]):
        """`words` [sum of counts] int32 of chunk after chunk, `counts` [N] int64 of each."""
        self._words, self._begin, self.vocab = words, running_sum(counts), vocab

    @property
    def ids(self) -> "_Words":
        return self

    def __len__(self) -> int:
        return len(self._begin) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for begin, end in itertools.pairwise(self._begin.tolist()):
            yield self._words[begin:end].tolist()


def _read_words(table: ChunkTable, tokenizer: Tokenizer, database: Database, advance: Callable[[int], None]) -> _Words:
    """The words of the database's chunks but the frequent ones, which keep a number and stand nowhere."""
    split = _word_tokenizer()
    words, counts = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    num_holding: collections.Counter[int] = collections.Counter()
    for begin in range(0, len(database), _CHUNKS_AT_ONCE):
        chunks = database.chunks(begin, begin + _CHUNKS_AT_ONCE)
        texts = chunk_texts(table, chunks, tokenizer)
        rows = split.tokenize(texts, update_vocab=True, allow_empty=False, return_as="ids", show_progress=False)
        num_holding.update(itertools.chain.from_iterable(map(set, rows)))
        words.append(np.fromiter(itertools.chain.from_iterable(rows), np.int32))
        counts.append(np.array([len(row) for row in rows], np.int64))
        advance(len(chunks))
    word, count = np.concatenate(words), np.concatenate(counts)
    most = max(_FREQUENT_COUNT, _FREQUENT_SHARE * len(database))
    frequent = np.array([num_holding[number] > most for number in range(len(split.word_to_id))], bool)
    kept = ~frequent[word]
    position = np.repeat(np.arange(len(count), dtype=np.int32), count)
    return _Words(word[kept], np.bincount(position[kept], minlength=len(count)), split.word_to_id)


def _word_tokenizer() -> Any:
    from bm25s.tokenization import Tokenizer as WordTokenizer

    return WordTokenizer(lower=True, splitter=word_pattern(), stopwords=None, stemmer=None)


# ------------------------------------------------------------------------------------------------ retrievers


class _Positions:
    """Where chunks stand in an index.

    Args:
        table: all chunks; it may have grown since the index was built.
        index: its documents tell.
    """

    def __init__(self, table: ChunkTable, index: Bm25Index):
        self._table, self._stream = table, Stream(table, index.documents)
        assert len(self._stream) == index.num_chunks, "the index was built from other documents"
        self._has = np.zeros(table.num_documents, bool)
        self._has[index.documents] = True
        self._begin = running_sum(np.where(self._has, np.diff(table.first_chunk), 0))

    def chunks(self, position: np.ndarray) -> np.ndarray:
        """The chunk at each position (same shape, int64)."""
        return self._stream.chunks(position)

    def find(self, chunks: np.ndarray) -> np.ndarray:
        """The position of each chunk id (same shape, int64); -1 where it is not in the index, or is -1."""
        document = self._table.document(np.maximum(chunks, 0))
        position = self._begin[document] + chunks - self._table.first_chunk[document]
        return np.where(self._has[document] & (chunks >= 0), position, -1)

    def of_documents(self, documents: np.ndarray) -> np.ndarray:
        """[n] document ids -> [n, 2] int64: position of each one's first chunk and behind its last; equal if none."""
        return np.stack([self._begin[documents], self._begin[documents + 1]], axis=1)


class Bm25Retriever:
    """The chunks with the highest score.

    A chunk is a neighbor only if it shares a word that is not frequent, so there can be fewer than `k` though the
    database has more. Chunks of documents that came into the database after the index was built are not found; those
    of documents that went are passed over.

    Args:
        index: of the database, or of an earlier state of it.
        table: all chunks.
        tokenizer: of the corpora.
        database: the chunks that may be neighbors.
    """

    def __init__(self, index: Bm25Index, table: ChunkTable, tokenizer: Tokenizer, database: Database):
        self._index, self._table, self._tokenizer = index, table, tokenizer
        self._positions = _Positions(table, index)
        gone = self._positions.of_documents(index.documents[~database.is_member[index.documents]])
        self._gone = ranges(*gone.T)

    def neighbors(self, chunks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Retriever.neighbors`; a distance is the score with its sign turned; among equals the lower id wins."""
        own = self._positions.of_documents(self._table.document(chunks))
        return self._best(_words_of(self._index, self._table, self._tokenizer, chunks), own, k)

    def search(self, texts: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for texts that are in no document."""
        return self._best(iter(self._index.words(texts)), np.zeros((len(texts), 2), np.int64), k)

    def _best(self, queries: Iterator[list[int]], own: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """For the words of each query, with the positions `own` [n, 2] of its document."""
        position, best = np.full((len(own), k), -1, np.int64), np.zeros((len(own), k), np.float32)
        for number, words in enumerate(queries):
            scores = self._index.scores(words)
            scores[own[number, 0] : own[number, 1]] = 0
            scores[self._gone] = 0
            top = _top(scores, k)
            position[number, : len(top)], best[number, : len(top)] = top, scores[top]
        found = position >= 0
        ids = np.where(found, self._positions.chunks(np.maximum(position, 0)), -1)
        return ids, np.where(found, -best, np.float32(np.inf))


class HybridRetriever:
    """The nearest embeddings, ranked by the score of their words.

    Chunks with equal scores, and after all others those without a score, stay in the order of `dense`. A chunk whose
    document came into the database after the index was built has no score.

    Args:
        dense: finds the candidates; None if only `rank` is called.
        index: of the database, or of an earlier state of it; its rows take 8 bytes of memory a summand.
        table: all chunks.
        tokenizer: of the corpora.
        database: the chunks that may be neighbors, which `dense` keeps to.
        num_candidates: how many to rank; `k` if that is more.
    """

    def __init__(
        self,
        dense: Retriever | None,
        index: Bm25Index,
        table: ChunkTable,
        tokenizer: Tokenizer,
        database: Database,
        num_candidates: int = 200,
    ):
        self._dense, self._index, self._table, self._tokenizer = dense, index, table, tokenizer
        self._database, self.num_candidates = database, num_candidates
        self._positions, self._rows = _Positions(table, index), index.rows()

    def neighbors(self, chunks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Retriever.neighbors`, as many as `dense` has; a distance is the score with its sign turned."""
        assert self._dense is not None
        near, _ = self._dense.neighbors(chunks, max(k, self.num_candidates))
        return self._rank(_words_of(self._index, self._table, self._tokenizer, chunks), near, k)

    def rank(self, texts: list[str], near: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for texts that are in no document, among the candidates `near` [n, M] int64 that `dense` has."""
        return self._rank(iter(self._index.words(texts)), near, k)

    def _rank(self, queries: Iterator[list[int]], near: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        assert self._database.holds(near[near >= 0]).all(), "a candidate that is not in the database"
        distances = np.where(near >= 0, 0 - self._scores(queries, near), np.float32(np.inf))
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(near, order, 1), np.take_along_axis(distances, order, 1)

    def _scores(self, queries: Iterator[list[int]], near: np.ndarray) -> np.ndarray:
        """Scores of each query's candidates, [n, M] float32."""
        scores, positions = np.zeros(near.shape, np.float32), self._positions.find(near)
        weights = np.zeros(self._index.num_words, np.float32)
        for number, words in enumerate(queries):
            word, count = np.unique(np.array(words, np.int64), return_counts=True)
            known = positions[number] >= 0
            weights[word] = count
            scores[number, known] = self._rows[positions[number, known]] @ weights
            weights[word] = 0
        return scores


def _words_of(index: Bm25Index, table: ChunkTable, tokenizer: Tokenizer, chunks: np.ndarray) -> Iterator[list[int]]:
    """The words of each chunk, [n] int64 ids."""
    for begin in range(0, len(chunks), _CHUNKS_AT_ONCE):
        yield from index.words(chunk_texts(table, chunks[begin : begin + _CHUNKS_AT_ONCE], tokenizer))


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k highest scores above 0, highest first, then lowest position.

    The k-th highest of the blocks' maxima is no higher than the k-th highest score, so nothing below it matters.
    """
    maxima = np.maximum.reduceat(scores, np.arange(0, len(scores), _BLOCK))
    least = np.partition(maxima, -k)[-k] if k <= len(maxima) else 0
    candidates = np.flatnonzero(scores >= least if least > 0 else scores > 0)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
