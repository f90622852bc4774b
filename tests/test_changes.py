"""Documents added, removed and purged: equal to a build from scratch, atomic, and resumable."""

import json
import shutil

import numpy as np
import pytest
from conftest import build, stdlib_texts, write_jsonl
from launch import run_forked

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.errors import UserError
from megatron_retro.retrieval import changes
from megatron_retro.retrieval.blocks import plan
from megatron_retro.retrieval.corpora import open_tokenizer
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import Embedder, EmbeddingTable, chunk_texts
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.retrieval.ranking import check_neighbors
from megatron_retro.storage import save_npy
from megatron_retro.workdir import NEXT, WorkDir

TOOL = "tools/preprocess_retro_data.py"
FLAGS = ("--split", "1,0,0", "--retro-block-size", "100")
REMOVED = (3, 4, 17, 29)


@pytest.fixture(scope="module")
def texts():
    return stdlib_texts(40)


@pytest.fixture(scope="module")
def first(tmp_path_factory, texts, tiny_embedder):
    """A work dir of corpus `first`: 30 documents."""
    directory = tmp_path_factory.mktemp("first")
    flags = ("--input", str(write_jsonl(directory / "first.jsonl", texts[:30])), "--retro-embedder", tiny_embedder)
    build(directory / "work", *flags, *FLAGS)
    return directory / "work"


@pytest.fixture
def work(first, tmp_path):
    return shutil.copytree(first, tmp_path / "work")


def scratch_build(path, corpora, source, from_scratch):
    """A build from scratch with the tokenizer of `source` and, chunk by chunk, its embeddings.

    How a text is rounded depends on the texts beside it, so embeddings are taken over: rows `from_scratch` of `source`.
    """
    inputs = [str(write_jsonl(path.parent / f"{name}.jsonl", texts)) for name, texts in corpora.items()]
    model = str(WorkDir(source).path / "tokenizer" / "tokenizer.model")
    build(path, "--input", *inputs, "--tokenizer-model", model, *FLAGS, "--retro-tasks", "tokenize,db-build")
    scratch, stored = WorkDir(path), EmbeddingTable(WorkDir(source))
    for name in ("retro_embedder", "embedder_dtype"):
        scratch.settings[name] = WorkDir(source).settings[name]
    scratch.write()
    for block in plan(scratch, 100):
        save_npy(block.path(scratch, "embeddings"), stored.rows(from_scratch[block.ids]))
        scratch.unfinished("embeddings").note(block.path(scratch, "embeddings"))
    build(path, *FLAGS)
    return WorkDir(path)


def saved(work):
    table = NeighborTable(work)
    chunks = np.arange(work.facts("chunks")["chunks"])
    return table.ids(chunks), table.distances(chunks)


def remove(work, documents, corpus="first"):
    file = work.parent / "gone.txt"
    file.write_text("".join(f"{corpus}:{number}\n" for number in documents))
    build(work, "--retro-tasks", "remove-documents", "--document-ids", str(file))


def without_neighbors(path):
    """A work dir as it was before its query."""
    work = WorkDir(path)
    for name in work.manifest["stages"].pop("neighbors")["files"]:
        (path / name).unlink()
    if work.settings["retro_retriever"] == "dense":
        del work.settings["retro_retriever"]
    for place in sorted(path.rglob("bm25.*"), reverse=True):
        shutil.rmtree(place)
    work.write()
    return path


def snapshot(work):
    return {str(file.relative_to(work)): file.read_bytes() for file in work.rglob("*") if file.is_file()}


def written(work):
    """When each file was written."""
    return {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.is_file()}


# ------------------------------------------------------------------------------------------------ add


