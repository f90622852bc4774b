"""Every kind of input file gives its documents; bad records have a reason and a place."""

import gzip
import json

import pytest
import zstandard
from conftest import stdlib_texts

from megatron_retro.data.documents import BadRecord, Source, blocks, find_sources
from megatron_retro.errors import UserError


def texts_of(path, key="text"):
    return [record.text(key) for record in Source.find(str(path)).records(key)]


def as_jsonl(texts, key="text"):
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


@pytest.fixture
def texts():
    return [*stdlib_texts(5), "naïve 😀\u2028 \x00 end"]


@pytest.mark.parametrize(
    ("ending", "pack"),
    [
        (".jsonl", bytes),
        (".jsonl.gz", gzip.compress),
        (".jsonl.zst", zstandard.compress),
        # two frames, as `cat a.zst b.zst` makes
        (".jsonl.zst", lambda raw: zstandard.compress(raw[:100]) + zstandard.compress(raw[100:])),
    ],
)
def test_json_lines_plain_and_compressed(tmp_path, texts, ending, pack):
    path = tmp_path / f"my_text_data{ending}"
    path.write_bytes(pack(as_jsonl(texts)))
    assert texts_of(path) == texts
    assert Source.find(str(path)).name == "my_text_data"


def test_parquet(tmp_path, texts):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": [*texts, None], "n": range(len(texts) + 1)}), path)
    records = list(Source.find(str(path)).records("body"))
    assert [record.text("body") for record in records[:-1]] == texts
    with pytest.raises(BadRecord, match="'body' is not a string"):
        records[-1].text("body")
    assert records[1].where == f"{path}:row 2"
    with pytest.raises(UserError, match=r"no column 'text' \(--json-key\).*body"):
        list(Source.find(str(path)).records("text"))
    with pytest.raises(UserError, match=r"cannot be read as Parquet"):
        list(Source.find(str(path)).records("n"))


def test_directory_is_walked_in_order_and_one_text_file_is_one_document(tmp_path):
    for name, text in (("b/z.txt", "last"), ("b/a.txt", "first\nline"), ("c.md", "ignored")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert texts_of(tmp_path) == ["first\nline", "last"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "broken JSON"),
        (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"body": "a"}', "no key 'text'"),
        (b'{"text": 5}', "'text' is not a string"),
        (b'{"text": ""}', "empty text"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b"[" * 100_000, "broken JSON"),
    ],
)
def test_bad_records_name_reason_and_line(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "also good"}\n')
    good, bad, last = Source.find(str(path)).records("text")
    assert (good.text("text"), last.text("text")) == ("good", "also good")
    assert bad.where == f"{path}:3"
    with pytest.raises(BadRecord, match=reason):
        bad.text("text")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + as_jsonl(["x"]))
    assert texts_of(tmp_path / "a.jsonl") == ["x"]


@pytest.mark.parametrize(("ending", "pack"), [(".jsonl.gz", gzip.compress), (".jsonl.zst", zstandard.compress)])
def test_truncated_and_mislabelled_files_are_refused(tmp_path, texts, ending, pack):
    path = tmp_path / f"a{ending}"
    for content in (pack(as_jsonl(texts))[:-20], b"not compressed at all"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"--input {path}: cannot be read to its end"):
            list(Source.find(str(path)).records("text"))


def test_sources_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("a.jsonl", "d/a.txt", "a.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"both name corpus 'a'"):
        find_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "d" / "a.txt")])
    with pytest.raises(UserError, match="no such file"):
        find_sources([str(tmp_path / "none.jsonl")])
    with pytest.raises(UserError, match="unknown kind of file"):
        find_sources([str(tmp_path / "a.csv")])


def test_progress_counts_every_byte_on_disk(tmp_path, texts):
    for name, content in (("a.jsonl.gz", gzip.compress(as_jsonl(texts))), ("b.txt", b"x")):
        (tmp_path / name).write_bytes(content)
    source, read = Source.find(str(tmp_path)), []
    list(source.records("text", read.append))
    assert sum(read) == source.num_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_blocks_are_cut_by_records_and_by_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_jsonl(["x" * 100] * 7))
    records = list(Source.find(str(path)).records("text"))
    assert [len(block) for block in blocks(iter(records), max_records=3)] == [3, 3, 1]
    assert [len(block) for block in blocks(iter(records), max_bytes=200)] == [2, 2, 2, 1]
    assert [record for block in blocks(iter(records), max_records=3) for record in block] == records
