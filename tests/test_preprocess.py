"""The whole pipeline: any number of ranks, interrupted and continued, refused with both values, from every input."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import faiss
import numpy as np
import pytest
from conftest import SMALL, build, stdlib_texts, unfinish, write_jsonl
from launch import run_forked

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.data.tokenize import count_parts, merge_parts, token_dtype
from megatron_retro.errors import UserError
from megatron_retro.retrieval import corpora, costs, embedding
from megatron_retro.retrieval.index import Shards, write_index
from megatron_retro.retrieval.index_search import IndexSearch
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.retrieval.query import OpenIndex
from megatron_retro.workdir import STAGES, WorkDir

TOOL = pathlib.Path(__file__).parent.parent / "tools" / "preprocess_retro_data.py"
TOKENS_ONLY = ("--retro-tasks", "tokenize,db-build")


def arrays(work, *kinds):
    """Content of every file of some kinds, by relative path."""
    files = [file for kind in kinds for file in sorted((work / kind).rglob("*")) if file.is_file()]
    return {str(file.relative_to(work)): file.read_bytes() for file in files}


def copy_without(small_work, path, *stages):
    """A copy of the small work dir in which the last stages are not finished."""
    return unfinish(WorkDir(shutil.copytree(small_work, path)), *stages)


# ------------------------------------------------------------------------------------------------ ranks


def test_three_ranks_build_what_one_builds(small_input, tiny_embedder, tmp_path):
    """Byte for byte; only the report has figures of the run."""
    flags = ("--input", str(small_input), *SMALL, "--retro-embedder", tiny_embedder)
    for name in ("one", "three"):
        begun = WorkDir(tmp_path / name)
        begun.settings["embedder_dtype"] = "float32"  # measured, it may differ by load
        begun.write()
    build(tmp_path / "one", *flags)
    shown = run_forked(TOOL, "--retro-work-dir", begun.path, *flags, ranks=3)
    ours, theirs = (
        {name: content for name, content in arrays(work, ".").items() if not name.startswith("report/")}
        for work in (begun.path, tmp_path / "one")
    )
    assert list(ours) == list(theirs) and len(ours) > 15
    assert [name for name in ours if ours[name] != theirs[name]] == []
    WorkDir(begun.path).verify()
    assert "recall vs exact      @2 1.0000, @10 1.0000" in shown


def test_ranks_share_out_the_blocks_of_documents(tmp_path, monkeypatch):
    """Ranks one after the other in this process: together they write the parts that one alone writes."""
    file = write_jsonl(tmp_path / "many.jsonl", [f"document {number} of many" for number in range(2300)])
    build(tmp_path / "one", "--input", str(file), *TOKENS_ONLY, "--vocab-size", "400")
    work, source = WorkDir(tmp_path / "one"), WorkDir(tmp_path / "one").settings["sources"][0]
    tokenizer, written = corpora.open_tokenizer(work), []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts = corpora._write_parts(work, source, tokenizer, work.unfinished("corpus"), strict=False)
        written.append([part.with_suffix(".json").exists() for part in parts])
    assert written == [[True, False, False], [True, True, False], [True, True, True]]
    merge_parts(parts, tmp_path / "three", token_dtype(tokenizer.vocab_size))
    assert count_parts(parts)["documents"] == 2300
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"three{ending}").read_bytes() == (work.path / "corpus" / f"many{ending}").read_bytes()


# ------------------------------------------------------------------------------------------------ interruptions


def test_a_finished_build_is_skipped_without_loading_libraries(small_work):
    before = arrays(small_work, ".")
    program = f"""
