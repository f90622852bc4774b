"""Disk: told before it is taken, within a tenth; refused where it does not fit."""

import collections
import gzip
import os
import pathlib
import random
import re
import shutil
import subprocess

import faiss
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import SMALL, TRAINING, build, files_of_at_most, stdlib_texts, unfinish, write_jsonl
from launch import run_forked

from megatron_retro import storage
from megatron_retro.data import estimate
from megatron_retro.data.documents import Source
from megatron_retro.data.tokenize import write_documents
from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.errors import UserError
from megatron_retro.retrieval import embedding, room
from megatron_retro.retrieval.index import write_index
from megatron_retro.retrieval.journal import Journal
from megatron_retro.training import room as checkpoint_room
from megatron_retro.workdir import WorkDir

Disk = collections.namedtuple("Disk", "total used free")


def used(directory: pathlib.Path) -> int:
    """Bytes on disk."""
    return sum(512 * file.stat().st_blocks for file in directory.rglob("*") if file.is_file())


@pytest.fixture
def watched(monkeypatch):
    """Estimates with what the disk then took: a list of (estimate, used at the time, most used after it)."""
    told: list[list[float]] = []
    check, replace, rename = room.Need.__init__, os.replace, os.rename

    def need(self, work, *arguments):
        check(self, work, *arguments)
        directory[:] = [work.path]
        told.append([self.most, used(work.path), 0])

    def watching(move):
        def moved(*names, **more):
            for estimated in told:
                estimated[2] = max(estimated[2], used(directory[0]))
            move(*names, **more)

        return moved

    directory: list[pathlib.Path] = []
    monkeypatch.setattr(room.Need, "__init__", need)
    monkeypatch.setattr(os, "replace", watching(replace))
    monkeypatch.setattr(os, "rename", watching(rename))
    return told


def random_embeddings(self, encoded, advance):
    return np.random.default_rng(0).standard_normal((len(encoded), self.width), np.float32).astype(np.float16)


def assert_right(told):
    """Within a tenth, and some kilobytes for what is small: manifest, report."""
    assert told
    for most, before, after in told:
        assert most == pytest.approx(after - before, rel=0.1, abs=30_000)


def test_a_build_takes_what_it_said(tmp_path, watched, monkeypatch, capsys):
    """From documents to neighbors, then with blocks missing, then documents more."""
    monkeypatch.setattr(embedding.Embedder, "embed", random_embeddings)
    texts = stdlib_texts(60, 6000)
    inputs = [str(write_jsonl(tmp_path / f"{name}.jsonl", texts[at : at + 20])) for name, at in (("a", 0), ("b", 20))]
    begun = WorkDir(tmp_path / "work")
    begun.settings["embedder_dtype"] = "float32"  # not to be measured
    begun.write()
    build(tmp_path / "work", "--input", *inputs, *SMALL)
    assert len(watched) == 6 and watched[0][0] > 1e6
    assert_right(watched)
    shown = capsys.readouterr().err
    assert shown.count("disk: ") == 1 and " will grow by " in shown and "embeddings " in shown

    watched.clear()
    work = unfinish(WorkDir(tmp_path / "work"), "embeddings", "index", "neighbors")
    for stage in ("embeddings", "neighbors"):
        for file in work.directory(stage).rglob("*.npy"):
            if not file.name.startswith("0-"):
                file.unlink()
    build(work.path)
    assert_right(watched)

    watched.clear()
    more = str(write_jsonl(tmp_path / "c.jsonl", texts[40:]))
    build(work.path, "--retro-tasks", "add-documents", "--input", more)
    assert_right(watched)


def test_what_cannot_fit_is_refused(small_input, tmp_path, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: Disk(10**9, 10**9 - 300_000, 300_000))
    for _ in range(2):  # also what had begun
        with pytest.raises(UserError, match=r"will grow by 1\.\d+ MB \(corpus .*its disk has 0\.3 MB free; make room"):
            build(tmp_path / "work", "--input", str(small_input), *SMALL)
    assert not list((tmp_path / "work").glob("corpus*"))
    monkeypatch.undo()
    build(tmp_path / "work", "--input", str(small_input), *SMALL, "--retro-tasks", "tokenize")


@pytest.mark.parametrize("factory", ["Flat", "IVF64_HNSW32,RaBitQ", "HNSW16,SQ4", "SQ8"])
def test_bytes_of_an_index(factory):
    vectors = np.random.default_rng(0).standard_normal((3000, 32), np.float32)
    index = faiss.index_factory(32, factory)
    index = index if "IVF" in factory else faiss.IndexIDMap2(index)
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(3000))
    fixed, per_vector = room.index_bytes(factory, 32)
    assert fixed + 3000 * per_vector == pytest.approx(len(faiss.serialize_index(index)), rel=0.03)


