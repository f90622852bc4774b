"""A RETRO project of Megatron-LM 0.15, with its faults planted: what holds is reused, what does not is masked."""

import collections
import json
import pathlib
import shutil

import faiss
import h5py
import numpy as np
import pytest
import torch
import transformers
from conftest import build, stdlib_texts
from launch import run_forked
from megatron_files import database, write_corpus, write_project
from test_tokenizer import gpt2_files

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.data.tokenizer import Tokenizer, gpt2_json
from megatron_retro.errors import UserError
from megatron_retro.retrieval.embedding import EmbeddingTable, resolve
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.project_import import DatabaseRows, Places, Reader
from megatron_retro.retrieval.project_index import ProjectIndex
from megatron_retro.retrieval.project_order import Order
from megatron_retro.retrieval.query import OpenIndex
from megatron_retro.workdir import WorkDir

C, S, K, SEED = 16, 64, 6, 77
CONFIG = {
    "retro_gpt_chunk_length": C,
    "retro_gpt_data_cache_path": None,
    "retro_gpt_data_path": ["0.7", "wiki/wiki_text_document", "0.3", "books_text_sentence"],
    "retro_gpt_eval_interval": 10,
    "retro_gpt_eval_iters": 1,
    "retro_gpt_global_batch_size": 4,
    "retro_gpt_merge_file": "tokenizer/merges.txt",
    "retro_gpt_seed": SEED,
    "retro_gpt_seq_length": S,
    "retro_gpt_split": "80,20,0",
    "retro_gpt_tokenizer_model": None,
    "retro_gpt_tokenizer_type": "GPT2BPETokenizer",
    "retro_gpt_train_samples": 60,
    "retro_gpt_vocab_file": "tokenizer/vocab.json",
}


def documents(tokenizer):
    """Two corpora: whole documents, and documents of several sequences; many a length is a multiple of C."""
    texts = tokenizer.encode([text[200:900] for text in stdlib_texts(34)])
    whole = [[[*row[: (5 + number % 4) * C - number % 3], tokenizer.eod]] for number, row in enumerate(texts[:20])]
    parts = [[row[: 2 * C], row[2 * C : 3 * C + 5], [*row[-9:], tokenizer.eod]] for row in texts[20:]]
    return [whole, parts]


class Small:
    """What a small project holds."""

    def __init__(self, path):
        self.path = path
        (path / "tokenizer").mkdir(parents=True)
        files = gpt2_files(path / "tokenizer")
        (path / "tokenizer.json").write_bytes(gpt2_json(*files))
        self.tokenizer = Tokenizer.open(path / "tokenizer.json")
        self.corpora = documents(self.tokenizer)
        self.prefixes = [str(path / "data" / prefix) for prefix in CONFIG["retro_gpt_data_path"][1::2]]
        for prefix, of_corpus in zip(self.prefixes, self.corpora, strict=True):
            write_corpus(prefix, of_corpus)
        train = [corpus[: round(0.8 * len(corpus))] for corpus in self.corpora]
        self.chunks = database(train, C, self.tokenizer.eod)