import sys
sys.path.insert(0, {str(TOOL.parent)!r})
sys.argv[1:] = ["--retro-work-dir", {str(small_work)!r}]
import preprocess_retro_data
preprocess_retro_data.main()
print(sorted({{"torch", "faiss", "megatron", "sentencepiece", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    assert "nothing to do" in done.stderr
    assert arrays(small_work, ".") == before


def test_an_interrupted_build_goes_on_and_ends_alike(small_work, tmp_path, monkeypatch, capfd):
    work = copy_without(small_work, tmp_path / "work", "embeddings", "index", "neighbors")
    shutil.rmtree(work.path / "index")
    files = {file.name: file for file in (work.path / "embeddings" / "my_text_data").iterdir()}
    for name in ("100-200.npy", "200-300.npy"):
        files[name].unlink()
    files["0-100.npy"].write_bytes(files["0-100.npy"].read_bytes()[:5000])  # a damaged disk
    kept = files["300-400.npy"].stat().st_mtime_ns
    for file in (work.path / "neighbors" / "my_text_data").glob("1*"):
        file.unlink()

    made, embed = [], embedding.Embedder.embed

    def fail_at_the_third(self, encoded, advance=lambda num_texts: None):
        made.append(len(encoded))
        if len(made) == 3:
            raise KeyboardInterrupt
        return embed(self, encoded, advance)

    monkeypatch.setattr(embedding.Embedder, "embed", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build(work.path)
    build(work.path)
    assert made == [100, 100, 100, 100]  # two, the one that failed, and that one again
    assert files["300-400.npy"].stat().st_mtime_ns == kept
    files["0-100.npy"].with_name("0-100.npy.damaged").unlink()
    assert re.search(r"0-100.npy was \S+ .* is now 5000:\S+ moved to 0-100.npy.damaged", capfd.readouterr().err)
    kinds = ("corpus", "chunks", "embeddings", "index", "neighbors")
    assert arrays(work.path, *kinds) == arrays(small_work, *kinds)


def test_an_interrupted_index_keeps_its_number_of_shards(small_work, tmp_path):
    work = copy_without(small_work, tmp_path / "work", "index", "neighbors")
    ((_, num_chunks),) = work.settings["index_shards"]
    work.settings["index_shards"] = [[0, 300], [300, num_chunks]]  # as two ranks would have planned
    work.write()
    (work.path / "index" / f"shard-0-{num_chunks}.faiss").unlink()
    build(work.path)
    assert WorkDir(work.path).facts("index")["shards"] == [[0, 300], [300, num_chunks]]
    assert arrays(work.path, "neighbors") == arrays(small_work, "neighbors")


@pytest.mark.parametrize("task", ["db-build", "embed", "index-train", "index-add", "query-neighbors"])
def test_a_task_before_the_first_one_is_refused(small_input, tmp_path, task):
    with pytest.raises(UserError, match=r"the stage 'corpus' is not finished"):
        build(tmp_path / "work", "--retro-tasks", task, "--input", str(small_input))
    assert not (tmp_path / "work").exists()


def test_tasks_can_be_run_one_by_one(small_input, small_work, tmp_path):
    work = copy_without(small_work, tmp_path / "work", "index", "neighbors")
    shutil.rmtree(work.path / "index")
    for name in ("retro_index_str", "index_factory", "index_shards", "retro_index_nprobe", "tuned"):
        del work.settings[name]
    work.write()
    with pytest.raises(UserError, match=r"index-train comes first"):
        build(work.path, "--retro-tasks", "index-add")
    with pytest.raises(UserError, match="'index'"):
        build(work.path, "--retro-tasks", "query-neighbors")
    with pytest.raises(UserError, match="--retro-index-str Nonsense: FAISS cannot make it"):
        build(work.path, "--retro-tasks", "index-train", "--retro-index-str", "Nonsense")
    build(work.path, "--retro-tasks", "index-train", "--retro-index-str", "IVF8,Flat")  # the refused one left no trace
    build(work.path, "--retro-tasks", "index-add")
    shutil.rmtree(work.path / "neighbors")
    build(work.path, "--retro-tasks", "query-neighbors", "--retro-index-nprobe", "8")
    assert arrays(work.path, "neighbors") == arrays(small_work, "neighbors")
    report = json.loads((work.path / "report" / "summary.json").read_text())
    assert report["recall"] == {"2": 1.0, "10": 1.0} and report["share_with_fewer_neighbors"] == 0


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--retro-chunk-length", "32"), "--retro-chunk-length is 32, .* was made with 64"),
        (("--split", "90,5,5"), "--split is 90,5,5, .* was made with 80,10,10"),
        (("--vocab-size", "2000"), "--vocab-size is 2000, .* was made with 1000"),
        (("--retro-embedder", "other"), "--retro-embedder is other, .* was made with all-MiniLM-L6-v2"),
        (("--retro-query-num-neighbors-save", "3"), "save is 3, .* was made with 10"),
        (("--data-path", "/data/other"), r"is /data/other .* was made from .*my_text_data.jsonl"),
    ],
)
def test_another_value_than_the_work_dirs_is_refused(small_work, arguments, message):
    with pytest.raises(UserError, match=message):
        build(small_work, *arguments)


def test_another_input_or_tokenizer_is_refused(small_work, small_input, tmp_path):
    build(small_work, "--input", str(small_input), *SMALL)
    changed = write_jsonl(tmp_path / "my_text_data.jsonl", stdlib_texts(3))
    with pytest.raises(UserError, match=rf"is {changed} \(1 files:\w+.* was made from {small_input} \(1 files:\w+"):
        build(small_work, "--input", str(changed))
    with pytest.raises(UserError, match=r"--tokenizer-model .* was made with trained on the documents"):
        build(small_work, "--tokenizer-model", str(small_work / "tokenizer" / "tokenizer.model"))


def test_damaged_files_are_made_again(small_work, tmp_path):
    """One of every stage: set aside, made again to the byte, and nothing else is touched."""
    work = WorkDir(shutil.copytree(small_work, tmp_path / "work"))
    names = [next(iter(work.manifest["stages"][stage]["files"])) for stage in STAGES]
    for name in names:
        content = bytearray((work.path / name).read_bytes())
        content[len(content) // 2] ^= 4
        (work.path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"file {names[0]} was \S+ .* --verify-data full makes it again"):
        work.verify()
    untouched = {file: file.stat().st_mtime_ns for file in (work.path / "embeddings").rglob("*.npy")}
    build(work.path)
    for name in names:
        aside = (work.path / name).with_name(f"{pathlib.Path(name).name}.damaged")
        assert aside.exists(), name
        aside.unlink()
    ours, theirs = arrays(work.path, "."), arrays(small_work, ".")
    assert [name for name in theirs if ours[name] != theirs[name] and not name.startswith("report/")] == []
    assert set(ours) == set(theirs)
    assert sum(file.stat().st_mtime_ns != time for file, time in untouched.items()) == 1


def test_what_cannot_be_made_again_is_refused(small_work, tmp_path):
    """The documents are others now: the tokens made of them would not be those of the index and the neighbors."""
    texts = stdlib_texts(40)
    file = write_jsonl(tmp_path / "my_text_data.jsonl", texts)
    build(tmp_path / "work", "--input", str(file), *SMALL, *TOKENS_ONLY)
    tokens = tmp_path / "work" / "corpus" / "my_text_data.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    write_jsonl(file, [text.swapcase() for text in texts])  # as many bytes
    with pytest.raises(UserError, match=r"corpus/my_text_data.bin was \S+ and is \S+ when made again; restore it"):
        build(tmp_path / "work")
    assert "corpus" not in WorkDir(tmp_path / "work").manifest["stages"]


def test_an_index_of_another_width_is_refused(small_work, tmp_path):
    import faiss

    work = copy_without(small_work, tmp_path / "work", "index", "neighbors")
    faiss.write_index(faiss.IndexFlatL2(8), str(work.path / "index" / "trained.faiss"))
    work.unfinished("index").note(work.path / "index" / "trained.faiss")
    with pytest.raises(UserError, match=r"width 8, .* width 384"):
        build(work.path, "--retro-tasks", "index-add")


def test_user_errors_are_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, str(TOOL), "--retro-work-dir", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 2
    assert done.stderr.startswith("preprocess_retro_data.py: error: --input or --data-path is needed")
    assert len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ inputs


def test_bad_records_are_counted_or_refused(tmp_path):
    file = tmp_path / "mixed.jsonl"
    good = "".join(json.dumps({"text": text}) + "\n" for text in stdlib_texts(4))
    file.write_bytes(good.encode() + b'{"text": "\xff"}\n{"text": \n{"text": ""}\n{"text": "\xfe"}\n')
    build(tmp_path / "work", "--input", str(file), *TOKENS_ONLY, "--vocab-size", "500")
    (corpus,) = WorkDir(tmp_path / "work").facts("corpus")["corpora"]
    assert corpus["documents"] == 4
    assert corpus["skipped"] == {"broken JSON": 1, "empty text": 1, "invalid UTF-8": 2}
    with pytest.raises(UserError, match=rf"--strict: {file}:5: invalid UTF-8"):
        build(tmp_path / "strict", "--input", str(file), *TOKENS_ONLY, "--vocab-size", "500", "--strict")
    assert not WorkDir(tmp_path / "strict").has("corpus")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--retro-index-str", "IVF16,Nonsense"),
            r"--retro-index-str IVF16,Nonsense: FAISS cannot make it .* width 384",
        ),
        (("--retro-index-str", "PQ7"), r"--retro-index-str PQ7: FAISS cannot make it .* width 384"),
        (("--retro-target-recall", "0"), "--retro-target-recall is 0; it lies above 0 and up to 1"),
        (("--retro-target-recall", "1.01"), "--retro-target-recall is 1.01"),
        (("--retro-index-memory-gb", "-1"), "--retro-index-memory-gb is -1; it must be above 0"),
        (("--retro-retriever", "sparse"), "--retro-retriever is 'sparse'; it takes dense, bm25, hybrid"),
        (("--retro-embedder", "/proc"), "--retro-embedder /proc is no checkpoint's directory"),
        (("--retro-embedder", "./nothing"), "--retro-embedder ./nothing is no checkpoint's directory"),
        (("--json-key", "body"), "--json-key body .40 no key 'body'.; the first one has the keys text, give"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(small_input, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path / "work", "--input", str(small_input), *arguments)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "config", [{}, {"hidden_size": 384}, {"model_type": "nonsense", "hidden_size": 384}, {"hidden_size": 100}]
)
def test_an_embedder_that_cannot_be_loaded_is_refused_before_anything_is_written(small_input, tmp_path, config):
    """The last one has the rest of a good checkpoint, whose heads do not divide its width any more."""
    checkpoint = tmp_path / "checkpoint"
    if config == {"hidden_size": 100}:
        shutil.copytree(embedding.resolve("all-MiniLM-L6-v2")[0], checkpoint)
        config = json.loads((checkpoint / "config.json").read_text()) | config
        (checkpoint / "config.json").unlink()
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"--retro-embedder {checkpoint} cannot be loaded"):
        build(tmp_path / "work", "--input", str(small_input), "--retro-embedder", str(checkpoint))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--retro-index-str", "IVF4096,Flat"),
            r"IVF4096,Flat has 4096 lists, more than the \d+ chunks of the database",
        ),
        (("--retro-index-str", "OPQ16,IVF999_HNSW32,RaBitQ"), "has 999 lists, more than"),
        (("--retro-index-memory-gb", "1e-6"), r"--retro-index-memory-gb 1e-06 holds no index of \d+ chunks"),
    ],
)
def test_an_index_that_the_database_does_not_fit_is_refused_before_embedding(small_work, tmp_path, flags, message):
    """Both where the chunks are counted in this run and where an earlier one did."""
    later = ("embeddings", "index", "neighbors")
    for name, stages in (("counting", ("chunks", *later)), ("counted", later)):
        work = copy_without(small_work, tmp_path / name, *stages)
        for place in later:
            shutil.rmtree(work.path / place)
        for setting in ("retro_index_str", "retro_index_memory_gb", "index_factory", "index_shards", "tuned"):
            del work.settings[setting]
        work.write()
        with pytest.raises(UserError, match=message):
            build(work.path, *flags)
        assert not (work.path / "embeddings").exists() and WorkDir(work.path).has("chunks")


