"""The work dir: a manifest in which every stage names its files and what it was made from.

    manifest.json                   settings, and one record a finished stage (see `STAGES`)
    manifest.copy.json              the same, should the first be damaged
    unfinished/<stage>.<rank>.jsonl what a rank has made of a stage that is not finished: a file and its fingerprint
    tokenizer/                      the tokenizer's file
    corpus/<name>.bin .idx          one document = one sequence (absent where the user's own prefix is used in place)
    chunks/<name>.npy               first chunk id of each document, [num_documents + 1] int64
    embeddings/<name>/<a>-<b>.npy   embeddings of chunks a … b-1 of the corpus, [b-a, E] float16
    index/                          trained.faiss, and shard-<i>.faiss holding the database's chunks
    neighbors/<name>/<a>-<b>.*.npy  ids [b-a, K_saved] int64 (-1: none), distances [b-a, K_saved] float32
    neighbors/project.npy           those that a Megatron project had: a chunk id, then its neighbors, [m, 1 + K] int64
    report/                         figures for people
    sft/                            what instruction tuning has found (see `training/instructions.py`); in no record

The directories of chunks, embeddings, index and neighbors carry a number (`neighbors.2/`) where documents were added or
removed since the work dir was first built; `WorkDir.directory` knows. Such a change is prepared beside the manifest in
`manifest.next.json`, which then takes its name: a reader sees the old state or the new one.

A stage's record holds `facts` (plain values), `files` (path -> fingerprint), `parent` (the digest of the stage before
it) and `digest` (of all three): a chain, so exchanging anything is seen. Records are written last: existence means
complete. Nothing in a work dir is overwritten by a different value, and only the task `compact` deletes: files that no
record names any more. A damaged file is set aside and made again: to the same bytes, else its stage stays unfinished.
"""

import contextlib
import json
import os
import pathlib
import shlex
from collections.abc import Callable
from typing import Any

from megatron_retro import distributed, storage
from megatron_retro.errors import UserError
from megatron_retro.reading import parse_json

STAGES = ("tokenizer", "corpus", "chunks", "embeddings", "index", "neighbors")
FORMAT_VERSION = 3
NEXT = "manifest.next.json"
COPY = "manifest.copy.json"
BACKUP = "restore it from a backup"


