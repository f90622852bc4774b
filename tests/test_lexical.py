"""BM25 against loops over its formula; both retrievers against sorting every score."""

import collections
import json
import math
import re

import numpy as np
import pytest
from conftest import stdlib_texts

from megatron_retro.data.chunks import ChunkTable, Corpus, running_sum
from megatron_retro.data.tokenizer import Tokenizer, train
from megatron_retro.errors import UserError
from megatron_retro.retrieval import lexical
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import chunk_texts
from megatron_retro.retrieval.lexical import Bm25Index, Bm25Retriever, HybridRetriever, word_pattern

C, K = 31, 7
SAME = "The quick brown fox jumps over the lazy dog, and nobody knows why it does so every single morning."
TEXTS = [*stdlib_texts(11, 1500), SAME, "... --- !!! ???", SAME, "xylophone zeppelin", SAME]
SAME_DOCUMENTS, MARKS_DOCUMENT, ALONE_DOCUMENT = (11, 13, 15), 12, 14


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train(TEXTS, 500))
    return Tokenizer.open(path)


def table_of(texts, tokenizer):
    rows = tokenizer.encode(texts)
    lengths = np.array([len(row) for row in rows])
    corpus = Corpus("a", np.concatenate(rows).astype(np.uint16), running_sum(lengths)[:-1], lengths, 1.0)
    return ChunkTable([corpus], C)


@pytest.fixture(scope="module")
def table(tokenizer):
    return table_of(TEXTS, tokenizer)


# The tenth document is in no database: a query of the valid split.
@pytest.fixture(scope="module")
def database(table):
    return Database(table, np.delete(np.arange(table.num_documents), 9))


@pytest.fixture(scope="module")
def index(table, tokenizer, database, tmp_path_factory):
    directory = tmp_path_factory.mktemp("index") / "bm25"
    Bm25Index.build(directory, table, tokenizer, database)
    return Bm25Index.open(directory)


def words_in(table, tokenizer, chunks):
    return [re.findall(r"[^\W_]+", text.lower()) for text in chunk_texts(table, chunks, tokenizer)]


def naive_scores(queries, rows, dropped=()):
    """The formula of the module, summand by summand: [queries, rows] float64."""
    rows = [collections.Counter(word for word in row if word not in dropped) for row in rows]
    mean = sum(row.total() for row in rows) / len(rows)
    scores = np.zeros((len(queries), len(rows)))
    for word in {word for row in rows for word in row}:
        df = sum(word in row for row in rows)
        idf = math.log(1 + (len(rows) - df + 0.5) / (df + 0.5))
        times = np.array([query.count(word) for query in queries])
        for number, row in enumerate(rows):
            if row[word]:
                length = 1 - 0.75 + 0.75 * row.total() / mean
                scores[:, number] += times * idf * row[word] / (row[word] + 1.5 * length)
    return scores


@pytest.fixture(scope="module")
def naive(table, tokenizer, database):
    """Of every chunk for every position of the database."""
    queries = words_in(table, tokenizer, np.arange(table.num_chunks))
    return naive_scores(queries, words_in(table, tokenizer, database.chunks(0, len(database))))


def index_scores(index, table, tokenizer, chunks):
    return np.stack([index.scores(words) for words in index.words(chunk_texts(table, chunks, tokenizer))])


def foreign(table, chunk, ids):
    begin, end = table.document_chunks(np.array([chunk]))[0]
    return (ids < begin) | (ids >= end)


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("text", "words"),
    {
        "def _get_x2(self): return HTTPError": ["def", "get", "x2", "self", "return", "httperror"],
        "naïve Größe, e\u0301t\u00e9": ["naïve", "größe", "e\u0301t\u00e9"],
        "हिन्दी में": ["हिन्दी", "में"],
        "Привет, мир 한국어 문장": ["привет", "мир", "한국어", "문장"],
        "檢索gpu增強。カタ": ["檢", "索", "gpu", "增", "強", "カ", "タ"],
        "ที่นี่": ["ที่", "นี่"],
        "… --- __ ・": [],
    }.items(),
)
def test_words_of_code_and_of_many_scripts(text, words):
    assert re.findall(word_pattern(), text.lower()) == words


def test_frequent_words_are_dropped_in_large_databases_only(monkeypatch, table, tokenizer, database, tmp_path):
    rows = words_in(table, tokenizer, database.chunks(0, len(database)))
    frequent = {word for row in rows for word in row if sum(word in other for other in rows) > 0.2 * len(rows)}
    assert 0 < len(frequent) < 50
    monkeypatch.setattr(lexical, "_FREQUENT_COUNT", 0)
    Bm25Index.build(tmp_path / "bm25", table, tokenizer, database)
    scores = index_scores(Bm25Index.open(tmp_path / "bm25"), table, tokenizer, np.arange(table.num_chunks))
    queries = words_in(table, tokenizer, np.arange(table.num_chunks))
    np.testing.assert_allclose(scores, naive_scores(queries, rows, frequent), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the index


def test_scores_equal_the_formula(index, table, tokenizer, database, naive):
    assert index.num_chunks == len(database) < table.num_chunks
    scores = index_scores(index, table, tokenizer, np.arange(table.num_chunks))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, naive, rtol=1e-4, atol=1e-5)