def test_an_index_that_must_be_tuned(small_work, tmp_path):
    """The fewest probes, told, written down, and enough; a graph's efSearch likewise."""
    for factory, name in (("IVF16,RaBitQ", "nprobe"), ("HNSW16,SQ4", "ef_search")):
        work = copy_without(small_work, tmp_path / factory[:3], "index", "neighbors")
        shutil.rmtree(work.path / "index")
        shutil.rmtree(work.path / "neighbors")
        for setting in ("retro_index_str", "index_factory", "index_shards", "retro_target_recall", "tuned"):
            del work.settings[setting]
        work.write()
        build(work.path, "--retro-index-str", factory, "--retro-target-recall", "0.8")
        settings = WorkDir(work.path).settings
        assert settings["tuned"]["recall"] >= 0.8 and settings["tuned"][name] >= 1
        measured = costs.read(work)["measured"]
        assert measured["recall"]["2"] > 0.75 and measured["ms_per_query"] > 0
        assert measured["bytes_per_vector"] == WorkDir(work.path).facts("index")["bytes_per_vector"] > 48


def test_a_target_that_no_setting_reaches_is_told(small_work, tmp_path, monkeypatch, capsys):
    from megatron_retro.retrieval import tuning

    monkeypatch.setattr(tuning, "_MOST_PROBES", 2)
    work = copy_without(small_work, tmp_path / "work", "index", "neighbors")
    shutil.rmtree(work.path / "index")
    shutil.rmtree(work.path / "neighbors")
    for setting in ("retro_index_str", "index_factory", "index_shards", "retro_target_recall", "tuned"):
        del work.settings[setting]
    work.write()
    build(work.path, "--retro-index-str", "IVF16,Flat", "--retro-target-recall", "0.99")
    assert "--retro-target-recall 0.99 cannot be met with IVF16,Flat; " in capsys.readouterr().err


