"""Hostile input: whatever the bytes of a file, its reader returns valid data or ends with a `UserError`.

Every run gives the readers the same files; `RETRO_FUZZ_EXAMPLES` sets how many each of them gets.
"""

import ast
import ctypes
import dataclasses
import faulthandler
import gzip
import json
import os
import pathlib
import pickle
import resource
import shutil
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import stdlib_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch import ROOT, run_forked
from test_chunks import write_dataset
from test_lexical import table_of
from test_tokenizer import hugging_face

from megatron_retro.config.flags import parse
from megatron_retro.config.generation import GenerateConfig
from megatron_retro.config.preprocessing import PreprocessConfig
from megatron_retro.config.training import PretrainConfig
from megatron_retro.data import documents, tokenizer
from megatron_retro.data.chunks import ChunkTable, Corpus
from megatron_retro.data.documents import BadRecord, Source
from megatron_retro.data.questions import read_conversations, read_questions
from megatron_retro.data.tokenize import write_part
from megatron_retro.data.tokenizer import Tokenizer, train
from megatron_retro.errors import UserError
from megatron_retro.reading import load_array
from megatron_retro.retrieval import changes, embedding
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.index import check_factory, read_index, write_index
from megatron_retro.retrieval.journal import Journal
from megatron_retro.retrieval.lexical import Bm25Index
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.training import checkpoint
from megatron_retro.workdir import WorkDir

EXAMPLES = int(os.environ.get("RETRO_FUZZ_EXAMPLES", "25"))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

TEXTS = [*stdlib_texts(3, 300), "naïve 😀\u2028 \x00 end"]
C = 7


# ------------------------------------------------------------------------------------------------ files and readers


def read_documents(path: pathlib.Path) -> None:
    for record in Source.find(str(path)).records("text"):
        try:
            assert record.text("text").encode("utf-8")
        except BadRecord as reason:
            assert len(str(reason)) < 50


def read_corpus(path: pathlib.Path) -> None:
    table = ChunkTable([Corpus.open("a", str(path.with_suffix("")))], C, vocab_size=90)
    for begin in range(0, min(table.num_chunks, 1000), 100):
        tokens, lengths = table.tokens(np.arange(begin, min(begin + 100, table.num_chunks)), 2 * C, 0)
        assert (tokens >= 0).all() and (tokens < 90).all() and (lengths > 0).all()


def read_block(path: pathlib.Path) -> None:
    assert np.asarray(load_array(path, np.int64, (5, 3))).sum() is not None


def read_tokenizer(path: pathlib.Path) -> None:
    opened = Tokenizer.open(path)
    (row,) = opened.encode(["def f(x): return 1"])
    assert all(0 <= token < opened.vocab_size for token in row)
    opened.decode([row])


def read_index_file(path: pathlib.Path) -> None:
    read_index(path, 8).search(np.zeros((2, 8), np.float32), 3)


def read_words(path: pathlib.Path) -> None:
    Bm25Index.open(path.parent).words(["return x"])


def read_config(path: pathlib.Path) -> None:
    parse(PretrainConfig, ["--config", str(path)])


def read_talks(path: pathlib.Path) -> None:
    assert all(talk.turns for talk in read_conversations("--sft-data", path, "Q: {question} A:"))


def read_prompts(path: pathlib.Path) -> None:
    parse(GenerateConfig, ["--load", "l", "--retro-work-dir", "w", "--prompt-file", str(path)]).prompts()


def read_ids(path: pathlib.Path, work: WorkDir) -> None:
    config = parse(
        PreprocessConfig, ["--retro-work-dir", "w", "--retro-tasks", "remove-documents", "--document-ids", str(path)]
    )
    found = changes._documents(work, config)
    assert (found >= 0).all() and (found < 40).all()


def read_journal(path: pathlib.Path) -> None:
    journal = Journal(str(path))
    journal.close()
    for change in journal.changes:
        assert all(value.encode() is not None for value in change.values())


def read_embedder(path: pathlib.Path) -> None:
    width = embedding.checkpoint_width(str(path.parent))
    assert width is None or width > 0