def test_rows_hold_the_same_summands(index, table, tokenizer, naive):
    dense = index.rows().toarray()
    for chunk, words in enumerate(index.words(chunk_texts(table, np.arange(table.num_chunks), tokenizer))):
        np.testing.assert_allclose(dense[:, words].sum(1), naive[chunk], rtol=1e-4, atol=1e-5)


def test_two_builds_have_the_same_bytes_and_nothing_pickled(monkeypatch, table, tokenizer, database, tmp_path):
    told = []
    Bm25Index.build(tmp_path / "a", table, tokenizer, database, told.append)
    monkeypatch.setattr(lexical, "_CHUNKS_AT_ONCE", 13)  # the stretches that are read leave no trace
    Bm25Index.build(tmp_path / "b" / "c", table, tokenizer, database, told.append)
    assert sum(told) == 2 * len(database) and len(told) > 3
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("a", "b/c")]
    assert contents[0] == contents[1]
    for file in (tmp_path / "a").iterdir():
        if file.suffix == ".npy":
            assert np.load(file, allow_pickle=False).dtype.kind in "if"
        else:
            assert file.suffix == ".json" and json.loads(file.read_text(encoding="utf-8"))


def test_an_interrupted_build_leaves_no_directory(monkeypatch, table, tokenizer, database, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bm25Index.build(tmp_path / "bm25", table, tokenizer, database, interrupt)
    with monkeypatch.context() as patch:
        patch.setattr(lexical, "save_npy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Bm25Index.build(tmp_path / "bm25", table, tokenizer, database)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="bm25 is no index of words"):
        Bm25Index.open(tmp_path / "bm25")
    (tmp_path / "bm25.partial").mkdir()  # of a build that was killed
    (tmp_path / "bm25.partial" / "more").write_text("")
    Bm25Index.build(tmp_path / "bm25", table, tokenizer, database)
    assert not (tmp_path / "bm25" / "more").exists() and not (tmp_path / "bm25.partial").exists()
    with pytest.raises(FileExistsError):
        Bm25Index.build(tmp_path / "bm25", table, tokenizer, database)


def test_a_database_without_words_has_no_neighbors(tokenizer, tmp_path):
    table = table_of(["... --- !!!", "??? ,,,"], tokenizer)
    database = Database(table, np.arange(2))
    Bm25Index.build(tmp_path / "bm25", table, tokenizer, database)
    retriever = Bm25Retriever(Bm25Index.open(tmp_path / "bm25"), table, tokenizer, database)
    assert (retriever.neighbors(np.arange(table.num_chunks), K)[0] == -1).all()


# ------------------------------------------------------------------------------------------------ bm25


def brute_force(index, table, tokenizer, database, chunks, k):
    """Every chunk of the index sorted by score, then id."""
    every = Database(table, index.documents).chunks(0, index.num_chunks)
    ids, distances = np.full((len(chunks), k), -1), np.full((len(chunks), k), np.inf, np.float32)
    for number, scores in enumerate(index_scores(index, table, tokenizer, chunks)):
        allowed = np.flatnonzero(foreign(table, chunks[number], every) & (scores > 0) & database.holds(every))
        best = sorted(allowed, key=lambda position: (-scores[position], every[position]))[:k]
        ids[number, : len(best)], distances[number, : len(best)] = every[best], -scores[best]
    return ids, distances


@pytest.mark.parametrize("k", [1, K, 1000])
@pytest.mark.parametrize("gone", [(), (0, 4, 11)])
def test_neighbors_are_the_best_of_all(monkeypatch, index, table, tokenizer, database, k, gone):
    monkeypatch.setattr(lexical, "_BLOCK", 5)
    now = Database(table, np.setdiff1d(index.documents, gone))
    chunks = np.random.default_rng(0).permutation(table.num_chunks)
    ids, distances = Bm25Retriever(index, table, tokenizer, now).neighbors(chunks, k)
    expected_ids, expected_distances = brute_force(index, table, tokenizer, now, chunks, k)
    assert ids.dtype == np.int64 and distances.dtype == np.float32 and ids.shape == distances.shape == (len(chunks), k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(distances, expected_distances)
    assert now.holds(ids[ids >= 0]).all()
    assert not (table.document(ids) == table.document(chunks)[:, None])[ids >= 0].any()


def test_the_best_of_a_long_row_of_ties():
    scores = np.random.default_rng(0).integers(0, 4, 3001).astype(np.float32)
    for k in (1, 10, 900, 2000, 5000):
        expected = [position for position in np.argsort(-scores, kind="stable") if scores[position] > 0][:k]
        assert lexical._top(scores, k).tolist() == expected


def test_among_identical_documents_the_lower_id_wins(index, table, tokenizer, database):
    first, second, third = table.first_chunk[list(SAME_DOCUMENTS)]
    ids, distances = Bm25Retriever(index, table, tokenizer, database).neighbors(np.array([first, second, third]), 2)
    assert ids.tolist() == [[second, third], [first, third], [first, second]]
    assert (distances == distances[0, 0]).all()


def test_chunks_that_share_no_word_have_no_neighbors(index, table, tokenizer, database):
    chunks = table.first_chunk[[MARKS_DOCUMENT, ALONE_DOCUMENT]]
    ids, distances = Bm25Retriever(index, table, tokenizer, database).neighbors(chunks, K)
    assert (ids == -1).all() and np.isposinf(distances).all()


def test_one_document_alone_has_no_neighbors(tokenizer, tmp_path):
    table = table_of(TEXTS[:1], tokenizer)
    database = Database(table, np.arange(1))
    Bm25Index.build(tmp_path / "bm25", table, tokenizer, database)
    ids, _ = Bm25Retriever(Bm25Index.open(tmp_path / "bm25"), table, tokenizer, database).neighbors(np.arange(3), K)
    assert (ids == -1).all()


# ------------------------------------------------------------------------------------------------ hybrid


class Shuffled:
    """Gives some foreign chunks of the database in an order of its own: [n, k], the last ones -1."""

    def __init__(self, table, database, most):
        self.table, self.database, self.most, self.asked = table, database, most, []

    def neighbors(self, chunks, k):
        self.asked.append(k)
        ids = np.full((len(chunks), k), -1, np.int64)
        for number, chunk in enumerate(chunks):
            every = self.database.chunks(0, len(self.database))
            order = np.random.default_rng(chunk).permutation(every[foreign(self.table, chunk, every)])
            ids[number, : min(k, self.most)] = order[: min(k, self.most)]
        return ids, np.where(ids >= 0, np.arange(k, dtype=np.float32), np.inf)


@pytest.mark.parametrize(("most", "num_candidates"), [(10_000, 29), (23, 29), (3, 29), (10_000, 3)])
def test_hybrid_ranks_the_candidates_by_score(index, table, tokenizer, database, naive, most, num_candidates):
    most = min(most, int(database.num_foreign(table.document_chunks(np.arange(table.num_chunks))).min()))
    dense = Shuffled(table, database, most)
    hybrid = HybridRetriever(dense, index, table, tokenizer, database, num_candidates)
    chunks, every = np.arange(table.num_chunks), database.chunks(0, len(database))
    ids, distances = hybrid.neighbors(chunks, K)
    assert dense.asked == [max(K, num_candidates)]
    assert ids.dtype == np.int64 and distances.dtype == np.float32 and ids.shape == distances.shape == (len(chunks), K)
    for chunk, near in enumerate(dense.neighbors(chunks, max(K, num_candidates))[0]):
        near = near[near >= 0]
        scores = naive[chunk, np.searchsorted(every, near)]
        found, distance = ids[chunk, : min(K, most)], distances[chunk, : min(K, most)]
        assert (ids[chunk, len(found) :] == -1).all() and np.isposinf(distances[chunk, len(found) :]).all()
        assert len(set(found)) == len(found) and set(found) <= set(near)
        np.testing.assert_allclose(-distance, np.sort(scores)[::-1][: len(found)], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(-distance, naive[chunk, np.searchsorted(every, found)], rtol=1e-4, atol=1e-5)
        rank = np.array([near.tolist().index(id) for id in found])
        assert ((np.diff(distance) > 0) | (np.diff(rank) > 0)).all()


def test_hybrid_keeps_the_dense_order_without_words(index, table, tokenizer, database):
    dense = Shuffled(table, database, 1000)
    chunk = table.first_chunk[[MARKS_DOCUMENT]]
    ids, distances = HybridRetriever(dense, index, table, tokenizer, database, 20).neighbors(chunk, K)
    np.testing.assert_array_equal(ids, dense.neighbors(chunk, 20)[0][:, :K])
    assert (distances == 0).all() and not np.signbit(distances).any()


def test_documents_that_came_later_have_no_score(index, tokenizer, table, database):
    grown = table_of([*TEXTS, SAME], tokenizer)
    now = Database(grown, np.append(index.documents, len(TEXTS)))
    chunk, others, later = *grown.first_chunk[list(SAME_DOCUMENTS)][[0]], grown.first_chunk[[13, 15]], len(TEXTS)
    (ids,), _ = Bm25Retriever(index, grown, tokenizer, now).neighbors(np.array([chunk]), 1000)
    assert ids[:2].tolist() == others.tolist() and not (grown.document(ids[ids >= 0]) == later).any()

    class LaterFirst:
        def neighbors(self, chunks, k):
            row = np.append(grown.first_chunk[later], others[::-1])
            return np.pad(row, (0, k - 3), constant_values=-1)[None], np.zeros((1, k), np.float32)

    ids, distances = HybridRetriever(LaterFirst(), index, grown, tokenizer, now).neighbors(np.array([chunk]), 4)
    assert ids.tolist() == [[*others[::-1], grown.first_chunk[later], -1]] and distances[0, 2] == 0