def test_added_documents_equal_a_build_from_scratch(work, texts, tmp_path):
    """On two ranks; only the new chunks are embedded."""
    old = {**written(work / "embeddings"), **written(work / "index")}
    more = write_jsonl(tmp_path / "second.jsonl", texts[30:])
    run_forked(TOOL, "--retro-work-dir", work, "--retro-tasks", "add-documents", "--input", more, ranks=2)
    assert written(work).items() >= old.items()
    after = WorkDir(work)
    after.verify()
    every = np.arange(after.facts("chunks")["chunks"])
    scratch = scratch_build(tmp_path / "scratch", {"first": texts[:30], "second": texts[30:]}, work, every)
    for ours, theirs in zip(saved(after), saved(scratch), strict=True):
        assert np.array_equal(ours, theirs)
    first_new = ChunkTable.open(after).first_chunk[30]
    ids, _ = saved(after)
    assert (ids[:first_new] >= first_new).any() and (ids[first_new:] < first_new).any()
    assert after.settings["history"][0]["task"] == "add-documents" and not (work / NEXT).exists()
    before = written(work)
    build(work, "--retro-tasks", "add-documents", "--input", str(more))  # a second time: nothing to do
    assert written(work) == before


# ------------------------------------------------------------------------------------------------ remove, compact


def test_removed_documents_equal_a_build_without_them(work, texts, tmp_path):
    before = ChunkTable.open(WorkDir(work))
    remove(work, REMOVED)
    after = WorkDir(work)
    after.verify()
    table = ChunkTable.open(after)
    kept = np.setdiff1d(np.arange(30), REMOVED)
    from_scratch = before.chunks_of(kept)  # chunk ids of a build without the removed documents -> ids here
    scratch = scratch_build(tmp_path / "scratch", {"first": [texts[number] for number in kept]}, work, from_scratch)
    (ids, distances), (wanted_ids, wanted_distances) = saved(after), saved(scratch)
    assert np.array_equal(distances[from_scratch], wanted_distances)
    assert np.array_equal(ids[from_scratch], np.where(wanted_ids < 0, -1, from_scratch[np.maximum(wanted_ids, 0)]))
    gone = table.chunks_of(np.array(REMOVED))
    assert not np.isin(ids, gone).any() and (ids[gone] == -1).all()
    assert not np.isin(REMOVED, table.documents_in("train", (1, 0, 0))).any()

    build(work, "--retro-tasks", "compact")
    compacted = WorkDir(work)
    compacted.verify()
    assert compacted.facts("chunks")["documents"] == 30  # their numbers stay
    for ours, theirs in zip(saved(compacted), (wanted_ids, wanted_distances), strict=True):
        assert np.array_equal(ours, theirs)
    stored = EmbeddingTable(compacted)
    assert np.array_equal(stored.rows(np.arange(len(stored))), EmbeddingTable(scratch).rows(np.arange(len(stored))))
    tokens = (work / "corpus" / "first.2.bin").read_bytes()
    assert tokens == (tmp_path / "scratch" / "corpus" / "first.bin").read_bytes()
    named = {name for record in compacted.manifest["stages"].values() for name in record["files"]}
    there = {name for name in snapshot(work) if not name.startswith(("report/", "manifest.", ".lock"))}
    assert there == named
    before = written(work)
    save_npy(work / "neighbors" / "first" / "0-100.ids.npy", np.arange(3))  # as left by a crash while it removes files
    build(work, "--retro-tasks", "compact")
    assert WorkDir(work).settings["generation"] == 2 and written(work) == before


def test_an_approximate_index_forgets_too(first, texts, tmp_path):
    work = without_neighbors(shutil.copytree(first, tmp_path / "work"))
    manifest = WorkDir(work)
    shutil.rmtree(work / "index")
    del manifest.manifest["stages"]["index"]
    for name in ("retro_index_str", "index_factory", "index_shards", "tuned", "retro_target_recall"):
        del manifest.settings[name]
    manifest.write()
    build(work, "--retro-index-str", "IVF8,SQ8", "--retro-target-recall", "0.9")
    remove(work, REMOVED)
    build(work, "--retro-tasks", "add-documents", "--input", str(write_jsonl(tmp_path / "b.jsonl", texts[30:])))
    for _ in range(2):
        after = WorkDir(work)
        table = ChunkTable.open(after)
        chunks = table.chunks_of(np.setdiff1d(np.arange(40), REMOVED))
        ids, distances = (rows[chunks] for rows in saved(after))
        check_neighbors(ids, distances, table.document_chunks(chunks), Database.open(table, (1, 0, 0)))
        assert json.loads((work / "report" / "summary.json").read_text())["recall"]["2"] > 0.85
        build(work, "--retro-tasks", "compact")