class WorkDir:
    """A `--retro-work-dir`: its manifest's settings and stage records.

    Args:
        path: the directory.
        manifest_name: the file to read and write; `NEXT` for a change that is being prepared.
        full: whether files are compared by every byte; otherwise small ones, and of large ones 64 windows and the size.

    Raises:
        UserError: the manifest is not readable as one of this version.
    """

    def __init__(self, path: str | os.PathLike, manifest_name: str = "manifest.json", *, full: bool = False):
        self.path, self._manifest_name, self.full = pathlib.Path(path), manifest_name, full
        self.manifest: dict[str, Any] = {"version": FORMAT_VERSION, "settings": {}, "stages": {}, "damaged": {}}
        self.reload()

    def reload(self) -> None:
        """Read the manifest again, after another rank wrote it."""
        file = self.path / self._manifest_name
        if file.exists():
            self.manifest = _read_manifest(file)

    def on_rank_0(self, act: Callable[[], Any]) -> None:
        """Let rank 0 act while the others wait; then all read the manifest again. Every rank calls it."""
        distributed.together(lambda: act() if distributed.rank() == 0 else None)
        distributed.together(self.reload)  # before rank 0 writes the next one

    @property
    def is_next(self) -> bool:
        """Whether this is a change that is being prepared."""
        return self._manifest_name == NEXT

    @property
    def settings(self) -> dict[str, Any]:
        return self.manifest["settings"]

    def write(self) -> None:
        """Write the manifest (by one rank)."""
        storage.write_sealed(self.path / self._manifest_name, self.manifest)
        if not self.is_next:
            storage.write_sealed(self.path / COPY, self.manifest)

    def publish(self) -> None:
        """Let this manifest take the place of `manifest.json` (by one rank)."""
        os.replace(self.path / self._manifest_name, self.path / "manifest.json")
        storage.sync(self.path)
        storage.write_sealed(self.path / COPY, self.manifest)

    def has_copy(self) -> bool:
        """Whether the manifest's copy is the same."""
        try:
            return storage.read_sealed(self.path / COPY) == self.manifest
        except (ValueError, OSError):
            return False

    def renew_copy(self) -> None:
        """Make the manifest's copy the same, where a crash came between the two (by one rank)."""
        if not self.has_copy() and (self.path / "manifest.json").exists():
            storage.write_sealed(self.path / COPY, self.manifest)

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

    # -------------------------------------------------------------------------------------------- making

    def unfinished(self, stage: str) -> "Unfinished":
        """What is there of a stage that is not finished."""
        return Unfinished(self, stage)

    def commit(self, stage: str, facts: dict[str, Any], files: list[pathlib.Path]) -> None:
        """Record a stage as complete (by one rank, after all wrote their files).

        Raises:
            UserError: it was finished before, lost a file, and is not what it was.
        """
        prints = self.unfinished(stage).prints
        names = {self.name(file): file for file in sorted(files)}
        recorded = {name: prints.get(name) or storage.fingerprint(file) for name, file in names.items()}
        record = {"facts": facts, "files": recorded, "parent": self._parent_digest(stage)}
        record["digest"] = storage.digest_of(record)
        if (before := self.manifest["damaged"].get(stage)) and before != record:
            self._refuse_repair(stage, before, record)
        self.manifest["damaged"].pop(stage, None)
        self.manifest["stages"][stage] = record
        self.write()
        self.tidy()

    def tidy(self) -> None:
        """Remove the notes about stages that are finished (by one rank)."""
        folder = self.path / "unfinished"
        for stage in self.manifest["stages"]:
            for file in folder.glob(f"{stage}.*.jsonl"):
                file.unlink()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _refuse_repair(self, stage: str, before: dict[str, Any], record: dict[str, Any]) -> None:
        pairs = [(name, before["files"].get(name), print_) for name, print_ in record["files"].items()]
        name, was, is_now = next(
            (pair for pair in pairs if pair[1] != pair[2]), (stage, before["facts"], record["facts"])
        )
        raise UserError(
            f"--retro-work-dir {self.path}: {name} was {was} and is {is_now} when made again; restore it from a "
            "backup, repair on the kind of machine that built the work dir, or build a new one"
        )

    # ------------------------------------------------------------------------------------------ verifying

    def verify(self, stages: tuple[str, ...] = STAGES) -> None:
        """Check that stages are complete, unexchanged, and made from one another; every rank calls it.

        Raises:
            UserError: names the stage or file, and both values, on every rank.
        """
        distributed.together(lambda: self.check_chain(stages))
        for name, was in self.damaged(stages):
            raise UserError(
                f"--retro-work-dir {self.path}: file {name} was {was} when it was recorded, is now "
                f"{storage.found(self.path / name)}; {self._way_out(name)}"
            )

    def damaged(
        self, stages: tuple[str, ...] = STAGES, advance: storage.Advance = lambda num_bytes: None
    ) -> list[tuple[str, str]]:
        """(name, recorded fingerprint) of files that are not what they were; ranks share the reading, all call it.

        Args:
            advance: told how many bytes were read.
        """
        files = [item for stage in stages for item in self.manifest["stages"][stage]["files"].items()]
        mine = files[distributed.rank() :: distributed.world_size()]

        def look() -> list[tuple[str, str]]:
            return [item for item in mine if not self._is_same(item[0], item[1], advance)]

        found = distributed.all_gather(distributed.together(look))
        order = {name: number for number, (name, _) in enumerate(files)}
        return sorted((item for of_rank in found for item in of_rank), key=lambda item: order[item[0]])

    def _is_same(self, name: str, recorded: str, advance: storage.Advance) -> bool:
        return storage.is_same(self.path / name, recorded, full=self.full, advance=advance)

    def repair(self, name: str) -> str:
        """What repairs a damaged file, by its name in the manifest: a command, or `BACKUP`."""
        if pathlib.Path(name).is_absolute():
            return BACKUP
        program = ["python", "tools/preprocess_retro_data.py"]
        return shlex.join([*program, "--retro-work-dir", str(self.path), "--verify-data", "full"])

    def _way_out(self, name: str) -> str:
        repair = self.repair(name)
        return repair if repair == BACKUP else f"{repair} makes it again"

    def set_damaged_aside(self, damaged: list[tuple[str, str]]) -> None:
        """Set damaged files aside, and their stages back to unfinished (by one rank).

        Raises:
            UserError: a file that lies outside of the work dir is damaged.
        """
        for name, was in damaged:
            if pathlib.Path(name).is_absolute():
                raise UserError(
                    f"{name} was {was} when --retro-work-dir {self.path} was made, is now "
                    f"{storage.found(pathlib.Path(name))}; {self._way_out(name)}"
                )
        names = {name for name, _ in damaged}
        for stage in STAGES:
            if self.has(stage) and names & set(self.manifest["stages"][stage]["files"]):
                self.manifest["damaged"][stage] = self.manifest["stages"].pop(stage)
        self.write()
        for name, was in damaged:
            if (self.path / name).exists():
                _set_aside(self.path / name, was)

    def check_chain(self, stages: tuple[str, ...]) -> None:
        """Check the records of stages: that each was made from the one before.

        Raises:
            UserError: names the field, and both values.
        """
        for stage in stages:
            self.facts(stage)
            record = self.manifest["stages"][stage]
            self._check(f"{stage}.parent", record["parent"], self._parent_digest(stage))
            body = {key: record[key] for key in ("facts", "files", "parent")}
            self._check(f"{stage}.digest", record["digest"], storage.digest_of(body))

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
        before = STAGES[position - 1]
        if before in self.manifest["damaged"]:
            return self.manifest["damaged"][before]["digest"]
        self.facts(before)
        return self.manifest["stages"][before]["digest"]

    def name(self, file: pathlib.Path) -> str:
        """A path as the manifest writes it: relative inside the work dir, absolute outside."""
        file = file.absolute()
        inside = file.is_relative_to(self.path.absolute())
        return str(file.relative_to(self.path.absolute()) if inside else file)