def read_modules(path: pathlib.Path) -> None:
    embedding._check_modules("a", path.parent)


def read_manifest(path: pathlib.Path) -> None:
    assert WorkDir(path.parent).has("neighbors")


def read_state(path: pathlib.Path) -> None:
    checkpoint.read_state(path.parent)


STATE = json.dumps({field.name: 3 for field in dataclasses.fields(checkpoint.RunState)}).encode()


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory, small_work: pathlib.Path) -> dict[str, tuple[pathlib.Path, Any]]:
    """name -> (a valid file, its reader)."""
    root = tmp_path_factory.mktemp("valid")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()

    def file(name: str, content: bytes) -> pathlib.Path:
        path = root / name.replace("/", ".d/")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS * 9, "n": range(len(TEXTS) * 9)}), root / "a.parquet")
    write_dataset(root / "a", [[np.arange(40) % 90], [np.arange(9), np.arange(2)], []])
    np.save(root / "a.npy", np.arange(15).reshape(5, 3))
    (root / "a.model").write_bytes(train(stdlib_texts(5), 400))
    index = check_factory("IVF2_HNSW4,RaBitQ", 8)
    rows = np.random.default_rng(0).standard_normal((100, 8), np.float32)
    index.train(rows)
    index.add_with_ids(rows, np.arange(100))
    write_index(root / "a.faiss", index)
    opened = Tokenizer.open(root / "a.model")
    table = table_of(stdlib_texts(5), opened)
    Bm25Index.build(root / "words", table, opened, Database(table, np.arange(5)))
    work = WorkDir(small_work)
    changed = [{"change": "add", "document": "a:0", "text": "x"}, {"change": "remove", "document": "a:0"}]
    questions = {"question": "Who?", "answers": ["I", "you"], "ctxs": [{"title": "a", "text": "b"}, "c"]}
    talk = {"messages": [{"role": role, "content": "x"} for role in ("system", "user", "assistant")], "ctxs": ["a"]}
    yaml = b"num-layers: 12\nlr: 1e-4\nbf16: true\nsplit: 98,1,1\ndata-path: [0.5, a, 0.5, b]\n"
    words = {f"words {file.name}": (file, read_words) for file in sorted((root / "words").iterdir())}
    return words | {
        "json lines": (file("a.jsonl", lines), read_documents),
        "gzip": (file("a.jsonl.gz", gzip.compress(lines)), read_documents),
        "zstandard": (file("a.jsonl.zst", zstandard.compress(lines)), read_documents),
        "text": (file("a.txt", TEXTS[-1].encode()), read_documents),
        "parquet": (root / "a.parquet", read_documents),
        "idx": (root / "a.idx", read_corpus),
        "bin": (root / "a.bin", read_corpus),
        "npy": (root / "a.npy", read_block),
        "SentencePiece": (root / "a.model", read_tokenizer),
        "tokenizer.json": (hugging_face(root / "a.json"), read_tokenizer),
        "faiss": (root / "a.faiss", read_index_file),
        "yaml": (file("a.yaml", yaml), read_config),
        "prompts": (file("prompts.txt", TEXTS[0].encode()), read_prompts),
        "prompt lines": (file("prompts.jsonl", b'{"prompt": "a"}\n{"prompt": "b"}\n'), read_prompts),
        "questions": (file("questions.jsonl", json.dumps(questions).encode() + b"\n"), read_questions),
        "conversations": (file("talks.jsonl", f"{json.dumps(talk)}\n{json.dumps(questions)}".encode()), read_talks),
        "ids": (file("ids.txt", b"my_text_data:0\nmy_text_data:39\n"), lambda path: read_ids(path, work)),
        "journal": (file("journal.jsonl", "".join(json.dumps(c) + "\n" for c in changed).encode()), read_journal),
        "manifest": (file("work/manifest.json", (small_work / "manifest.json").read_bytes()), read_manifest),
        "run state": (file("run/run.json", STATE), read_state),
        "embedder": (file("embedder/config.json", b'{"hidden_size": 384, "layers": [1, 2]}'), read_embedder),
        "modules": (file("modules/modules.json", b'[{"type": "sentence_transformers.models.Pooling"}]'), read_modules),
    }