def test_several_corpora_and_megatron_data_used_in_place(small_work, tmp_path):
    """A dataset with two sequences a document is one run of tokens a document, and is not copied."""
    from test_chunks import write_dataset

    generator = np.random.default_rng(0)
    documents = [[generator.integers(3, 900, size) for size in (70, 50)] for _ in range(4)]
    prefix = write_dataset(tmp_path / "given", documents)
    texts = write_jsonl(tmp_path / "mine.jsonl", stdlib_texts(2))
    model = str(small_work / "tokenizer" / "tokenizer.model")
    arguments = ("--input", str(texts), "--data-path", "0.5", prefix, "--tokenizer-model", model, *TOKENS_ONLY)
    build(tmp_path / "work", *arguments)
    work = WorkDir(tmp_path / "work")
    mine, given = work.facts("corpus")["corpora"]
    assert (mine["name"], mine["prefix"], given["name"], given["prefix"]) == ("mine", "corpus/mine", "given", prefix)
    assert (given["documents"], given["tokens"], given["weight"]) == (4, 480, 0.5)
    assert not list((work.path / "corpus").glob("given*"))
    table = ChunkTable.open(work)
    first = int(table.corpus_chunks[1])
    rows, lengths = table.tokens(np.array([first, first + 1]), 64, 0)
    whole = np.concatenate(documents[0])
    assert lengths.tolist() == [64, 56] and rows[0].tolist() == whole[:64].tolist()
    assert rows[1, :56].tolist() == whole[64:].tolist()
    with open(f"{prefix}.bin", "r+b") as file:
        file.write(b"\1\0\1\0")
    with pytest.raises(UserError, match=rf"file {prefix}.bin was .* restore it from a backup"):
        work.verify(("corpus",))


