"""Fixtures that several test files share: real text, and one small work dir built from it."""

import json
import os
import pathlib

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the shapes are too small to share out

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait let other processes compute

from megatron_retro.config.flags import parse
from megatron_retro.config.preprocessing import PreprocessConfig


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

    preprocess(parse(PreprocessConfig, ["--retro-work-dir", str(work), *arguments]))


@pytest.fixture(scope="session")
def small_input(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`my_text_data.jsonl`: 40 documents."""
    return write_jsonl(tmp_path_factory.mktemp("input") / "my_text_data.jsonl", stdlib_texts(40))


SMALL = ("--vocab-size", "1000", "--split", "80,10,10", "--retro-block-size", "100")


@pytest.fixture(scope="session")
def small_work(tmp_path_factory: pytest.TempPathFactory, small_input: pathlib.Path) -> pathlib.Path:
    """A finished work dir of corpus `my_text_data`: 40 documents, some 500 chunks of 64. Copy it before a change."""
    work = tmp_path_factory.mktemp("small") / "work"
    build(work, "--input", str(small_input), *SMALL)
    return work
