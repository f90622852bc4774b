"""The one way in which files reach the disk, and how it is seen later that they are still the same.

    temporary name → write → fsync → rename → fsync of the directory → its fingerprint in a record → the record

A file under its own name is complete, after any crash. Temporary names are `<name>.partial`: whoever makes the file
again takes the same one. A fingerprint guards against accidents; it is no signature.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import xxhash

from megatron_retro.errors import UserError
from megatron_retro.reading import parse_json

_WINDOW_BYTES, _NUM_WINDOWS = 1 << 16, 64
_READ_BYTES = 1 << 20

# What a disk says that has no room, or that cannot be written to any more.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BROKEN = {errno.EROFS, errno.EIO}


# ------------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path to write a file or directory to; behind the block it is synced and takes the name `path`.

    Raises:
        UserError: the disk is full, or cannot be written to; `path` is what it was.
    """
    temporary = path.with_name(f"{path.name}.partial")
    with explained(path):
        try:
            make_directory(path.parent)
            remove(temporary)
            yield temporary
            sync_tree(temporary)
            os.replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise
        sync(path.parent)


def write_atomically(path: pathlib.Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a temporary file, then give it its name: `path` is complete or absent, also after a crash."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write(file)


def save_npy(path: pathlib.Path, array: np.ndarray) -> None:
    """Write an array past numpy's own way to write files, which tells neither why it could not nor always that."""
    with replacing(path) as temporary, for_library(temporary) as stream:
        np.lib.format.write_array(stream, array, allow_pickle=False)


def append_line(file: BinaryIO, value: Any) -> None:
    """Append a value as a line of JSON; it is on the disk when this returns. `file` is opened "ab", unbuffered."""
    with explained(pathlib.Path(file.name)):
        line = json.dumps(value).encode() + b"\n"
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())


def whole_lines(path: pathlib.Path) -> list[bytes]:
    """The lines of a file; a last one that a crash has left without its end is cut off, and so not among them."""
    content = path.read_bytes() if path.exists() else b""
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    return content[:end].splitlines()


@contextlib.contextmanager
def explained(path: pathlib.Path) -> Iterator[None]:
    """Around writing to `path`: what a full or broken disk says becomes one line.

    Raises:
        UserError: names the file and the way out.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM | _BROKEN:
            way_out = "make room" if error.errno in _NO_ROOM else "mend the disk"
            raise UserError(
                f"{path} cannot be written ({os.strerror(error.errno or 0)}); {way_out} and run the same command "
                "again: what was finished is kept"
            ) from error
        raise


@contextlib.contextmanager
def for_library(path: pathlib.Path) -> Iterator[Any]:
    """A file that a library in C++ writes, synced; such libraries lose the cause of a failed write, or the failure.

    Raises:
        OSError: what the disk refused, behind the block.
    """
    try:
        with open(path, "wb") as file:
            stream = Stream(file)
            yield stream
            if stream.error:
                raise stream.error
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


class Stream:
    """A file that takes everything, also when it is full.

    Attributes:
        error: what the disk refused first.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return self._file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        """At the end."""

    def close(self) -> None:
        """At the end."""


def check_writable(flag: str, directory: pathlib.Path) -> None:
    """Check that a directory can be written to, or made, so that a long run does not find out at its end.

    Raises:
        UserError: it cannot.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{flag} {directory} cannot be written to ({error.strerror}); give another directory") from None


def lock(flag: str, directory: pathlib.Path) -> BinaryIO:
    """Keep other runs from writing to a directory until the file returned is closed (by one rank).

    Raises:
        UserError: one does.
    """
    with explained(directory):
        make_directory(directory)
        file = open(directory / ".lock", "ab")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # processes that this one forks do not hold it
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"{flag} {directory}: another run is writing there; wait for its end, or stop it") from None
    except OSError:  # a file system without locks
        pass
    return file


def make_directory(path: pathlib.Path) -> None:
    """Make a directory, and those above it, that are not there; their names survive a power cut."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync(place.parent)


def sync(path: pathlib.Path) -> None:
    """Make a file's content, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: pathlib.Path) -> None:
    """`sync` a file, or a directory with all that is in it."""
    if path.is_dir():
        for inside in sorted(path.iterdir()):
            sync_tree(inside)
    sync(path)


def remove(path: pathlib.Path) -> None:
    """Remove a file or directory that this package made for the time being, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: pathlib.Path, ending: str = "damaged") -> pathlib.Path:
    """Give a file or directory a new name beside its own, and return that."""
    names = (path.with_name(f"{path.name}.{ending}{number or ''}") for number in range(1_000_000))
    aside = next(name for name in names if not name.exists())
    os.rename(path, aside)
    sync(path.parent)
    return aside


# ------------------------------------------------------------------------------------------------ fingerprints


Advance = Callable[[int], None]  # told how many bytes were read


def fingerprint(path: pathlib.Path, advance: Advance = lambda num_bytes: None) -> str:
    """`<size>:<xxh3 of all>`, for files above 4 MiB also `:<xxh3 of 64 evenly spread windows of 64 KiB>`."""
    whole = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(_READ_BYTES):
            whole.update(piece)
            advance(len(piece))
    parts = [str(path.stat().st_size), whole.hexdigest()]
    return ":".join(parts + ([_windows(path)] if int(parts[0]) > _WINDOW_BYTES * _NUM_WINDOWS else []))


def is_same(path: pathlib.Path, recorded: str, *, full: bool, advance: Advance = lambda num_bytes: None) -> bool:
    """Whether a file still has its fingerprint; unless `full`, of a large file its size and windows are looked at."""
    size, _, *windows = recorded.split(":")
    if not path.is_file() or path.stat().st_size != int(size):
        return False
    return _windows(path) == windows[0] if windows and not full else fingerprint(path, advance) == recorded


def found(path: pathlib.Path) -> str:
    """What there is in the place of a file, for messages."""
    return fingerprint(path) if path.is_file() else "no such file"


def _windows(path: pathlib.Path) -> str:
    size, digest = path.stat().st_size, xxhash.xxh3_128()
    with open(path, "rb") as file:
        for window in range(_NUM_WINDOWS):
            file.seek((size - _WINDOW_BYTES) * window // (_NUM_WINDOWS - 1))
            digest.update(file.read(_WINDOW_BYTES))
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Of plain values, as JSON."""
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ sealed JSON


def write_sealed(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Write plain values with their own digest, so that `read_sealed` notices a single flipped bit."""
    text = json.dumps({**value, "digest": digest_of(value)}, indent=1, sort_keys=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def read_sealed(path: pathlib.Path) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        ValueError: it is something else, to the byte.
    """
    text = path.read_bytes()
    value = parse_json(text)
    if not isinstance(value, dict) or "digest" not in value:
        raise ValueError("it has no digest")
    recorded = value.pop("digest")
    if recorded != digest_of(value):
        raise ValueError(f"its digest is {recorded}, of what it holds {digest_of(value)}")
    if text != json.dumps({**value, "digest": recorded}, indent=1, sort_keys=True).encode():
        raise ValueError("it is not as it was written")
    return value