def test_a_save_that_the_disk_refuses(small_work, trained, tmp_path):
    """Every rank leaves, in one line that names the file; the checkpoint before it is whole, and the rest gone.

    With room the same command goes on. A checkpoint takes what was told.
    """
    save = shutil.copytree(trained, tmp_path / "save")
    before = {file: file.read_bytes() for file in save.glob("iter_*/*")}
    flags = ["--retro-work-dir", small_work, "--retro-add-retriever", "--retro-layers", "2,4", *TRAINING]
    command = ["pretrain_retro.py", *flags, "--train-iters", "5", "--save", save, "--load", save]
    text = run_forked("tests/limited.py", 100_000, *command, ranks=2, expect=2)
    (line,) = [line for line in text.splitlines() if "error: " in line]
    assert re.search(r"error: \S+/__\d_\d.distcp cannot be written \(File too large\); make room and run", line)
    assert {file: file.read_bytes() for file in save.glob("iter_*/*")} == before
    assert len(list(save.glob("iter_*"))) == 1
    assert "saved iteration 5" in run_forked(*command)
    told = float(re.search(r"a checkpoint takes ([\d.]+) MB", text)[1]) * 1e6
    assert told == pytest.approx(sum(file.stat().st_size for file in save.glob("iter_0000005/*")), rel=0.1)


def test_checkpoints_that_cannot_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 10**9 - 5_000_000, 5_000_000))
    with pytest.raises(UserError, match=r"--save \S+: a checkpoint takes 6 MB, its disk has 5 MB free; make room"):
        checkpoint_room.check(str(tmp_path / "save"), 6_000_000, 1)
    assert checkpoint_room.check(str(tmp_path / "save"), 4_000_000, 1).endswith(" has 5 MB free")
    assert "not enough for the 2 that" in checkpoint_room.check(str(tmp_path / "save"), 4_000_000, 2)


def index_of(number):
    index = faiss.IndexIDMap2(faiss.IndexFlatL2(8))
    index.add_with_ids(np.full((300, 8), number, np.float32), np.arange(300))
    return index


WRITERS = {
    "rows.npy": lambda path, number: storage.save_npy(path, np.full((500, 7), number, np.float16)),
    "shard.faiss": lambda path, number: write_index(path, index_of(number)),
    "tokens.bin": lambda path, number: write_documents(path.with_suffix(""), [np.full(4000, number)] * 2, np.uint16),
    "summary.json": lambda path, number: storage.write_sealed(path, {"rows": [number] * 1000}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_leaves_half_a_file(tmp_path, name):
    """A limit anywhere, up to the last byte: one line that names the file, and what was there before stays."""
    write, path = WRITERS[name], tmp_path / name
    write(path, 1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    size = path.stat().st_size
    for limit in (0, 1, 100, size // 2, size - 1):
        with (
            files_of_at_most(limit),
            pytest.raises(UserError, match=rf"{path}.* \(File too large\); make room and run"),
        ):
            write(path, 2)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with files_of_at_most(size):
        write(path, 2)
    assert path.read_bytes() != before[name] and len(list(tmp_path.iterdir())) == len(before)


def test_a_disk_that_cannot_be_written_to(tmp_path):
    """One line, from whatever comes to it first; what is there stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this user may not mount disks")
    try:
        for name, write in WRITERS.items():
            write(disk / name, 1)
        before = {file.name: file.read_bytes() for file in disk.iterdir()}
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for name, write in WRITERS.items():
            with pytest.raises(
                UserError, match=rf"{disk}/\S+ cannot be written \(Read-only file system\); mend the disk"
            ):
                write(disk / name, 2)
        for begin in (lambda: storage.check_writable("--save", disk / "new"), lambda: Journal(str(disk / "a.jsonl"))):
            with pytest.raises(UserError, match=r"cannot be written to \(Read-only file system\); give another"):
                begin()
        assert {file.name: file.read_bytes() for file in disk.iterdir()} == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_large_sources_are_told_by_a_sample(small_work, tmp_path, monkeypatch):
    """Documents of very different sizes and kinds, in every kind of file, of which a tenth is looked at."""
    texts = [text[: random.Random(number).randrange(50, 9000)] for number, text in enumerate(stdlib_texts(130, 9000))]
    random.Random(0).shuffle(texts)
    plain = write_jsonl(tmp_path / "plain.jsonl", texts)
    packed = gzip.compress(plain.read_bytes()[:200_000]) + gzip.compress(plain.read_bytes()[200_000:])
    (tmp_path / "packed.jsonl.gz").write_bytes(packed)
    with pyarrow.CompressedOutputStream(str(tmp_path / "packed2.jsonl.zst"), "zstd") as stream:
        stream.write(plain.read_bytes())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet", row_group_size=10)
    (tmp_path / "many").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "many" / f"{number}.txt").write_text(text)
    tokenizer = Tokenizer.open(small_work / "tokenizer" / "tokenizer.model")
    lengths = [len(row) + 1 for row in tokenizer.encode(texts)]
    chunks = sum(-(-length // 64) for length in lengths)
    for name, size in {"_SAMPLE_BYTES": 1 << 17, "_PACKED_BYTES": 1 << 16, "_ROW_GROUPS": 10, "_ROWS": 5}.items():
        monkeypatch.setattr(estimate, name, size)
    for name in ("plain.jsonl", "packed.jsonl.gz", "packed2.jsonl.zst", "rows.parquet", "many"):
        found = estimate.estimate(Source.find(str(tmp_path / name)), "text", tokenizer, 64)
        print(name, found, sum(lengths), chunks, found.tokens / sum(lengths), found.chunks / chunks)
        continue
        assert found.tokens == pytest.approx(sum(lengths), rel=0.1), name
        assert found.chunks == pytest.approx(chunks, rel=0.1), name
