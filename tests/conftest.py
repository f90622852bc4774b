"""Fixtures that several test files share: real text, one small work dir built from it, a model trained on that."""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import resource
import shutil
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the shapes are too small to share out

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait let other processes compute

import torch
from launch import run_forked

from megatron_retro.config.flags import parse
from megatron_retro.config.preprocessing import PreprocessConfig
from megatron_retro.retrieval import embedding

# Begun first, so that none of them is left at the end. The second needs no work dir, which the first one makes.
_SLOWEST = ("test_training", "test_parallel", "test_dry_run", "test_watch", "test_serve", "test_generation")
_SLOWEST += ("test_preprocess", "test_evaluation", "test_bad_steps", "test_survival", "test_new_facts")

_fastest_dtype = embedding.fastest_dtype


@functools.cache
def _measured_once(name: str, batch_size: int) -> str:
    return _fastest_dtype(name, 2)  # of few texts: a few tenths of a second


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = {name: place for place, name in enumerate(_SLOWEST)}
    items.sort(key=lambda item: files.get(item.path.stem, len(files)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def stdlib_texts(count: int, max_characters: int = 2000) -> list[str]:
    """Real text that every machine has: the beginnings of modules of the standard library."""
    files = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files if file.stat().st_size >= max_characters]
    return [text[:max_characters] for text in texts[:count]]


def write_jsonl(path: pathlib.Path, texts: list[str]) -> pathlib.Path:
    lines = [json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def build(work: pathlib.Path, *arguments: str) -> None:
    """Run preprocessing in this process."""
    from megatron_retro.retrieval.pipeline import preprocess

    with unittest.mock.patch.object(embedding, "fastest_dtype", _measured_once):
        preprocess(parse(PreprocessConfig, ["--retro-work-dir", str(work), *arguments]))


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """No file of this process can become larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def unfinish(work: Any, *stages: str) -> Any:
    """Have a work dir look as if it was killed when all of its last stages was made, before their records."""
    for stage in stages:
        record = work.manifest["stages"].pop(stage)
        (work.path / "unfinished").mkdir(exist_ok=True)
        with open(work.path / "unfinished" / f"{stage}.0.jsonl", "w", encoding="utf-8") as notes:
            for name, print_ in record["files"].items():
                notes.write(json.dumps({"file": name, "fingerprint": print_, "from": record["parent"]}) + "\n")
    work.write()
    return work


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
    """A path of what `make` makes there: in the first process of the test run that asks for it, while others wait."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / f"{name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path, is_made = base / name, base / f"{name}.made"
        if not is_made.exists():
            shutil.rmtree(path, ignore_errors=True)  # of one that failed
            make(path)
            is_made.touch()
    return path


@pytest.fixture(scope="session")
def small_input(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`my_text_data.jsonl`: 40 documents."""
    return made_once(tmp_path_factory, "my_text_data.jsonl", lambda path: write_jsonl(path, stdlib_texts(40)))


SMALL = ("--vocab-size", "1000", "--split", "80,10,10", "--retro-block-size", "100")


@pytest.fixture(scope="session")
def small_work(tmp_path_factory: pytest.TempPathFactory, small_input: pathlib.Path) -> pathlib.Path:
    """A finished work dir of corpus `my_text_data`: 40 documents, some 500 chunks of 64. Copy it before a change."""
    return made_once(tmp_path_factory, "small_work", lambda work: build(work, "--input", str(small_input), *SMALL))


@pytest.fixture(scope="session")
def tiny_embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a random embedder that takes no time: for work dirs whose neighbors need not be alike."""
    from torture.preprocessing import write_tiny_embedder

    return str(made_once(tmp_path_factory, "tiny_embedder", write_tiny_embedder))


# Of a model that has seen a little text; such initial weights make it heed what it reads.
TRAINING = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 256 --init-method-std 0.3 "
    "--micro-batch-size 2 --lr 1e-2 --eval-iters 0 --train-iters 4"
).split()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, small_work: pathlib.Path) -> pathlib.Path:
    """The --save directory of a RETRO of a few updates on `small_work`. Copy it before a change."""
    flags = ["--retro-work-dir", small_work, "--retro-add-retriever", "--retro-layers", "2,4", *TRAINING]
    return made_once(tmp_path_factory, "trained", lambda save: run_forked("pretrain_retro.py", *flags, "--save", save))
