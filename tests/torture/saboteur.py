"""Runs a program with a fault point before each of its writes to the disk, and kills it at one of them.

The program knows nothing of it: Python's audit hooks see files opened, renamed and removed, and a few functions that
write are wrapped before it starts, in the process that becomes it; the helpers that it forks inherit that. Each rank
counts its fault points from 1 on. At a write, half of it still reaches the file.

    <folder>/events.<rank>    one line a fault point: when, number, kind, path, new path, copy of what it replaces
    <folder>/facts.<rank>     one line a training batch or update, see `_note_facts`
    <folder>/stdout, stderr   of all ranks

A launch is a process group of its own, which dies as a whole: nothing that it started outlives it.
"""

import atexit
import builtins
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from launch import ROOT, _server

SECONDS = 300  # a program may take
_CHANGES = {"os.remove": "remove", "os.rmdir": "rmdir", "os.mkdir": "mkdir", "os.truncate": "truncate"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """Where a launch is killed: before fault point `point` of rank `rank`, or `seconds` after its start.

    Attributes:
        alone: that rank alone dies, the others a moment later, as under a launcher; else all at once.
    """

    rank: int = 0
    point: int = 0
    alone: bool = False
    seconds: float = float("inf")


@dataclasses.dataclass(frozen=True)
class Event:
    """One fault point that was reached, which is to say, begun."""

    time: int
    rank: int
    number: int
    kind: str
    path: str
    second: str
    replaced: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a launch ended.

    Attributes:
        killed: by its fault; it else ended by itself, with `code`.
        text: what it printed.
        events: in the order of time.
        facts: of all ranks, in the order in which each wrote them.
        seconds: that it took.
    """

    killed: bool
    code: int
    text: str
    events: list[Event]
    facts: list[dict[str, Any]]
    seconds: float


def launch(
    arguments: list[object],
    watched: pathlib.Path,
    *,
    ranks: int = 1,
    fault: Fault | None = None,
    reload: pathlib.Path | None = None,
) -> Outcome:
    """Run a program to its end, or to its fault.

    Args:
        arguments: the program's path from the repository's root, and its flags.
        watched: the directory in which fault points lie.
        reload: where a training run saves, at once, the checkpoint that it has loaded.

    Raises:
        TimeoutError: it does not end.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        orders = _Orders(name, str(watched.absolute()), ranks, port, fault or Fault(), str(reload or ""))
        leader = _server().Process(target=_lead, args=(orders, [str(word) for word in arguments]))
        start = time.monotonic()
        leader.start()
        leader.join(min(SECONDS, orders.fault.seconds))
        timed_out = leader.exitcode is None and orders.fault.seconds > SECONDS
        _kill_group(leader.pid)
        leader.join()
        seconds, text = time.monotonic() - start, "".join(_read(folder / name) for name in ("stdout", "stderr"))
        if timed_out:
            raise TimeoutError(f"{' '.join(map(str, arguments))} did not end in {SECONDS} seconds\n{text}")
        code = int(_read(folder / "code") or -signal.SIGKILL)
        events = sorted(_events(folder, ranks), key=lambda event: event.time)
        lines = [(rank, line) for rank in range(ranks) for line in _read(folder / f"facts.{rank}").splitlines()]
        facts = [{"rank": rank, **json.loads(line)} for rank, line in lines]
        copies = folder / "replaced"
        if code == -signal.SIGKILL and copies.exists():  # for `cut_power`
            shutil.copytree(copies, _copies_of(watched), dirs_exist_ok=True)
        return Outcome(code == -signal.SIGKILL, code, text, events, facts, seconds)


def _read(file: pathlib.Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _events(folder: pathlib.Path, ranks: int) -> Iterator[Event]:
    for rank in range(ranks):
        for line in _read(folder / f"events.{rank}").splitlines():
            at, number, kind, *paths = line.split("\t")
            yield Event(int(at), rank, int(number), kind, *paths)


def _kill_group(group: int) -> None:
    """Kill all processes of a group, and wait until none is there (one that nobody reaped does nothing any more)."""
    deadline = time.monotonic() + 30
    while _members(group):
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, f"process group {group} does not die: {_members(group)}"
        time.sleep(0.01)


def _members(group: int) -> list[int]:
    found = []
    for place in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = place.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(of_group) == group and state != "Z":
            found.append(int(place.parent.name))
    return found


# ------------------------------------------------------------------------------------------------ in the launch


@dataclasses.dataclass(frozen=True)
class _Orders:
    folder: str
    watched: str
    ranks: int
    port: int
    fault: Fault
    reload: str


def _lead(orders: _Orders, arguments: list[str]) -> None:
    """Fork the ranks; when one has failed, end all with it."""
    os.setsid()
    running, codes = [_fork(orders, rank, arguments) for rank in range(orders.ranks)], list[int]()
    while running and not any(codes):
        codes += _ended(running)
        time.sleep(0.01)
    if any(codes):
        time.sleep(random.random() / 5 if orders.fault.alone else 0)  # until a launcher would have seen it
        codes += _ended(running)
    if -signal.SIGKILL not in codes:  # a rank that misses a killed one fails too
        pathlib.Path(orders.folder, "code").write_text(str(next(filter(None, codes), 0)))
    if any(codes):
        os.killpg(0, signal.SIGKILL)


def _ended(running: list[int]) -> list[int]:
    """Exit codes of ranks that have ended, which go from `running`."""
    codes = []
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            running.remove(pid)
            codes.append(os.waitstatus_to_exitcode(status))
    return codes


def _fork(orders: _Orders, rank: int, arguments: list[str]) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{orders.folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.chdir(ROOT)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": orders.ranks, "LOCAL_WORLD_SIZE": orders.ranks}
        more = {**places, "MASTER_ADDR": "localhost", "MASTER_PORT": orders.port} if orders.ranks > 1 else {}
        os.environ.update({name: str(value) for name, value in more.items()})
        sys.argv = arguments
        _make_runs_alike()
        _note_facts(f"{orders.folder}/facts.{rank}", orders.reload)
        _FaultPoints(orders, rank).install()
        runpy.run_path(arguments[0], run_name="__main__")
        atexit._run_exitfuncs()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _FaultPoints:
    """Counts what this rank and its helpers are about to do to watched files; does the killing."""

    def __init__(self, orders: _Orders, rank: int):
        self._orders, self._fault, self._pid = orders, orders.fault, os.getpid()
        self._is_mine = self._fault.rank == rank
        self._count = multiprocessing.get_context("fork").Value("q", 0)
        self._log = os.open(f"{orders.folder}/events.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def install(self) -> None:
        import faiss
        import torch

        sys.addaudithook(self._audit)
        os.fsync = functools.partial(self._fsync, os.fsync)
        builtins.open = io.open = functools.partial(self._open, io.open)
        self._wrap(faiss, "write_index", 1)
        self._wrap(torch, "save", 1)

    def reach(self, kind: str, path: object, second: object = "", half: Callable[[], object] | None = None) -> None:
        """Count a fault point, and die there if it is the one; `half` does half of what would follow."""
        if not self._watches(path) and not self._watches(second):
            return
        with self._count.get_lock():
            self._count.value += 1
            number = self._count.value
        replaced = self._copy(second) if kind == "rename" else ""
        names = [os.path.abspath(os.fsdecode(name)) if name else "" for name in (path, second)]  # type: ignore[arg-type]
        os.write(self._log, "\t".join([str(time.monotonic_ns()), str(number), kind, *names, replaced]).encode() + b"\n")
        if self._is_mine and number == self._fault.point:
            if half:
                half()
            if self._fault.alone:
                os.kill(self._pid, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            os.killpg(0, signal.SIGKILL)
            time.sleep(60)

    def _watches(self, path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike) or not path:
            return False
        return (os.path.abspath(os.fsdecode(path)) + "/").startswith(self._orders.watched + "/")

    def _copy(self, path: object) -> str:
        """A second name for a file that a rename is about to replace; "" where there is none."""
        name = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
        if not (self._fault.point or self._fault.seconds < SECONDS) or not os.path.isfile(name):
            return ""
        copies = f"{self._orders.folder}/replaced"
        os.makedirs(copies, exist_ok=True)
        copy = f"{copies}/{time.monotonic_ns()}"
        os.link(name, copy) if os.stat(name).st_dev == os.stat(copies).st_dev else shutil.copyfile(name, copy)
        return os.path.basename(copy)

    def _audit(self, event: str, given: tuple) -> None:
        if event == "open":
            path, _, flags = given
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and flags & os.O_TMPFILE != os.O_TMPFILE:
                self.reach("open" if os.path.exists(path) else "create", path)
        elif event == "os.rename":
            self.reach("rename", given[0], given[1])
        elif event in _CHANGES and os.path.exists(given[0]) == (event != "os.mkdir"):  # else it does nothing
            self.reach(_CHANGES[event], given[0])

    def _fsync(self, original: Callable, file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        self.reach("fsync", os.readlink(f"/proc/self/fd/{number}"))
        original(number)

    def _open(
        self, original: Callable, file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any
    ) -> Any:
        if buffering == 0 or "+" in mode or not set(mode) & set("wax") or not self._watches(file):
            return original(file, mode, buffering, *more, **named)
        opener = named.pop("opener", None)
        writer = _Writer(io.FileIO(file, mode.replace("b", "").replace("t", ""), opener=opener), self, file)
        return writer if "b" in mode else io.TextIOWrapper(writer, *more, **named)

    def _wrap(self, module: Any, name: str, place: int) -> None:
        """Watch a function that writes a whole file, named by its argument `place`, past Python."""
        original = getattr(module, name)

        @functools.wraps(original)
        def write(*given: Any, **named: Any) -> Any:
            path = given[place] if len(given) > place else None

            def half() -> None:
                original(*given, **named)
                os.truncate(path, os.path.getsize(path) // 2)

            self.reach("create", path)
            self.reach("write", path, half=half)
            return original(*given, **named)

        setattr(module, name, write)


class _Writer(io.BufferedWriter):
    """A file whose first write is a fault point, and then one in every 16 KiB."""

    def __init__(self, raw: io.FileIO, points: _FaultPoints, path: object):
        super().__init__(raw)
        self._points, self._path, self._left = points, path, 0

    def write(self, data: Any) -> int:
        self._left -= memoryview(data).nbytes
        if self._left >= 0:
            return super().write(data)
        self._left = 1 << 14

        def half() -> None:
            content = bytes(data)
            super(_Writer, self).write(content[: len(content) // 2])
            self.flush()

        self._points.reach("write", self._path, half=half)
        return super().write(data)


def _make_runs_alike() -> None:
    """Take the place of what the programs measure."""
    from megatron_retro.retrieval import embedding

    embedding.fastest_dtype = lambda *_: "float32"


def _note_facts(file: str, reload: str) -> None:
    """Write down what a training run reads and draws; where asked, save what it has loaded."""
    import torch

    from megatron_retro import mcore
    from megatron_retro.data.samples import Samples

    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    choose, batch, update, load = Samples._choose, Samples.batch, mcore.update, mcore.load_state
    chosen: list[Any] = [None]

    def note(**facts: Any) -> None:
        os.write(log, json.dumps(facts).encode() + b"\n")

    def noted_choose(self: Any, *given: Any) -> Any:
        chosen[0] = choose(self, *given)
        return chosen[0]

    def noted_batch(self: Any, sample_ids: Any, *given: Any, **named: Any) -> Any:
        made = batch(self, sample_ids, *given, **named)
        rows = chosen[0].tolist() if chosen[0] is not None else [None] * len(sample_ids)
        for sample, neighbors in zip(sample_ids.tolist(), rows, strict=True):
            note(sample=sample, chunks=self.chunks(sample).tolist(), neighbors=neighbors)
        return made

    def noted_update(*given: Any) -> None:
        update(*given)
        note(drawn=hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()[:16])

    def noted_load(model: Any, optimizer: Any, directory: str) -> None:
        load(model, optimizer, directory)
        if reload and optimizer is not None:
            if not torch.distributed.get_rank():
                os.makedirs(reload)
            torch.distributed.barrier()
            mcore.save_state(model, optimizer, reload)

    Samples._choose, Samples.batch = noted_choose, noted_batch  # type: ignore[method-assign]
    mcore.update, mcore.load_state = noted_update, noted_load


# ------------------------------------------------------------------------------------------------ power cuts


def _copies_of(watched: pathlib.Path) -> pathlib.Path:
    return watched.with_name(f"{watched.name}.replaced")


def forget_copies(watched: pathlib.Path) -> None:
    """Remove what `cut_power` would have needed of killed launches."""
    shutil.rmtree(_copies_of(watched), ignore_errors=True)


def cut_power(outcome: Outcome, watched: pathlib.Path, draw: random.Random) -> str:
    """Take from the disk what a killed launch had not synced: the newest part of it, as journals lose it.

    Files that were written and not synced are cut; new names in directories that were not synced are undone, newest
    first, up to one that is drawn.

    Returns:
        What was lost, in words.
    """
    unsynced: set[str] = set()
    names: list[Event] = []
    for event in outcome.events[:-1]:  # the last one did not happen
        if event.kind in ("open", "create", "write", "truncate"):
            unsynced.add(event.path)
        if event.kind in ("create", "rename", "mkdir") and event.path != str(watched):
            names.append(event)
        if event.kind == "rename":
            unsynced = {_moved(path, event) for path in unsynced}
        if event.kind == "fsync":
            unsynced.discard(event.path)
            names = [name for name in names if os.path.dirname(name.second or name.path) != event.path]
    lost = []
    for path in sorted(unsynced):
        if os.path.isfile(path) and (size := os.path.getsize(path)):
            os.truncate(path, left := draw.choice([0, draw.randrange(size)]))
            lost.append(f"{os.path.basename(path)} cut from {size} to {left} bytes")
    for event in names[draw.randint(0, len(names)) :][::-1]:
        if _undo(event, _copies_of(watched)):
            lost.append(f"{event.kind} of {os.path.basename(event.second or event.path)} undone")
    return "; ".join(lost)


def _moved(path: str, rename: Event) -> str:
    if path == rename.path or path.startswith(rename.path + "/"):
        return rename.second + path[len(rename.path) :]
    return path


def _undo(event: Event, copies: pathlib.Path) -> bool:
    if event.kind == "rename" and os.path.exists(event.second) and not os.path.exists(event.path):
        os.rename(event.second, event.path)
        if event.replaced:
            shutil.copyfile(copies / event.replaced, event.second)
    elif event.kind == "create" and os.path.isfile(event.path):
        os.remove(event.path)
    elif event.kind == "mkdir" and os.path.isdir(event.path):
        shutil.rmtree(event.path)
    else:
        return False
    return True