@pytest.mark.parametrize("kind", ["bm25", "hybrid"])
def test_a_database_found_by_words_changes_too(kind, first, texts, tmp_path):
    """Words weigh otherwise in another database, so all neighbors are those of a query from scratch."""
    work = without_neighbors(shutil.copytree(first, tmp_path / "work"))
    run_forked(TOOL, "--retro-work-dir", work, "--retro-retriever", kind, ranks=2)
    assert json.loads((work / "report" / "summary.json").read_text())["retriever"] == kind
    ids, _ = saved(WorkDir(work))
    dense, _ = saved(WorkDir(first))
    assert ids.shape == dense.shape and (ids[:, 0] != dense[:, 0]).mean() > 0.1
    remove(work, REMOVED)
    build(work, "--retro-tasks", "add-documents", "--input", str(write_jsonl(tmp_path / "b.jsonl", texts[30:])))
    for compacted in (False, True):
        after = WorkDir(work)
        after.verify()
        table = ChunkTable.open(after)
        chunks = table.chunks_of(np.setdiff1d(np.arange(40), REMOVED))
        (ids, distances), members = saved(after), Database.open(table, (1, 0, 0))
        check_neighbors(ids[chunks], distances[chunks], table.document_chunks(chunks), members, kind == "hybrid")
        assert (ids[chunks] >= table.first_chunk[30]).any(), "what was added is found"
        again = without_neighbors(shutil.copytree(work, tmp_path / f"again{compacted}"))
        build(again)
        for ours, theirs in zip(saved(WorkDir(again)), (ids, distances), strict=True):
            assert np.array_equal(ours, theirs)
        build(work, "--retro-tasks", "compact")
    named = {name for record in after.manifest["stages"].values() for name in record["files"]}
    assert {name for name in snapshot(work) if not name.startswith(("report/", "manifest.", ".lock"))} == named


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("place", ["query", "_publish", "_keep"])
def test_an_interrupted_change_leaves_the_old_state_and_goes_on(work, place, monkeypatch):
    before = snapshot(work)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(changes, place, fail)
        remove(work, REMOVED)
    now = snapshot(work)
    assert {name: now[name] for name in before if name != "report/costs.json"}.items() <= before.items()
    WorkDir(work).verify()
    with pytest.raises(UserError, match=r"--retro-tasks compact: an unfinished remove-documents waits"):
        build(work, "--retro-tasks", "compact")
    remove(work, REMOVED)
    assert WorkDir(work).facts("chunks")["removed_documents"] == 4
    WorkDir(work).verify()


# ------------------------------------------------------------------------------------------------ refusals


def test_refused_changes_write_nothing(work, texts, tmp_path):
    before = snapshot(work)
    ids = tmp_path / "ids.txt"
    for line in ("first:30", "second:0", "17", "first:-1", "first:x"):
        ids.write_text(f"first:1\n{line}\n")
        with pytest.raises(UserError, match=rf"{ids}:2: no document '{line}'; there are first:0 … first:29"):
            build(work, "--retro-tasks", "remove-documents", "--document-ids", str(ids))
    other = write_jsonl(tmp_path / "first.jsonl", texts[35:])
    for arguments, message in (
        (("remove-documents",), "needs --document-ids"),
        (("remove-documents", "--document-ids", "/nowhere"), "--document-ids /nowhere cannot be read"),
        (("add-documents",), "needs --input"),
        (("add-documents", "--input", str(other)), r"would be corpus 'first', .* rename the file"),
        (("add-documents,embed",), "--retro-tasks names 'add-documents'"),
        (("build", "--document-ids", str(ids)), "--document-ids goes with --retro-tasks remove-documents"),
    ):
        with pytest.raises(UserError, match=message):
            build(work, "--retro-tasks", *arguments)
    assert snapshot(work) == before
    ids.write_text("".join(f"first:{number}\n" for number in range(30)))
    with pytest.raises(UserError, match=r"leaves no document of 30 for train \(30 are removed\)"):
        build(work, "--retro-tasks", "remove-documents", "--document-ids", str(ids))
    with pytest.raises(UserError, match="the stage 'neighbors' is not finished"):
        build(tmp_path / "new", "--retro-tasks", "compact")