def digest_of_tokenizer(facts: dict[str, Any], file: pathlib.Path) -> str:
    """The digest of the record that a work dir with this tokenizer has."""
    return storage.digest_of({"facts": facts, "files": {facts["file"]: storage.fingerprint(file)}, "parent": ""})


class Unfinished:
    """The files of a stage that are made already, noted by every rank as it goes.

    Attributes:
        prints: path, as the manifest names it -> fingerprint.
    """

    def __init__(self, work: WorkDir, stage: str):
        self._work, self._from = work, work._parent_digest(stage)
        self._folder, self._stage = work.path / "unfinished", stage
        before = WorkDir(work.path).manifest["stages"] if work.is_next else work.manifest["damaged"]
        self.prints: dict[str, str] = dict(before.get(stage, {}).get("files", {}))
        for file in sorted(self._folder.glob(f"{stage}.*.jsonl")):
            for line in file.read_bytes().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # cut by a crash: what it told is made again
                    noted = json.loads(line)
                    if noted["from"] == self._from:
                        self.prints[noted["file"]] = noted["fingerprint"]

    def has(self, *paths: pathlib.Path) -> bool:
        """Whether all of some files were made and are what they were; one that is not is set aside."""
        for path in paths:
            recorded = self.prints.get(self._work.name(path))
            if recorded is None or not path.exists():
                return False
            if not storage.is_same(path, recorded, full=self._work.full):
                _set_aside(path, recorded)
                return False
        return True

    def note(self, *paths: pathlib.Path) -> None:
        """Note that this rank has made files."""
        file = self._folder / f"{self._stage}.{distributed.rank()}.jsonl"
        with storage.explained(file):
            storage.make_directory(self._folder)
            storage.whole_lines(file)  # cuts one that is not
            with open(file, "ab", buffering=0) as lines:
                for path in paths:
                    name, print_ = self._work.name(path), storage.fingerprint(path)
                    storage.append_line(lines, {"file": name, "fingerprint": print_, "from": self._from})
                    self.prints[name] = print_


def _read_manifest(file: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = storage.read_sealed(file)
        version = manifest["version"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        version = _version(file)
        if version in (None, FORMAT_VERSION):
            raise UserError(f"{file} is damaged ({error}); {_way_out(file)}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has version {version}, this program reads {FORMAT_VERSION}; build a new work dir")
    return manifest


def _version(file: pathlib.Path) -> Any:
    """What a manifest that is not as it was written says about itself; None where it says nothing."""
    try:
        return parse_json(file.read_bytes())["version"]
    except (ValueError, KeyError, TypeError, OSError):
        return None


def _way_out(file: pathlib.Path) -> str:
    copy = file.with_name(COPY)
    try:
        storage.read_sealed(copy)
    except (ValueError, OSError):
        return "restore it from a backup"
    return f"its copy is sound: mv {file} {file}.damaged && cp {copy} {file}" if file.name != NEXT else "remove it"


def _set_aside(path: pathlib.Path, recorded: str) -> None:
    is_now = storage.found(path)
    aside = storage.set_aside(path)
    line = f"{path} was {recorded} when it was recorded, is now {is_now}: moved to {aside.name}, will be made again\n"
    os.write(2, line.encode())  # at once, beside the lines of other ranks