WORDS = ("data.csc.index.npy", "documents.npy", "indices.csc.index.npy", "indptr.csc.index.npy")
WORDS += ("params.index.json", "vocab.index.json")
NAMES = ("json lines", "gzip", "zstandard", "text", "parquet", "idx", "bin", "npy", "SentencePiece", "tokenizer.json")
NAMES += (
    "faiss",
    "yaml",
    "prompts",
    "prompt lines",
    "questions",
    "conversations",
    "ids",
    "journal",
    "embedder",
    "modules",
    "manifest",
)
NAMES += ("run state",)
NAMES += tuple(f"words {name}" for name in WORDS)


def refused_or_read(read: Callable[[pathlib.Path], None], path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        read(path)
    except UserError as error:
        assert len(str(error)) > 20
    finally:
        if "RETRO_FUZZ_KEEP" not in os.environ:
            path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ fuzzing

# Bytes that parsers have met before: signs of other formats, brackets, limits of integers.
_PIECES = [b"\x93NUMPY\x01\x00", b"PK\x03\x04", pickle.dumps([1]), b"\xff" * 8, b"\0" * 9, b"\xff" * 7 + b"\x7f"]
_PIECES += [
    b"{" * 50,
    b"[" * 3000,
    b'"\\ud800"',
    b"1" * 5000,
    b"1e999",
    b"NaN",
    b"null",
    b"&a [*a, *a]",
    b"!!python/name:os",
]
_PIECES += [b"\xef\xbb\xbf", b"\r", b"\n\n", b"\xed\xa0\x80", b"-1", b": ", b"true", b'""', b"\xe2\x80\xa8"]
_BYTES = st.binary(max_size=200) | st.lists(st.sampled_from(_PIECES) | st.binary(max_size=4), max_size=6).map(b"".join)


@st.composite
def mutated(draw: Any, content: bytes) -> bytes:
    """A valid file with bits flipped, bytes replaced, taken out, or put in from elsewhere, and ends cut off."""
    mutable = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(mutable) - 1)))
        kind = draw(st.sampled_from(("flip", "flip", "cut", "replace", "insert", "remove")))
        if kind == "flip" and mutable:
            mutable[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del mutable[place:]
        elif kind == "replace":
            piece = draw(_BYTES)
            mutable[place : place + len(piece)] = piece
        elif kind == "insert":
            source = draw(st.integers(0, len(mutable)))
            mutable[place:place] = draw(_BYTES) or mutable[source : source + 64]
        else:
            del mutable[place : place + draw(st.integers(1, 64))]
    return bytes(mutable)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_read_or_refused(name: str, valid: Any, tmp_path: pathlib.Path) -> None:
    original, read = valid[name]
    read(original)
    directory = shutil.copytree(original.parent, tmp_path / "copy")  # what lies beside it stays valid
    path, content = directory / original.name, original.read_bytes()

    changes = mutated(content) | mutated(content) | mutated(content)
    if name == "faiss":  # which crashes on some flipped bits, and on a mapped file cut off: the manifest guards it
        changes = st.integers(0, len(content) - 1).map(lambda size: content[:size])

    @fuzz
    @given(_BYTES | changes)
    def check(changed: bytes) -> None:
        refused_or_read(read, path, changed)

    check()


def test_what_faiss_reads_as_no_index_at_all(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.faiss").write_bytes(b"null")
    with pytest.raises(UserError, match=r"a\.faiss is not a FAISS index"):
        read_index(tmp_path / "a.faiss", 8)


# ------------------------------------------------------------------------------------------------ memory


def in_limited_memory(act: Callable[[], object], megabytes: int) -> bool:
    """Whether `act` ends well in a fork that may take so much more address space than it has."""
    pid = os.fork()
    if not pid:
        faulthandler.disable()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed is no room for this one
            used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
            act()
            os._exit(0)
        except MemoryError:
            os._exit(3)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 3, -signal.SIGABRT)  # the last: C++ without memory
    return code == 0


def test_a_document_of_millions_of_tokens_takes_little_more_memory_than_its_text(
    valid: Any, tmp_path: pathlib.Path
) -> None:
    """With many examples: ten million tokens."""
    opened, num_tokens = Tokenizer.open(valid["SentencePiece"][0]), 10_000_000 if EXAMPLES >= 300 else 1_500_000
    text = "".join(stdlib_texts(50, 20_000))
    text *= num_tokens // len(opened.encode([text])[0]) + 1
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")

    megabytes = 50 + 25 * len(text) // 1_000_000
    worker = ["tests/tokenize_worker.py", valid["SentencePiece"][0], path, tmp_path / "a", megabytes]
    run_forked(*worker, tokenizer.PIECE)
    counts = json.loads((tmp_path / "a.json").read_text())
    assert counts["documents"] == 1 and counts["tokens"] > num_tokens
    with pytest.raises(AssertionError, match=r"exit code (3|-6)\n"):  # all at once does not fit; C++ aborts
        run_forked(*worker, 1 << 40)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.zst", ".txt"])
def test_a_line_of_any_length_is_passed_over_in_little_memory(
    ending: str, valid: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, line = Tokenizer.open(valid["SentencePiece"][0]), b'{"text": "a"}\n'
    directory = tmp_path / "a"
    directory.mkdir()
    path, size = directory / f"a{ending}", 200 << 20
    if ending == ".jsonl.zst":
        # A quarter of a gigabyte of zeros, then a line, in a few kilobytes.
        path.write_bytes(
            zstandard.compress(line) + 25 * zstandard.compress(bytes(10 << 20)) + zstandard.compress(b"\n" + line)
        )
    else:
        path.write_bytes(line)
        os.truncate(path, size)
        with open(path, "ab") as file:
            file.write(b"\n" + line)

    def tokenize() -> None:
        for number, block in enumerate(documents.blocks(Source.find(str(directory)).records("text"))):
            write_part(tmp_path / f"part{number}", block, opened, "text", strict=False)

    assert not in_limited_memory(lambda: bytes(size), 160)  # which is why
    monkeypatch.setattr(documents, "MAX_BYTES", 8 << 20)
    assert in_limited_memory(tokenize, 160)
    counts = json.loads((tmp_path / "part0.json").read_text())
    good = 0 if ending == ".txt" else 2
    assert (counts["documents"], counts["skipped"]) == (good, {"longer than 8 MiB": 1})


def test_a_hundred_thousand_empty_lines_are_no_documents(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * 50_000 + b'{"text": "a"}\n' + b" \r\n" * 50_000 + b'{"text": "b"}')
    assert [(record.text("text"), record.where) for record in Source.find(str(path)).records("text")] == [
        ("a", f"{path}:50001"),
        ("b", f"{path}:100002"),
    ]


def test_a_long_document_is_tokenized_in_pieces(valid: Any, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    text = "\n".join(stdlib_texts(10, 5000)) + "x" * 3000 + " " * 3000 + "end"
    for name in ("SentencePiece", "tokenizer.json"):
        opened = Tokenizer.open(valid[name][0])
        (whole,) = opened.encode([text])
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "PIECE", 1000)
            pieces = list(tokenizer.pieces(text))
            assert "".join(pieces) == text and min(map(len, pieces)) > 0 and max(map(len, pieces)) <= 1000
            (row,) = opened.encode([text])
            assert opened.decode([row]) == [text]
            cut = next(place for place, pair in enumerate(zip(row, whole, strict=False)) if pair[0] != pair[1])
            assert cut > len(opened.encode([text.split("xxx")[0]])[0]) - 9  # differs first where no word ends


# ------------------------------------------------------------------------------------------------ corpora


def index_bytes(lengths: list[int], pointers: list[int], ends: list[int], *, version: int = 1, code: int = 8) -> bytes:
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", version, code, len(lengths), len(ends))
    return header + np.int32(lengths).tobytes() + np.int64(pointers).tobytes() + np.int64(ends).tobytes()


LAST = 2**63 - 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (index_bytes([5, 5], [0, 10], [0, 1, 2]), ""),
        (index_bytes([5, 5], [10, 0], [0, 1, 2]), ""),  # documents in any order
        (index_bytes([5, 5], [0, 10], [0, 1, 2]) + bytes(2), ""),  # modes of a multimodal corpus
        (index_bytes([5, 0], [0, 20], [0, 1, 2]), ""),
        (index_bytes([5, 6], [0, 10], [0, 1, 2]), "names tokens behind the 10"),
        (index_bytes([5, 5], [0, LAST - 7], [0, 1, 2]), "outside the .bin"),
        (index_bytes([5, 5], [0, -10], [0, 1, 2]), "outside the .bin"),
        (index_bytes([5, 5], [0, 9], [0, 1, 2]), "in the midst of a token"),
        (index_bytes([5, -5], [0, 10], [0, 1, 2]), "negative length"),
        (index_bytes([5, 5], [0, 10], [0, 2, 1]), "do not follow one another"),
        (index_bytes([5, 5], [0, 10], [0, 1, 3]), "do not follow one another within its 2 sequences"),
        (index_bytes([5, 5], [0, 10], [-1, 1, 2]), "do not follow one another"),
        (index_bytes([5, 5], [10, 0], [0, 2]), "sequences do not lie one behind the other"),
        (index_bytes([5, 5], [0, 10], [0]), "names no document"),
        (index_bytes([5, 5], [0, 10], [0, 1, 2])[:-1], "has 81 bytes, its 2 sequences and 2 documents take 82"),
        (struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 2**63, 2**64 - 1), "has 34 bytes"),
        (index_bytes([5, 5], [0, 10], [0, 1, 2], version=2), "has version 2"),
        (index_bytes([5, 5], [0, 10], [0, 1, 2], code=9), "token type 9"),
        (index_bytes([5, 5], [0, 10], [0, 1, 2], code=6), "token type 6"),
        (index_bytes([1, 1], [0, 16], [0, 1, 2], code=4)[:17], "does not begin as one"),
        (index_bytes([1, 1], [0, 8], [0, 1, 2], code=5), "of which the .bin is no whole number"),
    ],
)
def test_an_index_points_into_its_bin_or_is_refused(content: bytes, reason: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.bin").write_bytes(np.arange(10, dtype=np.uint16).tobytes())
    (tmp_path / "a.idx").write_bytes(content)
    if not reason:
        corpus = Corpus.open("a", str(tmp_path / "a"))
        assert len(corpus.length) == 2
        return
    with pytest.raises(UserError, match=reason) as refused:
        Corpus.open("a", str(tmp_path / "a"))
    assert "a.idx" in str(refused.value) and "write it again" in str(refused.value)


def test_a_token_outside_the_vocabulary_is_named(tmp_path: pathlib.Path) -> None:
    rows = [np.arange(9), np.array([3, 4, 500, 5]), np.arange(4)]
    prefix = write_dataset(tmp_path / "a", [[row] for row in rows])
    table = ChunkTable([Corpus.open("b", prefix), Corpus.open("a", prefix)], 3, vocab_size=500)
    assert table.tokens(np.arange(3), 6, 0)[0].max() == 8
    with pytest.raises(UserError, match="document a:1 holds token id 500, the work dir's tokenizer has 500 ids"):
        table.tokens(np.array([0, 10]), 6, 0)
    assert ChunkTable(table.corpora, 3).tokens(np.array([10]), 6, 0)[0].max() == 500


# ------------------------------------------------------------------------------------------------ neighbors


def test_a_neighbor_that_cannot_be_is_named_with_its_row(small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = shutil.copytree(small_work, tmp_path / "work")
    work, file = WorkDir(copy), copy / "neighbors" / "my_text_data" / "100-200.ids.npy"
    table, saved = ChunkTable.open(work), np.load(file)
    chunk = 100 + int(np.flatnonzero((saved[:, 0] >= 0) & (saved[:, 1] >= 0))[3])
    first, end = table.document_chunks(np.array([chunk]))[0]
    wrong = {
        -2: "the neighbor -2, and there are chunks",
        table.num_chunks: f"the neighbor {table.num_chunks}, and there are chunks 0 … {table.num_chunks - 1}",
        2**62: f"the neighbor {2**62}, and",
        end - 1: f"the neighbor {end - 1} of the chunk's own document, whose chunks are {first} … {end - 1}",
        int(saved[chunk - 100, 0]): f"the neighbor {saved[chunk - 100, 0]} twice",
    }
    for neighbor, message in wrong.items():
        changed = saved.copy()
        changed[chunk - 100, 1] = neighbor
        np.save(file, changed)
        neighbors = NeighborTable(work, table)
        assert (neighbors.ids(np.arange(100)) >= -1).all()
        with pytest.raises(UserError, match=rf"100-200.ids.npy row {chunk - 100}, of chunk {chunk}, holds {message}"):
            neighbors.ids(np.array([3, chunk, 7]))
    np.save(file, saved[:-1])
    with pytest.raises(UserError, match=r"100-200.ids.npy holds int64 99 x .*not int64 100 x .*; restore the file"):
        NeighborTable(work, table).open_all()


# ------------------------------------------------------------------------------------------------ code


def test_yaml_holds_values_and_nothing_else(tmp_path: pathlib.Path) -> None:
    for text, reason in (
        ("a: &x [1]\nlr: *x", "tag or reference"),
        ("a: &a {b: 1}\nc: {<<: *a}", "tag or reference"),
        ("lr: !!float ''", "tag or reference"),
        ("lr: !!timestamp x", "tag or reference"),
        ("lr: " + "[" * 100_000, "a list in a list"),
        ("lr: 0x_", "not YAML"),
        ("lr: 2020-13-45", "not YAML"),
        ("num-layers: " + "1" * 5000, "not YAML"),
        ("num-layers:", "--num-layers has no value"),
        ("lr: .nan", "--lr is nan; it takes a number"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(UserError, match=reason):
            read_config(tmp_path / "a.yaml")


def test_nothing_is_unpickled_from_files(tmp_path: pathlib.Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return pathlib.Path.touch, (tmp_path / "executed",)

    for name, save in (
        ("a.npy", lambda file: np.save(file, np.array([Payload()], object), allow_pickle=True)),
        ("b.npy", lambda file: pickle.dump(Payload(), file)),
        ("c.npy", lambda file: np.savez(file, np.array([Payload()], object))),
    ):
        with open(tmp_path / name, "wb") as file:
            save(file)
        with pytest.raises(UserError, match=name):
            load_array(tmp_path / name, np.int64, (None,))
    assert not (tmp_path / "executed").exists()


def calls() -> Iterator[tuple[str, str, dict[str | None, ast.expr]]]:
    """(place, dotted name, keyword arguments) of every call in the product."""
    files = [*(ROOT / "megatron_retro").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_retro.py"]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                yield f"{file}:{node.lineno}", ast.unparse(node.func), keywords


def test_no_reader_executes_code() -> None:
    forbidden = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "os.system", "np.fromfile"}
    wanted = {"np.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
    for place, name, keywords in calls():
        assert name not in forbidden and not name.startswith(("pickle.", "marshal.", "shelve.", "dill.")), place
        assert "trust_remote_code" not in keywords, place
        for keyword, value in wanted.values():
            if keyword in keywords:
                assert ast.literal_eval(keywords[keyword]) is value, place
        if name in wanted:
            assert wanted[name][0] in keywords, f"{place}: {name} without {wanted[name][0]}"


def test_a_message_is_one_line_of_bounded_length(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.yaml").write_text('lr: "' + "x\\n\\e[31m" * 5000 + '"')
    with pytest.raises(UserError) as refused:
        read_config(tmp_path / "a.yaml")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 2100
