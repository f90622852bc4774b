"""Documents: a stream of raw records from files, split cheaply and parsed only by the rank that needs their text.

A record is a line of a `.jsonl` (`.gz`, `.zst`) file, a row of a `.parquet` file, or a whole `.txt` file. Files may
hold anything: a record without usable text has a reason (`BadRecord`), and one of more than `MAX_BYTES` is passed over.
"""

import dataclasses
import gzip
import hashlib
import io
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Protocol

from megatron_retro.errors import UserError
from megatron_retro.reading import parse_json

MAX_BYTES = 1 << 27  # of a record: more than thirty million tokens of English
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")

_PARQUET_ROWS, _PARQUET_BUFFER = 32, 1 << 20


class BadRecord(Exception):
    """A record without usable text; the message is the reason, one of a few."""


class Record(Protocol):
    """One document, not yet parsed.

    Attributes:
        where: "file:line" (or row), for messages.
        num_bytes: its raw size; 0 where it is not held.
    """

    @property
    def where(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    def text(self, key: str) -> str:
        """The document's text; `key` names it in a JSON object.

        Raises:
            BadRecord: it has none.
        """


@dataclasses.dataclass(frozen=True)
class JsonLine:
    where: str
    raw: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.raw)

    def text(self, key: str) -> str:
        try:
            value = parse_json(_decoded(self.raw))
        except ValueError:
            raise BadRecord("broken JSON") from None
        if not isinstance(value, dict):
            raise BadRecord("not a JSON object")
        if key not in value:
            raise BadRecord(f"no key {key!r}")
        return _usable(value[key], key)

    def keys(self) -> str:
        """The keys that hold strings, for messages."""
        try:
            value = parse_json(_decoded(self.raw))
        except (ValueError, BadRecord):
            return ""
        return ", ".join(key for key, held in value.items() if isinstance(held, str)) if isinstance(value, dict) else ""


@dataclasses.dataclass(frozen=True)
class TooLong:
    """A record that was passed over unread."""

    where: str
    num_bytes: int = 0

    def text(self, key: str) -> str:
        raise BadRecord(f"longer than {MAX_BYTES >> 20} MiB")


@dataclasses.dataclass(frozen=True)
class ParquetRow:
    where: str
    raw: bytes | None

    @property
    def num_bytes(self) -> int:
        return len(self.raw or b"")

    def text(self, key: str) -> str:
        return _usable(None if self.raw is None else _decoded(self.raw), key)


@dataclasses.dataclass(frozen=True)
class TextFile:
    where: str
    num_bytes: int

    def text(self, key: str) -> str:
        return _usable(_decoded(pathlib.Path(self.where).read_bytes()), key)


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError:
        raise BadRecord("invalid UTF-8") from None