def samples_of_megatron(small, cache):
    """Megatron's own samples: split -> [(corpus, its sample's token ids, the sequences it takes them from)]."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Plain:
        vocab_size, eod, unique_identifiers = 400, 399, {}

    weights = [float(weight) for weight in CONFIG["retro_gpt_data_path"][::2]]
    config = GPTDatasetConfig(
        random_seed=SEED, sequence_length=S, blend=(small.prefixes, weights), split=CONFIG["retro_gpt_split"],
        path_to_cache=str(cache), tokenizer=Plain(), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, mid_level_dataset_surplus=0.005,
    )  # fmt: skip
    numbers = Project(small.path).samples
    built = BlendedMegatronDatasetBuilder(GPTDataset, [*numbers.values()], lambda: True, config).build()
    found = {}
    for (split, number), dataset in zip(numbers.items(), built, strict=True):
        if dataset is not None:
            at = [(int(dataset.dataset_index[i]), int(dataset.dataset_sample_index[i])) for i in range(number)]
            found[split] = [(c, *dataset.datasets[c]._query_document_sample_shuffle_indices(i)) for c, i in at]
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A project without an index, whose neighbors are random, with every fault planted in every row."""
    small = Small(tmp_path_factory.mktemp("project") / "project")
    generator = np.random.default_rng(0)
    windows = {"train": 60 * S // C, "valid": 8 * S // C}
    small.neighbors = {
        split: generator.permuted(np.tile(np.arange(len(small.chunks)), (count, 1)), axis=1)[:, :K]
        for split, count in windows.items()
    }
    for rows in small.neighbors.values():
        rows[::3, K - 1] = -1
        rows[1::3, 1] = rows[1::3, 0]
    write_project(small.path, CONFIG, small.corpora, small.chunks, small.neighbors)
    return small


def test_windows_lie_where_megatrons_samples_do(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)  # megatron-core asks for it
    found = samples_of_megatron(small, tmp_path)
    assert list(found) == ["train", "valid"]
    for split, samples in found.items():
        every = order_of(small, split).windows(0, len(samples) * S // C)
        flat = [[s for d in c for s in d] for c in small.corpora]
        for number in range(len(every.corpus)):
            corpus, tokens, sequences = samples[number // (S // C)]
            window = tokens[number % (S // C) * C :][:C].tolist()
            assert every.corpus[number] == corpus
            assert {every.sequence[number], every.last_sequence[number]} <= set(sequences.tolist())
            begin = flat[corpus][every.sequence[number]][every.offset[number] :][:C]
            assert window[: len(begin)] == begin
            assert (len(begin) == C) == (not every.across[number])


def order_of(small, split):
    lengths = [np.array([len(s) for d in c for s in d]) for c in small.corpora]
    project = Project(small.path)
    return Order(
        lengths, [0.7, 0.3], project.split, split,
        samples=project.samples[split], seq_length=S, chunk_length=C, seed=SEED,
    )  # fmt: skip


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A checkpoint of a tiny BERT with random weights."""
    path = tmp_path_factory.mktemp("embedder")
    words = pathlib.Path(resolve("all-MiniLM-L6-v2")[0])
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (words / name).exists():
            shutil.copy(words / name, path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, initializer_range=0.5
    )
    transformers.BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def work(small, embedder, tmp_path_factory):
    path = tmp_path_factory.mktemp("work") / "work"
    project = ("--retro-project-dir", str(small.path))
    build(path, *project, "--retro-embedder", str(embedder), "--retro-query-num-neighbors-save", "4")
    return WorkDir(path)


def test_a_project_becomes_a_work_dir(small, work):
    table = ChunkTable.open(work)
    assert [corpus.name for corpus in table.corpora] == ["wiki_text_document", "books_text_sentence"]
    assert [corpus.weight for corpus in table.corpora] == [0.7, 0.3]
    assert table.num_documents == sum(map(len, small.corpora)) and table.chunk_length == C
    train, valid = (table.documents_in(split, tuple(work.facts("chunks")["split"])) for split in ("train", "valid"))
    assert train.tolist() == [*range(16), *range(20, 31)] and valid.tolist() == [*range(16, 20), *range(31, 34)]
    assert work.facts("tokenizer")["eod"] == small.tokenizer.eod
    told = json.loads((work.path / "report" / "summary.json").read_text())["project"]
    assert told == {stage: work.facts(stage)["project"] for stage in ("chunks", "neighbors")}
    before = work.manifest
    build(work.path, "--retro-project-dir", str(small.path))
    work.reload()
    assert work.manifest == before


# ------------------------------------------------------------------------------------------------ neighbors


def restated_chunks(small):
    """(For each row of the project's database: its document, and the chunk with the same tokens or None;
    (corpus, document, offset) -> chunk)."""
    first, chunks = 0, {}
    for number, of_corpus in enumerate(small.corpora):
        for place, sequences in enumerate(of_corpus):
            tokens = [id for sequence in sequences for id in sequence]
            for offset in range(0, len(tokens), C):
                chunks[number, place, offset] = first, tokens[offset : offset + C]
                first += 1
    rows = []
    for number, wanted, begin, end, _ in small.chunks.tolist():
        place = at = 0
        while at + len(small.corpora[number][place]) <= wanted:
            at, place = at + len(small.corpora[number][place]), place + 1
        document = small.corpora[number][place]
        sequence, offset = document[wanted - at], sum(map(len, document[: wanted - at])) + begin
        id, held = chunks.get((number, place, offset), (None, []))
        without_end = held == [*sequence[begin:end], small.tokenizer.eod] and end + 1 == len(sequence)
        rows.append(((number, place), id if held == sequence[begin:end] or without_end else None))
    return rows, {key: id for key, (id, _) in chunks.items()}


def restated_neighbors(small, database):
    """(chunk -> neighbors that hold for it, what is counted), in loops over all that the project holds."""
    rows, chunks = restated_chunks(small)
    expected, counts = {}, collections.Counter()
    for split, neighbors in small.neighbors.items():
        order = order_of(small, split).windows(0, len(neighbors))
        for window, row in enumerate(neighbors.tolist()):
            of_corpus = small.corpora[int(order.corpus[window])]
            places = [(d, s) for d, sequences in enumerate(of_corpus) for s in range(len(sequences))]
            document, sequence = places[order.sequence[window]]
            key = int(order.corpus[window]), document
            own, begin = {key, (key[0], places[order.last_sequence[window]][0])}, int(order.offset[window])
            chunk = chunks.get((*key, sum(map(len, of_corpus[document][:sequence])) + begin))
            if begin + C > len(of_corpus[document][sequence]):
                counts["across_documents"] += 1
                chunk = None
            else:
                counts["held" if chunk is not None else "shifted"] += 1
            kept = []
            for old in row:
                counts["neighbors"] += 1
                if old < 0:
                    counts["none"] += 1
                    continue
                (mine, id), (following, _) = rows[old], rows[(old + 1) % len(rows)]
                counts["continuation_elsewhere"] += following != mine
                counts["continuation_own_document"] += following != mine and following in own
                if mine in own:
                    counts["own_document"] += 1
                elif id not in database:
                    counts["no_chunk_here"] += 1
                elif id in kept:
                    counts["twice"] += 1
                else:
                    kept.append(id)
            counts["windows"] += 1
            if chunk is not None:
                expected.setdefault(chunk, kept)
    return expected, counts


def test_neighbors_hold_where_windows_are_chunks_and_faults_are_masked(small, work):
    table = ChunkTable.open(work)
    database = set(table.chunks_of(table.documents_in("train", (80, 20, 0))).tolist())
    expected, counts = restated_neighbors(small, database)
    facts, told = dict(work.facts("neighbors")["project"]), work.facts("chunks")["project"]
    assert facts.pop("chunks") == len(expected) and facts == counts and min(counts.values()) > 0
    held = [id for _, id in restated_chunks(small)[0] if id is not None]
    assert (told["chunks"], told["held"]) == (len(small.chunks), len(held))
    vectors = EmbeddingTable(work).rows(np.arange(table.num_chunks)).astype(np.float64)
    ids, complete = NeighborTable(work, table).ids(np.arange(table.num_chunks)), 0
    for chunk, kept in expected.items():
        if len(kept) >= 4:
            distance = ((vectors[kept] - vectors[chunk]) ** 2).sum(1).astype(np.float32)
            assert ids[chunk].tolist() == [id for _, id in sorted(zip(distance, kept, strict=True))][:4]
            complete += 1
    assert complete > 10 and (ids >= 0).all()


# ------------------------------------------------------------------------------------------------ index


def write_index(path, factory, vectors):
    index = faiss.index_factory(vectors.shape[1], factory)
    index.train(vectors)
    index.add(vectors)
    path = path / "index" / "faiss-par-add" / factory / "added_1.000_1.000.faissindex"
    path.parent.mkdir(parents=True)
    faiss.write_index(index, str(path))


def vectors_of(small, work):
    """Embeddings of the project's chunks, a little off so that a copy is known from what was made here."""
    ids = np.array([id or 0 for _, id in restated_chunks(small)[0]])
    return EmbeddingTable(work).rows(ids).astype(np.float32) + np.float32(1e-3)


def codes_in(path):
    """chunk -> vector, of a shard of IVF4,Flat."""
    index, found = faiss.read_index(str(path)), {}
    for number in range(4):
        size = index.invlists.list_size(number)
        ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
        codes = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size)
        found |= zip(ids.tolist(), codes.copy().view(np.float32).reshape(size, -1).tolist(), strict=True)
    return found


def test_an_index_of_the_same_embedder_is_taken_over_by_two_ranks(small, work, tmp_path):
    project = shutil.copytree(small.path, tmp_path / "project")
    vectors = vectors_of(small, work)
    write_index(project, "IVF4,Flat", vectors)
    copy = WorkDir(shutil.copytree(work.path, tmp_path / "work"))
    copy.settings["retro_project_dir"] = str(project)
    for name in ("index_factory", "index_shards", "tuned", "neighbors_block_size"):
        del copy.settings[name]
    for stage in ("index", "neighbors"):
        copy.manifest["stages"].pop(stage)
        shutil.rmtree(copy.path / stage)
    copy.write()
    shown = run_forked("tools/preprocess_retro_data.py", "--retro-work-dir", copy.path, ranks=2)
    copy.reload()
    facts = copy.facts("index")
    assert facts["factory"] == "IVF4,Flat" and facts["project_index"].startswith(str(project))
    assert "is taken over" in shown and "recall vs exact" in shown
    found = codes_in(next((copy.path / "index").glob("shard-*")))
    assert len(found) == copy.facts("chunks")["database_chunks"]
    sizes = small.chunks[:, 3] - small.chunks[:, 2]
    full = {id: row for row, (_, id) in enumerate(restated_chunks(small)[0]) if id is not None and sizes[row] == C}
    ours = EmbeddingTable(copy).rows(np.arange(ChunkTable.open(copy).num_chunks)).astype(np.float32)
    assert found == {id: (vectors[full[id]] if id in full else ours[id]).tolist() for id in found}
    assert 50 < len(found.keys() & full.keys()) < len(found)
    assert copy.facts("neighbors")["project"] == work.facts("neighbors")["project"]
    WorkDir(copy.path, full=True).verify()


@pytest.mark.parametrize(
    ("factory", "change", "reason"),
    [
        ("RR32,IVF4,SQ8", lambda vectors: vectors, ""),
        ("IVF4,SQ8", lambda vectors: np.random.default_rng(0).permutation(vectors), "made with another embedder"),
        ("IVF4,Flat", lambda vectors: vectors[:, :16].copy(), "width 16, the embeddings 32"),
        ("Flat", lambda vectors: vectors, "no inverted lists"),
    ],
)
def test_an_index_is_taken_over_if_its_codes_are_the_embeddings(small, work, tmp_path, factory, change, reason):
    write_index(tmp_path, factory, change(vectors_of(small, work)))
    rows = np.array([-1 if id is None else id for _, id in restated_chunks(small)[0]])
    (path,) = tmp_path.glob("index/*/*/*")
    found = ProjectIndex(path, rows).why_not(EmbeddingTable(work), 32)
    assert reason in found and bool(reason) == bool(found)
    if "IVF" in factory:
        with pytest.raises(UserError, match=r"holds the row \d+, the database has 9 chunks"):
            ProjectIndex(path, rows[:9])
        index = faiss.read_index(str(path))
        lists = faiss.extract_index_ivf(index)
        lists.add_with_ids(np.zeros((1, lists.d), np.float32), np.array([-3]))
        faiss.write_index(index, str(path))
        with pytest.raises(UserError, match=r"holds the row -3, the database has"):
            ProjectIndex(path, rows)


# ------------------------------------------------------------------------------------------------ use and refusal


def test_a_model_trains_on_what_was_a_project(work, tmp_path):
    run_forked(
        "pretrain_retro.py", "--retro-work-dir", work.path, "--retro-add-retriever", "--retro-layers", "2",
        *"--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 64 --micro-batch-size 2".split(),
        *"--lr 1e-3 --train-iters 3 --eval-iters 1 --log-interval 1".split(), "--save", tmp_path / "save",
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()]
    assert sum("lm_loss" in line for line in lines) == 3


def remove(name):
    return lambda path: [file.unlink() for file in path.glob(name)]


def write(name, content):
    return lambda path: [file.write_bytes(content) for file in path.glob(name)]


def dataset(name, key, rows):
    def change(path):
        with h5py.File(min(path.glob(name)), "w") as file:
            file[key] = rows

    return change


def config(**values):
    def change(path):
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def index(factory):
    def change(path):
        (path / "index" / "faiss-par-add" / factory).mkdir(parents=True)
        (path / "index" / "faiss-par-add" / factory / "added_1.000_1.000.faissindex").write_bytes(b"IwFl")

    return change


DATABASE = "db/merged/train.hdf5"
REFUSED = [
    (remove("config.json"), "no file config.json"),
    (write("config.json", b"[1"), "is no RETRO project's"),
    (config(retro_gpt_seed=None), "is no RETRO project's"),
    (remove(DATABASE), r"train\.hdf5 cannot be read .*No such file"),
    (write(DATABASE, b"HDF"), r"train\.hdf5 cannot be read"),
    (dataset(DATABASE, "other", np.zeros((3, 5), np.uint32)), "no dataset 'chunks'"),
    (dataset(DATABASE, "chunks", np.zeros((3, 4), np.uint32)), "uint32 3 x 4, not integers any x 5"),
    (dataset(DATABASE, "chunks", np.zeros((3, 5), np.float32)), "float32 3 x 5, not integers"),
    (dataset(DATABASE, "chunks", np.zeros((0, 5), np.uint32)), "holds no chunk; finish its db-build"),
    (dataset("query/train*/*.hdf5", "neighbors", np.zeros((7, K), np.int64)), "int64 7 x 6, not integers 50 x any"),
    (remove("query/train*/*050-*.hdf5"), r"windows 0 … 49 without a gap, config\.json tells of 240"),
    (config(retro_gpt_train_samples=64), r"windows 0 … 239 without a gap, config\.json tells of 256"),
    (config(retro_gpt_vocab_file="tokenizer/none.json"), r"none\.json is not there; give it as --tokenizer-model"),
    (index("IVF4,Flat"), r"added_1\.000_1\.000\.faissindex is not a FAISS index"),
    (
        lambda path: [index(name)(path) for name in ("IVF4,Flat", "IVF8,Flat")],
        "has 2 indexes, .* give --retro-index-str",
    ),
    (remove("data/*sentence.idx"), "corpus books_text_sentence is not at .*; give --data-path"),
    (lambda path: shutil.rmtree(path / "db"), r"indexed_dataset_infos\.json cannot be read"),
    (lambda path: write_corpus(path / "data" / "books_text_sentence", [[[1, 2]]]), "has 1 documents, .* made from 14"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_is_no_project_is_refused_before_anything_is_written(small, tmp_path, change, message):
    project = shutil.copytree(small.path, tmp_path / "project")
    change(project)
    with pytest.raises(UserError, match=message) as refused:
        build(tmp_path / "work", "--retro-project-dir", str(project))
    assert "\n" not in str(refused.value) and not (tmp_path / "work").exists()


def test_a_refusal_ends_the_program_with_code_2(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    flags = ("--retro-project-dir", tmp_path, "--retro-work-dir", tmp_path / "work")
    shown = run_forked("tools/preprocess_retro_data.py", *flags, expect=2)
    assert len(shown.splitlines()) == 1 and "is no RETRO project's" in shown


def test_rows_of_other_corpora_and_databases_are_refused(small, work, tmp_path):
    table, project = ChunkTable.open(work), shutil.copytree(small.path, tmp_path / "project")
    places = Places.open(work, table)
    dataset(DATABASE, "chunks", np.array([[0, 0, 0, 5, 5], [0, 99, 0, 5, 5]]))(project)
    with pytest.raises(UserError, match=r"train\.hdf5 row 1 is corpus 0 sequence 99"):
        DatabaseRows(Project(project), places, C)
    config(retro_neighbor_dirs=None)(project)
    dataset(DATABASE, "chunks", small.chunks)(project)
    rows, counts = Reader(Project(project), places, table, OpenIndex.open(work).database).read()
    assert len(rows) == 0 and set(counts.values()) == {0}  # it was never queried
    project = shutil.copytree(small.path, tmp_path / "again")
    dataset(DATABASE, "chunks", small.chunks[:5])(project)
    with pytest.raises(UserError, match=r"row 0 holds the neighbor \d+, the database has 5 chunks"):
        Reader(Project(project), places, table, OpenIndex.open(work).database).read()