def test_megatron_data_needs_its_own_tokenizer(small_work, tmp_path):
    from test_chunks import write_dataset

    prefix = write_dataset(tmp_path / "given", [[np.array([5, 4000])]])
    model = str(small_work / "tokenizer" / "tokenizer.model")
    with pytest.raises(UserError, match="--data-path needs --tokenizer-model"):
        build(tmp_path / "a", "--data-path", prefix)
    with pytest.raises(UserError, match="token id 4000, --tokenizer-model has 1000 ids"):
        build(tmp_path / "b", "--data-path", prefix, "--tokenizer-model", model)
    build(tmp_path / "b", "--input", str(write_jsonl(tmp_path / "x.jsonl", ["x"])), *TOKENS_ONLY, "--vocab-size", "270")
    with pytest.raises(UserError, match=r"no file .*none\.bin"):
        build(tmp_path / "c", "--data-path", str(tmp_path / "none"), "--tokenizer-model", model)
    for values in (("1", prefix, "2"), ("0", prefix)):
        with pytest.raises(UserError, match="every prefix needs a weight above 0"):
            build(tmp_path / "d", "--data-path", *values, "--tokenizer-model", model)


def test_one_document_alone_has_no_neighbors(tmp_path):
    file = write_jsonl(tmp_path / "one.jsonl", [stdlib_texts(1)[0][:700]])
    build(tmp_path / "work", "--input", str(file), "--vocab-size", "400", "--split", "1,0,0")
    table = NeighborTable(WorkDir(tmp_path / "work"))
    num_chunks = WorkDir(tmp_path / "work").facts("chunks")["chunks"]
    assert num_chunks > 2 and (table.ids(np.arange(num_chunks)) == -1).all()
    assert np.isinf(table.distances(np.arange(num_chunks))).all()
    report = json.loads((tmp_path / "work" / "report" / "summary.json").read_text())
    assert report["share_with_fewer_neighbors"] == 1