def _usable(text: Any, key: str) -> str:
    if not isinstance(text, str):
        raise BadRecord(f"{key!r} is not a string")
    if not text:
        raise BadRecord("empty text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800" is JSON, but no character
        raise BadRecord("lone surrogate") from None
    return text


@dataclasses.dataclass(frozen=True)
class Source:
    """One `--input` argument: a corpus and its files."""

    name: str
    path: str
    files: tuple[pathlib.Path, ...]

    @classmethod
    def find(cls, argument: str) -> "Source":
        """Find the files of a file or directory (recursively, sorted by path).

        Raises:
            UserError: no such file, none of a known kind, or an unknown kind.
        """
        path = pathlib.Path(argument).absolute()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
            if not files:
                raise UserError(f"--input {argument} holds no {', '.join(SUFFIXES)} file")
        elif not path.is_file():
            raise UserError(f"--input {argument}: no such file or directory")
        elif not path.name.endswith(SUFFIXES):
            raise UserError(f"--input {argument}: unknown kind of file; it takes {', '.join(SUFFIXES)}")
        else:
            files = [path]
        return cls(_stem(path), str(path), tuple(files))

    def fingerprint(self) -> str:
        """Names and sizes of the files: changes when a document is added, not when a file is only touched."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file}\0{file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        return f"{len(self.files)} files:{digest.hexdigest()[:16]}"

    @property
    def num_bytes(self) -> int:
        """Of all files, as they lie on disk."""
        return sum(file.stat().st_size for file in self.files)

    def records(self, key: str, advance: Callable[[int], None] = lambda num_bytes: None) -> Iterator[Record]:
        """All records, in order; `advance` is told now and then how many bytes on disk were read.

        Raises:
            UserError: a file that cannot be read to its end.
        """
        for file in self.files:
            if file.name.endswith(".parquet"):
                yield from _parquet_rows(file, key, advance)
            elif file.name.endswith(".txt"):
                size = file.stat().st_size
                yield TextFile(str(file), size) if size <= MAX_BYTES else TooLong(str(file))
                advance(size)
            else:
                yield from _lines(file, advance)


def find_sources(arguments: Iterable[str]) -> list[Source]:
    """The corpora of `--input`.

    Raises:
        UserError: two arguments would be one corpus name.
    """
    sources: dict[str, Source] = {}
    for argument in arguments:
        source = Source.find(argument)
        if source.name in sources:
            raise UserError(
                f"--input {sources[source.name].path} and {source.path} both name corpus {source.name!r}; "
                "rename one, or put both into one directory"
            )
        sources[source.name] = source
    return list(sources.values())


def blocks(records: Iterable[Record], max_records: int = 1000, max_bytes: int = 1 << 24) -> Iterator[list[Record]]:
    """Consecutive records in lists that depend on the records alone, so every rank cuts the same ones."""
    block: list[Record] = []
    num_bytes = 0
    for record in records:
        block.append(record)
        num_bytes += record.num_bytes
        if len(block) == max_records or num_bytes >= max_bytes:
            yield block
            block, num_bytes = [], 0
    if block:
        yield block


def _stem(path: pathlib.Path) -> str:
    if path.is_dir():
        return path.name
    suffix = max((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), key=len)
    return path.name[: -len(suffix)]


def _lines(file: pathlib.Path, advance: Callable[[int], None]) -> Iterator[Record]:
    try:
        with open(file, "rb") as compressed, _unpacked(compressed) as lines:
            told = 0
            for number, raw in enumerate(iter(lambda: lines.readline(MAX_BYTES + 1), b""), 1):
                if len(raw) > MAX_BYTES:
                    while raw and not raw.endswith(b"\n"):
                        raw = lines.readline(1 << 20)
                    yield TooLong(f"{file}:{number}")
                elif not raw.isspace():
                    yield JsonLine(f"{file}:{number}", raw)
                if compressed.tell() > told:
                    advance(compressed.tell() - told)
                    told = compressed.tell()
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"--input {file}: cannot be read to its end ({error}); fetch the file again") from None


def _unpacked(file: BinaryIO) -> BinaryIO:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.name.endswith(".zst"):
        return _unpacked_zstandard(file)
    return file


def _unpacked_zstandard(file: BinaryIO) -> BinaryIO:
    """Through pyarrow: zstandard's own reader takes a file that ends inside a frame for a complete one."""
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
    return io.BufferedReader(stream, 1 << 20)  # type: ignore[arg-type, return-value]


def _parquet_rows(file: pathlib.Path, key: str, advance: Callable[[int], None]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Without a buffer of its own size a whole row group would be read at once.
        with pyarrow.parquet.ParquetFile(file, buffer_size=_PARQUET_BUFFER) as table:
            names = table.schema_arrow.names
            if names.count(key) != 1:
                found = f"has no column {key!r}" if key not in names else f"has {names.count(key)} columns {key!r}"
                raise UserError(f"--input {file} {found} (--json-key), only {names}")
            row = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[key]):
                for value in batch.column(0).cast(pyarrow.large_binary()):
                    row += 1
                    is_long = value.is_valid and value.as_buffer().size > MAX_BYTES
                    where = f"{file}:row {row}"
                    yield TooLong(where) if is_long else ParquetRow(where, value.as_py())
            advance(file.stat().st_size)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--input {file}: cannot be read as Parquet text ({first_line})") from None
