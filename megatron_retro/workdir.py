"""The work dir: atomic files, and a manifest in which every stage names what it was made from.

    manifest.json                   settings, and one record a finished stage (see `STAGES`)
    tokenizer/                      the tokenizer's file
    corpus/<name>.bin .idx          one document = one sequence (absent where the user's own prefix is used in place)
    chunks/<name>.npy               first chunk id of each document, [num_documents + 1] int64
    embeddings/<name>/<a>-<b>.npy   embeddings of chunks a … b-1 of the corpus, [b-a, E] float16
    index/                          trained.faiss, and shard-<i>.faiss holding the database's chunks
    neighbors/<name>/<a>-<b>.*.npy  ids [b-a, K_saved] int64 (-1: none), distances [b-a, K_saved] float32
    report/                         figures for people

The directories of chunks, embeddings, index and neighbors carry a number (`neighbors.2/`) where documents were added or
removed since the work dir was first built; `WorkDir.directory` knows. Such a change is prepared beside the manifest in
`manifest.next.json`, which then takes its name: a reader sees the old state or the new one.

A stage's record holds `facts` (plain values), `files` (path -> fingerprint), `parent` (the digest of the stage before
it) and `digest` (of all three): a chain, so exchanging anything is seen. Records are written last: existence means
complete. Nothing in a work dir is overwritten by a different value, and only the task `compact` deletes: files that no
record names any more.
"""

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from megatron_retro import distributed
from megatron_retro.errors import UserError

STAGES = ("tokenizer", "corpus", "chunks", "embeddings", "index", "neighbors")
FORMAT_VERSION = 2
NEXT = "manifest.next.json"

_WINDOW_BYTES, _NUM_WINDOWS = 1 << 16, 64


class WorkDir:
    """A `--retro-work-dir`: its manifest's settings and stage records.

    Args:
        path: the directory.
        manifest_name: the file to read and write; `NEXT` for a change that is being prepared.

    Raises:
        UserError: the manifest is not readable as one of this version.
    """

    def __init__(self, path: str | os.PathLike, manifest_name: str = "manifest.json"):
        self.path, self._manifest_name = pathlib.Path(path), manifest_name
        self.manifest: dict[str, Any] = {"version": FORMAT_VERSION, "settings": {}, "stages": {}}
        self.reload()

    def reload(self) -> None:
        """Read the manifest again, after another rank wrote it."""
        file = self.path / self._manifest_name
        if not file.exists():
            return
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            version = manifest["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not a work dir's manifest ({error}); restore it from a backup") from None
        if version != FORMAT_VERSION:
            raise UserError(f"{file} has version {version}, this program reads {FORMAT_VERSION}; build a new work dir")
        self.manifest = manifest

    def on_rank_0(self, act: Callable[[], Any]) -> None:
        """Let rank 0 act while the others wait; then all read the manifest again. Every rank calls it."""
        distributed.together(lambda: act() if distributed.rank() == 0 else None)
        self.reload()

    @property
    def settings(self) -> dict[str, Any]:
        return self.manifest["settings"]

    def write(self) -> None:
        """Write the manifest (by one rank)."""
        text = json.dumps(self.manifest, indent=1, sort_keys=True)
        write_atomically(self.path / self._manifest_name, lambda file: file.write(text.encode()))

    def publish(self) -> None:
        """Let this manifest take the place of `manifest.json` (by one rank)."""
        os.replace(self.path / self._manifest_name, self.path / "manifest.json")
        sync_directory(self.path)

    def directory(self, stage: str) -> pathlib.Path:
        """Where the files of a stage lie."""
        return self.path / self.settings.get("directories", {}).get(stage, stage)

    def has(self, stage: str) -> bool:
        return stage in self.manifest["stages"]

    def facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage recorded.

        Raises:
            UserError: the stage has not been run.
        """
        if not self.has(stage):
            raise UserError(
                f"--retro-work-dir {self.path}: the stage {stage!r} is not finished; "
                "run tools/preprocess_retro_data.py on it"
            )
        return self.manifest["stages"][stage]["facts"]

    def commit(self, stage: str, facts: dict[str, Any], files: list[pathlib.Path]) -> None:
        """Record a stage as complete (by one rank, after all wrote their files)."""
        prints = {self._name(file): fingerprint(file) for file in sorted(files)}
        record = {"facts": facts, "files": prints, "parent": self._parent_digest(stage)}
        self.manifest["stages"][stage] = {**record, "digest": _digest(record)}
        self.write()

    def verify(self, stages: tuple[str, ...] = STAGES) -> None:
        """Check that the named stages are complete, unexchanged, and made from one another.

        Reads every small file and 64 windows of every large one.

        Raises:
            UserError: names the stage or file, and both values.
        """
        for stage in stages:
            self.facts(stage)
            record = self.manifest["stages"][stage]
            self._check(f"{stage}.parent", record["parent"], self._parent_digest(stage))
            body = {key: record[key] for key in ("facts", "files", "parent")}
            self._check(f"{stage}.digest", record["digest"], _digest(body))
            for name, recorded in record["files"].items():
                file = self.path / name
                found = fingerprint(file) if file.exists() else "no such file"
                self._check(f"{stage} file {name}", recorded, found)

    def _check(self, field: str, recorded: Any, found: Any) -> None:
        if recorded != found:
            raise UserError(
                f"--retro-work-dir {self.path}: {field} was {recorded} when the manifest was written, is now {found}; "
                "restore what was exchanged, or build a new work dir"
            )

    def _parent_digest(self, stage: str) -> str:
        position = STAGES.index(stage)
        if position == 0:
            return ""
        self.facts(STAGES[position - 1])
        return self.manifest["stages"][STAGES[position - 1]]["digest"]

    def _name(self, file: pathlib.Path) -> str:
        """A path as the manifest writes it: relative inside the work dir, absolute outside."""
        file = file.absolute()
        inside = file.is_relative_to(self.path.absolute())
        return str(file.relative_to(self.path.absolute()) if inside else file)


def write_atomically(path: pathlib.Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a temporary file, then give it its name: `path` is complete or absent, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


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


def sync_directory(path: pathlib.Path) -> None:
    """Make renames inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_npy(path: pathlib.Path, array: np.ndarray) -> None:
    write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))


def load_npy(path: pathlib.Path) -> np.ndarray:
    return np.load(path, allow_pickle=False)


def fingerprint(path: pathlib.Path) -> str:
    """Size and SHA-256: of the whole file up to 4 MiB, else of 64 evenly spread windows of 64 KiB.

    Tells an exchanged file from the right one in bounded time; it is not a guard against single flipped bits.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= _WINDOW_BYTES * _NUM_WINDOWS:
            digest.update(file.read())
        else:
            for window in range(_NUM_WINDOWS):
                file.seek((size - _WINDOW_BYTES) * window // (_NUM_WINDOWS - 1))
                digest.update(file.read(_WINDOW_BYTES))
    return f"{size}:{digest.hexdigest()[:32]}"


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]