def test_a_corpus_without_text_or_without_train_documents_is_refused(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(UserError, match=r"no document has text under --json-key text \(2 empty text\)"):
        build(tmp_path / "empty", "--input", str(file))
    with pytest.raises(
        UserError, match=r"under --json-key content \(2 no key 'content'\); the first one has the keys text,"
    ):
        build(tmp_path / "empty", "--input", str(file), "--json-key", "content")
    assert not (tmp_path / "empty").exists()
    write_jsonl(file, ["a few words in one document"])
    with pytest.raises(UserError, match=r"--split 0\.001,1\.0,0\.0 leaves no document of 1 for train"):
        build(tmp_path / "split", "--input", str(file), "--vocab-size", "400", "--split", "0.001,1,0")


def test_an_unwritable_work_dir_is_one_line(small_input):
    with pytest.raises(UserError, match="--retro-work-dir /proc/nowhere cannot be written to"):
        build(pathlib.Path("/proc/nowhere"), "--input", str(small_input), *SMALL)


def empty_shard_first(index, directory):
    """The index's shards behind one whose blocks hold no chunk of the database."""
    (path,) = index.shards().paths
    width = index.embeddings.rows(np.zeros(1, np.int64)).shape[1]
    write_index(directory / "empty.faiss", faiss.IndexIDMap2(faiss.IndexFlatL2(width)))
    return Shards([directory / "empty.faiss", path], width, keep_open=True)


def test_an_excluded_corpus_is_trained_on_and_never_retrieved(tiny_embedder, tmp_path):
    texts = stdlib_texts(24)
    inputs = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", part)) for name, part in (("a", texts[:12]), ("b", texts[12:]))
    ]
    flags = ("--input", *inputs, "--vocab-size", "1000", "--split", "90,10,0", "--retro-embedder", tiny_embedder)
    with pytest.raises(UserError, match="--retro-exclude-corpora: the work dir has no corpus 'c'; it has a, b"):
        build(tmp_path / "work", *flags, "--retro-exclude-corpora", "c")
    build(tmp_path / "work", *flags, "--retro-exclude-corpora", "b")
    work = WorkDir(tmp_path / "work")
    table, neighbors = ChunkTable.open(work), NeighborTable(work)
    ids = neighbors.ids(np.arange(table.num_chunks))
    assert (ids >= 0).all() and ids.max() < table.corpus_chunks[1]
    assert work.facts("chunks")["database_chunks"] == len(table.chunks_of(table.database_documents((90, 10, 0))))
    assert (table.documents_in("train", (90, 10, 0)) >= 12).any()
    live = OpenIndex.open(work)
    chunks = live.database.chunks(0, 6)
    found = IndexSearch(empty_shard_first(live, tmp_path), live.embeddings, live.database, 1)
    own = np.zeros((len(chunks), 2), np.int64)
    assert found.search(live.embeddings.rows(chunks), own, 2)[0][:, 0].tolist() == chunks.tolist()
    with pytest.raises(UserError, match="--retro-exclude-corpora is"):
        build(tmp_path / "work", "--retro-exclude-corpora", "a")
    with pytest.raises(UserError, match=r"leaves no document .* that --retro-exclude-corpora spares"):
        build(tmp_path / "none", *flags, "--retro-exclude-corpora", "a", "b")