def test_a_dropped_change_leaves_nothing_behind(work, texts, tmp_path, monkeypatch):
    """Its files are as complete as the next change's would be, and wrong."""
    more = tmp_path / "more.jsonl"

    def interrupted(*flags):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(changes, "_publish", stop)
            build(work, *map(str, flags))
        (work / NEXT).unlink()

    def stop(_):
        raise KeyboardInterrupt

    ids = tmp_path / "ids.txt"
    ids.write_text("first:3\n")
    interrupted("--retro-tasks", "remove-documents", "--document-ids", ids)
    write_jsonl(more, [texts[30]])
    interrupted("--retro-tasks", "add-documents", "--input", more)
    words = " ".join(f"word{number}" for number in range(40))
    write_jsonl(more, [words + texts[30][len(words) :]])
    build(work, "--retro-tasks", "add-documents", "--input", str(more))
    remove(work, [5, 7])
    after = WorkDir(work)
    table, (found, _) = ChunkTable.open(after), saved(after)
    assert not np.isin(table.document(found[found >= 0]), [5, 7]).any()
    assert (found[table.first_chunk[5] : table.first_chunk[6]] == -1).all()
    assert np.isin(3, table.document(found[found >= 0])), "its removal was dropped"
    fresh = scratch_build_embeddings(after, table.first_chunk[30])
    assert np.abs(EmbeddingTable(after).rows(table.first_chunk[30:31])[0].astype(np.float32) - fresh).max() < 0.02


def scratch_build_embeddings(work, chunk):
    embedder = Embedder(work.facts("embeddings")["embedder"], "float32", 1)
    texts = chunk_texts(ChunkTable.open(work), np.array([chunk]), open_tokenizer(work))
    return embedder.embed(embedder.encode(texts))[0].astype(np.float32)


def test_a_refused_change_does_not_stand_in_the_way(work, texts, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    with pytest.raises(UserError, match=r"was made; the first one has the keys body, rename one of them to 'text', or"):
        build(work, "--retro-tasks", "add-documents", "--input", str(tmp_path / "bad.jsonl"))
    assert not (work / NEXT).exists()
    build(work, "--retro-tasks", "add-documents", "--input", str(write_jsonl(tmp_path / "good.jsonl", texts[30:32])))
    assert WorkDir(work).facts("chunks")["documents"] == 32


def test_what_a_crash_left_behind_an_end_is_removed(work, texts, tmp_path):
    """Killed after the change took effect, before its parts and notes were gone: asked again, it finishes that."""
    more = write_jsonl(tmp_path / "second.jsonl", texts[30:32])
    build(work, "--retro-tasks", "add-documents", "--input", str(more))
    before = snapshot(work)
    (work / "corpus" / "second.parts").mkdir()
    (work / "unfinished").mkdir()
    (work / "unfinished" / "neighbors.0.jsonl").touch()
    build(work, "--retro-tasks", "add-documents", "--input", str(more))
    assert snapshot(work) == before
    assert not (work / "corpus" / "second.parts").exists() and not (work / "unfinished").exists()


def test_what_was_set_aside_is_never_superseded(work):
    place = WorkDir(work).directory("embeddings") / "first"
    for name in ("0-100.npy.damaged", "0-100.npy.damaged2", "9-10.npy"):
        (place / name).touch()
    assert changes._obsolete(WorkDir(work)) == [place / "9-10.npy"]
