"""How many documents, tokens and chunks a source will become, told by a sample of some megabytes.

Files up to the sample's size are read whole: their counts are exact.
"""

import dataclasses
import pathlib

from megatron_retro.data.documents import BadRecord, JsonLine, ParquetRow, Source
from megatron_retro.data.tokenizer import Tokenizer

_SAMPLE_BYTES = 1 << 22  # of text, over all files
_MOST_FILES = 64  # of a source to look into, evenly spread
_WINDOWS = 64  # of a large file that can be read anywhere
_PACKED_BYTES = 1 << 20  # of a compressed file, from its beginning
_ROW_GROUPS, _ROWS = 16, 64  # of a Parquet file, and of each group


@dataclasses.dataclass
class Counts:
    """What a source, or a corpus, holds."""

    documents: float = 0
    tokens: float = 0
    chunks: float = 0

    def add(self, other: "Counts", times: float = 1) -> None:
        self.documents += times * other.documents
        self.tokens += times * other.tokens
        self.chunks += times * other.chunks


def estimate(source: Source, key: str, tokenizer: Tokenizer, chunk_length: int) -> Counts:
    """What the task `tokenize` will make of a source.

    Args:
        key: names the text in a record.
        tokenizer: the work dir's.
        chunk_length: C.
    """
    some = [source.files[number] for number in _spread(len(source.files), _MOST_FILES)]
    found = Counts()
    for file in some:
        texts, times = _sample(file, key, _SAMPLE_BYTES // len(some))
        lengths = [len(row) + 1 for row in tokenizer.encode(texts) if row]
        chunks = sum(-(-length // chunk_length) for length in lengths)
        found.add(Counts(len(lengths), sum(lengths), chunks), times)
    whole = Counts()
    whole.add(found, source.num_bytes / max(1, sum(file.stat().st_size for file in some)))
    return whole


def _sample(file: pathlib.Path, key: str, num_bytes: int) -> tuple[list[str], float]:
    """Texts of about `num_bytes` in all, and how many times as much the file holds."""
    size = file.stat().st_size
    if file.name.endswith(".parquet"):
        return _of_parquet(file, key)
    if file.name.endswith(".txt"):
        with open(file, "rb") as opened:
            return [opened.read(num_bytes).decode(errors="ignore")], max(1, size / num_bytes)
    if file.name.endswith((".gz", ".zst")):
        with open(file, "rb") as opened:
            packed = opened.read(_PACKED_BYTES)
        raw = _unpacked_beginning(file.name, packed)
        lines = raw.splitlines(keepends=True)
        if len(packed) < size and len(lines) > 1:
            lines.pop()  # cut off
        some = [lines[number] for number in _spread(len(lines), len(lines) * num_bytes // max(1, len(raw)) + 1)]
        times = size / max(1, len(packed)) * len(raw) / max(1, sum(map(len, some)))
    else:
        some = _lines_of_windows(file, size, num_bytes)
        times = size / max(1, sum(map(len, some)))
    texts = []
    for line in some:
        try:
            texts.append(JsonLine(str(file), line).text(key))
        except BadRecord:  # skipped when it is tokenized, too
            continue
    return texts, times


def _lines_of_windows(file: pathlib.Path, size: int, num_bytes: int) -> list[bytes]:
    """Whole lines from windows that are spread over a file."""
    with open(file, "rb") as opened:
        if size <= num_bytes:
            return list(opened)
        lines = []
        for window in range(_WINDOWS):
            opened.seek((size - num_bytes // _WINDOWS) * window // (_WINDOWS - 1))
            if window:
                opened.readline()  # what is left of one
            left = num_bytes // _WINDOWS
            while left > 0 and (line := opened.readline()):
                lines.append(line)
                left -= len(line)
        return lines


def _unpacked_beginning(name: str, packed: bytes) -> bytes:
    """What the first bytes of a compressed file hold, as far as they go."""
    import pyarrow

    codec, pieces = "gzip" if name.endswith(".gz") else "zstd", []
    stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(packed), codec)
    try:
        while piece := stream.read(1 << 14):
            pieces.append(piece)
    except OSError:  # they end inside a frame
        pass
    return b"".join(pieces)


def _of_parquet(file: pathlib.Path, key: str) -> tuple[list[str], float]:
    import pyarrow
    import pyarrow.parquet

    opened = pyarrow.parquet.ParquetFile(file)
    rows: list[ParquetRow] = []
    for group in _spread(opened.num_row_groups, _ROW_GROUPS):
        batch = next(opened.iter_batches(_ROWS, row_groups=[group], columns=[key]), None)
        if batch is not None:
            rows += [ParquetRow(str(file), raw) for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist()]
    texts = []
    for row in rows:
        try:
            texts.append(row.text(key))
        except BadRecord:
            continue
    return texts, opened.metadata.num_rows / max(1, len(rows))


def _spread(number: int, most: int) -> list[int]:
    """At most `most` of the numbers below `number`, evenly spread."""
    count = min(number, most)
    return [place * number // count for place in range(count)]
