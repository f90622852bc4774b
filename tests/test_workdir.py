"""A work dir tells when anything in it was exchanged, with the field and both values."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import build
from launch import ROOT

from megatron_retro import storage
from megatron_retro.errors import UserError
from megatron_retro.storage import fingerprint, lock, save_npy, write_atomically
from megatron_retro.workdir import WorkDir


@pytest.fixture
def copy(small_work, tmp_path):
    return shutil.copytree(small_work, tmp_path / "copy")


def test_an_untouched_work_dir_is_right_also_elsewhere(copy):
    WorkDir(copy).verify()


@pytest.mark.parametrize(
    ("pattern", "stage"),
    [
        ("tokenizer/tokenizer.model", "tokenizer"),
        ("corpus/my_text_data.bin", "corpus"),
        ("corpus/my_text_data.idx", "corpus"),
        ("chunks/my_text_data.npy", "chunks"),
        ("embeddings/my_text_data/0-100.npy", "embeddings"),
        ("index/shard-0-519.faiss", "index"),
        ("neighbors/my_text_data/0-100.ids.npy", "neighbors"),
        ("neighbors/my_text_data/0-100.distances.npy", "neighbors"),
    ],
)
def test_an_exchanged_file_is_refused_with_both_values(copy, pattern, stage):
    file = copy / pattern
    was, content = fingerprint(file), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        WorkDir(copy).verify()
    assert f"file {pattern} was {was} " in str(error.value)
    assert f"is now {fingerprint(file)}" in str(error.value)
    file.unlink()
    with pytest.raises(UserError, match="is now no such file"):
        WorkDir(copy).verify()


def test_an_exchanged_record_breaks_the_chain(copy):
    work = WorkDir(copy)
    work.manifest["stages"]["chunks"]["facts"]["chunk_length"] = 32
    work.write()
    with pytest.raises(UserError, match=r"chunks.digest was \w+ .* is now \w+"):
        WorkDir(copy).verify()
    work.commit("chunks", work.facts("chunks"), [])
    with pytest.raises(UserError, match=r"embeddings.parent was \w+ .* is now \w+"):
        WorkDir(copy).verify()


def test_stages_that_were_not_run_are_named(copy):
    work = WorkDir(copy)
    del work.manifest["stages"]["neighbors"]
    with pytest.raises(UserError, match="'neighbors'"):
        work.verify()


def test_foreign_manifests_are_refused(tmp_path):
    for text, reason in (("[]", "is damaged"), ("{", "is damaged"), ('{"version": 99}', "has version 99")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=reason):
            WorkDir(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    save_npy(tmp_path / "a.npy", np.arange(3))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a.npy", fail)
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]


def test_two_runs_do_not_write_to_one_directory(tmp_path):
    program = f"""
import pathlib, sys
from megatron_retro.storage import lock
held = lock("--save", pathlib.Path({str(tmp_path)!r}))
print("locked", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, cwd=ROOT, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"--save {tmp_path}: another run is writing there"):
            lock("--save", tmp_path)
        other.kill()
    lock("--save", tmp_path).close()


def test_large_files_are_told_apart_by_windows(tmp_path):
    content = bytearray(8 << 20)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(content)
        content[-1] = 1
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_the_manifest_is_plain_json(small_work):
    manifest = json.loads((small_work / "manifest.json").read_text())
    assert manifest["settings"]["split"] == "80,10,10"
    assert list(WorkDir(small_work).manifest["stages"]) == sorted(manifest["stages"])


def test_new_directories_survive_a_power_cut(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(storage, "sync", synced.append)
    storage.make_directory(tmp_path / "a" / "b")
    storage.make_directory(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"] and (tmp_path / "a" / "b").is_dir()


def test_a_stale_copy_of_the_manifest_is_renewed(copy):
    """As a crash between the two would have left it."""
    manifest, saved = copy / "manifest.json", copy / "manifest.copy.json"
    saved.write_bytes(manifest.read_bytes()[:100])
    build(copy)
    assert saved.read_bytes() == manifest.read_bytes()
