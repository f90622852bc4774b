"""Watches over the ranks of a run: none waits for one that stopped, died, failed or hangs.

Every rank has a thread that posts a record each second, in the store through which the ranks found each other:

    watch/<rank>      "<state> <beats>" and, in JSON, where its main thread is: place, ticks, waiting, error
    watch/verdict     why the run is over, in JSON; empty while it is not

Rank 0's thread alone reads every record and writes the verdict; the others read that and rank 0's record, so the work
of thousands of ranks is two small requests a rank and second. A second thread, which asks nobody, ends the process:
the store's own calls have no time limit. Seconds are counted while this process runs, so a job that was suspended as a
whole goes on.

A verdict is one of three: a rank is gone (no beats for the timeout, or for some seconds where a connection broke), a
rank failed (its error ends the others a few seconds later, if they do not come to it themselves), the ranks are stuck
(beats, but no progress for the timeout). Then each rank prints one line, which names the rank, what it did last and
what this one waited for, and leaves with an exit code that is not 0.
"""

import atexit
import collections
import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

_BEAT = 1.0  # seconds between two records
_SOON = 3.0  # so long silent is gone, where a connection to somebody broke
_GRACE = 3.0  # for others to come to a rank's error by themselves
_LINGER = 2.0  # until all have read a verdict: who leaves first breaks connections of those that have not
_LAST = 12.0  # rank 0, which may hold the store, waits so long for the others to leave

RUNS, LOST, FAILED, LEFT, ENDED = "runs", "lost", "failed", "left", "ended"
_DONE = (FAILED, LEFT, ENDED)
GONE, STUCK = "gone", "stuck"  # verdicts, beside FAILED

_watch: "Watch | None" = None  # one a process, as the process group that it belongs to


# ------------------------------------------------------------------------------------------ what the program says


def start(store: Any, rank: int, world_size: int, timeout: float, holder: str) -> None:
    """Begin to watch, after the ranks found each other.

    Args:
        store: torch's; the watch has its own connection to it.
        timeout: seconds without a sign of a rank.
        holder: whose end is the end of the store.
    """
    global _watch
    _watch = Watch(store.clone(), rank, world_size, timeout, holder)
    atexit.register(close)


def is_on() -> bool:
    return _watch is not None


def expect_progress() -> None:
    """From now on the run is stuck when no rank has come any further for the timeout."""
    if _watch:
        _watch.must_progress = True


def at(place: str) -> None:
    """Say where this rank is now: "iteration 12"."""
    if _watch:
        _watch.place.move(place)


@contextlib.contextmanager
def doing(part: str) -> Iterator[None]:
    """Around a part of where this rank is: "the optimizer" of iteration 12."""
    if _watch is None:
        yield
        return
    with _watch.place.inside(part):
        yield


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Around what needs other ranks."""
    if _watch is None:
        yield
        return
    with _watch.place.waiting():
        yield


def tell(error: str, code: int) -> None:
    """Tell the others that this rank failed, and with which exit code it will end."""
    if _watch:
        _watch.set_state(FAILED, error, code)


def take_back() -> None:
    """All know of what was told; the run may go on."""
    if _watch:
        _watch.set_state(RUNS)


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error only says that another rank is not there; gloo's say where in gloo they were made."""
    while error is not None:
        name = type(error).__name__
        if "gloo/" in str(error) or name in ("DistBackendError", "DistNetworkError", "DistStoreError"):
            return True
        error = error.__cause__ or error.__context__
    return False


def await_verdict(error: BaseException) -> None:
    """After a lost connection: end with the line that names the rank; returns where none can be named."""
    if _watch:
        _watch.set_state(LOST, _first_line(error))
        time.sleep(_SOON + _GRACE + 3 * _BEAT)


def leave_with(error: str, code: int) -> bool:
    """Tell the others that this rank ends, and give them the time to hear of it.

    Returns:
        Whether rank 0 has ended as well.
    """
    return _watch is not None and _watch.leave_with(error, code)


def close() -> None:
    """This rank has done its part; rank 0 waits until all have."""
    global _watch
    if _watch and _watch.process == os.getpid():  # forks end without a word
        _watch.close()
    _watch = None


# ---------------------------------------------------------------------------------------------------- the threads


class Place:
    """Where the main thread is, as another thread may read it at any time."""

    def __init__(self) -> None:
        self.ticks, self._parts, self._waiting = 0, ["the start"], 0
        self.failed_at = ""  # where a wait for others ended with an error

    def move(self, place: str) -> None:
        self._parts[:1] = [place]
        self.ticks += 1

    @contextlib.contextmanager
    def inside(self, part: str) -> Iterator[None]:
        self._parts.append(part)
        self.ticks += 1
        try:
            yield
        finally:
            self._parts.pop()
            self.ticks += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self._waiting += 1
        self.ticks += 1
        try:
            yield
        except BaseException:
            self.failed_at = str(self)
            raise
        finally:
            self._waiting -= 1
            self.ticks += 1

    @property
    def is_waiting(self) -> bool:
        return self._waiting > 0

    def __str__(self) -> str:
        return " of ".join(reversed(self._parts))


class Watch:
    """One rank's two threads: `_talk` with the store, `_guard` over the process."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout: float, holder: str):
        self.place, self.must_progress, self.process = Place(), False, os.getpid()
        self._store, self._rank, self._world_size, self._timeout = store, rank, world_size, timeout
        self._holder = holder
        self._state: tuple[str, str, int] = (RUNS, "", 0)  # with an error and its exit code
        self._posted: tuple[str, str, int] | None = None
        self._beats, self._ended, self._is_ending = 0, False, False
        self._unanswered = 0.0  # seconds since the store's last answer; infinite when it has gone
        self._roster = Roster(world_size if rank == 0 else 1)
        self._verdict: dict[str, Any] | None = None
        self._is_final, self._wake = False, threading.Event()
        for work in (self._talk, self._guard):
            threading.Thread(target=work, daemon=True, name=f"watch{work.__name__}").start()

    def set_state(self, state: str, error: str = "", code: int = 0) -> None:
        self._state = (state, error, code)
        self._wake.set()

    def leave_with(self, error: str, code: int) -> bool:
        self._is_ending = True  # what others find now changes nothing
        self.set_state(FAILED, error, code)
        if self._rank == 0:
            self._wait(lambda: self._roster.all_are(_DONE), _LAST)
            self._wait(lambda: self._roster.all_are((LEFT, ENDED)), _LINGER)  # they know that this rank ends
            return True
        self._wait(lambda: self._posted == self._state, _LINGER)
        if not self._wait(lambda: self._roster.all_are(_DONE), _GRACE + 2 * _BEAT):
            return False
        self.set_state(LEFT, error, code)
        self._wait(lambda: self._posted == self._state, _LINGER)
        return True

    def close(self) -> None:
        self._ended = self._state[0] != FAILED
        if self._ended:
            self.set_state(ENDED)
            self._wait(lambda: self._posted == self._state, _LINGER)
            if self._rank == 0:  # the guard looks on
                self._wait(lambda: self._roster.all_are(_DONE), float("inf"))
        self._is_ending = True

    def _wait(self, is_so: Any, seconds: float) -> bool:
        """Until something is so, the store is gone, or the time is over; the answer."""
        end = time.monotonic() + seconds
        while not is_so() and time.monotonic() < end and self._unanswered < float("inf"):
            self._wake.set()
            time.sleep(_BEAT / 10)
        return is_so()

    # ---- talk

    def _talk(self) -> None:
        keys = (
            [f"watch/{rank}" for rank in range(self._world_size)] if self._rank == 0 else ["watch/0", "watch/verdict"]
        )
        clock = _Clock()
        try:
            while True:
                self._post()
                if self._rank and self._state == self._posted and self._state[0] in (LEFT, ENDED):
                    return  # the store may go now
                answers = self._store.multi_get(keys)
                self._unanswered = 0.0
                self._roster.update(answers[: len(self._roster)], clock.seconds(), must_progress=self.must_progress)
                if not self._is_final:
                    self._judge(answers[-1])
                self._wake.wait(_BEAT)
                self._wake.clear()
        except RuntimeError:  # torch's errors of the network
            self._unanswered = float("inf")

    def _post(self) -> None:
        state = self._state
        place = {"place": str(self.place), "ticks": self.place.ticks, "waiting": self.place.is_waiting}
        body = json.dumps({**place, "error": state[1], "code": state[2]})
        self._beats += 1
        self._store.set(f"watch/{self._rank}", f"{state[0]} {self._beats}\n{body}")
        if self._rank == 0:
            self._store.set("watch/verdict", json.dumps(self._verdict) if self._verdict else "")
        self._posted = state

    def _judge(self, verdict: bytes) -> None:
        is_lost = self._state[0] == LOST
        if self._rank == 0:
            found = self._roster.verdict(self._timeout)
            if found != self._verdict:
                self._verdict = found
                self._wake.set()
        else:
            gone = self._roster.gone(_SOON if is_lost else self._timeout)
            self._verdict = json.loads(verdict) if verdict else self._roster.says_gone(gone) if gone else None

    # ---- guard

    def _guard(self) -> None:
        clock, failed_for = _Clock(), 0.0
        while not self._is_ending:
            time.sleep(_BEAT / 4)
            seconds = clock.seconds()
            self._unanswered += seconds
            if self._ended and self._rank:
                continue
            verdict = self._verdict
            if verdict is None and self._unanswered > self._timeout:
                verdict = {"kind": GONE, "ranks": [], "who": self._holder, "seconds": self._unanswered, "place": ""}
                if self._holder == "rank 0":
                    verdict |= {"ranks": [0], "place": self._roster.place(0)}
            if verdict is None or (verdict["kind"] == FAILED and verdict["ranks"] == [self._rank]):
                failed_for = 0.0
                continue
            if verdict["kind"] == FAILED and self._state[0] != LOST:
                failed_for += seconds
                if failed_for < _GRACE and self._unanswered < float("inf"):
                    continue
            self._leave(verdict)

    def _leave(self, verdict: dict[str, Any]) -> None:
        """End the process, whatever its main thread is in."""
        self._is_final = True
        if self._is_ending:
            return
        threading.Timer(_LAST + 2 * _LINGER, os._exit, [1]).start()  # whoever reads our output may have stopped
        is_lost = self._state[0] == LOST
        place = (is_lost and self.place.failed_at) or str(self.place)
        line = say(verdict, self._rank, place, is_waiting=is_lost or self.place.is_waiting)
        with contextlib.suppress(OSError):
            print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr, flush=True)
        self._verdict = verdict
        self.set_state(LEFT)
        if self._rank == 0:
            self._wait(lambda: self._roster.all_are(_DONE, but=verdict["ranks"]), _LAST)
        else:
            time.sleep(_LINGER)
        for child in multiprocessing.active_children():
            child.kill()  # orphans would hold this program's output open
        os._exit(verdict.get("code") or 1)


class _Clock:
    """Seconds between two looks; a pause of this process counts little."""

    def __init__(self) -> None:
        self._before = time.monotonic()

    def seconds(self) -> float:
        now = time.monotonic()
        passed, self._before = now - self._before, now
        return min(passed, 3 * _BEAT)


class Roster:
    """The newest records of ranks 0 … n-1, and for how long each has been the same."""

    def __init__(self, num_ranks: int):
        self._heads, self._bodies = [b""] * num_ranks, [b""] * num_ranks
        self._silent = [0.0] * num_ranks
        self._still = self._lost = 0.0

    def __len__(self) -> int:
        return len(self._heads)

    def update(self, records: Sequence[bytes], seconds: float, *, must_progress: bool) -> None:
        """Take in what was read `seconds` after the last time."""
        self._still = self._still + seconds if must_progress else 0.0
        for rank, record in enumerate(records):
            head, _, body = record.partition(b"\n")
            self._silent[rank] = 0.0 if head != self._heads[rank] else self._silent[rank] + seconds
            if body != self._bodies[rank]:
                self._still = 0.0
            self._heads[rank], self._bodies[rank] = head, body
        self._lost = self._lost + seconds if self._in_state(LOST) else 0.0

    def all_are(self, states: Sequence[str], but: Sequence[int] = ()) -> bool:
        """Whether every rank, but this one and some more, is in one of the states."""
        first = 1 if len(self) > 1 else 0
        return all(self._state(rank) in states for rank in range(first, len(self)) if rank not in but)

    def place(self, rank: int) -> str:
        """Where a rank was last."""
        return str(self._body(rank).get("place", "the start"))

    def gone(self, limit: float) -> list[int]:
        """Ranks that should, and have not been heard of for so many seconds."""
        return [rank for rank, silent in enumerate(self._silent) if silent > limit and self._state(rank) not in _DONE]

    def says_gone(self, gone: list[int]) -> dict[str, Any]:
        first = gone[0]
        return {"kind": GONE, "ranks": gone, "seconds": self._silent[first], "place": self.place(first)}

    def verdict(self, timeout: float) -> dict[str, Any] | None:
        """Why the run is over, if it is."""
        if failed := self._in_state(FAILED):
            body = self._body(failed[0])
            return {"kind": FAILED, "ranks": failed[:1], "error": body["error"], "code": body["code"]}
        if gone := self.gone(_SOON if self._lost else timeout):
            return self.says_gone(gone)
        if self._still > timeout or self._lost > _SOON + _GRACE:
            return self._stuck()
        return None

    def _stuck(self) -> dict[str, Any]:
        """Named are ranks that wait for nobody; else those that are elsewhere than most."""
        bodies = [self._body(rank) for rank in range(len(self))]
        lost = self._in_state(LOST)
        named = [rank for rank, body in enumerate(bodies) if not body["waiting"] and rank not in lost]
        if not named or len(named) == len(self):
            places = collections.Counter(body["place"] for body in bodies).most_common()
            named = [rank for rank, body in enumerate(bodies) if body["place"] != places[0][0]]
        place = bodies[named[0]]["place"] if named else ""
        error = bodies[lost[0]]["error"] if lost else ""
        return {"kind": STUCK, "ranks": named, "seconds": self._still, "place": place, "error": error}

    def _in_state(self, state: str) -> list[int]:
        start = state.encode()
        return [rank for rank, head in enumerate(self._heads) if head.startswith(start)]

    def _state(self, rank: int) -> str:
        return self._heads[rank].partition(b" ")[0].decode()

    def _body(self, rank: int) -> dict[str, Any]:
        return json.loads(self._bodies[rank] or b"{}")


def say(verdict: dict[str, Any], rank: int, place: str, *, is_waiting: bool) -> str:
    """A verdict in one line, as a rank at `place` says it."""
    ranks, seconds, error = verdict["ranks"], f"{verdict.get('seconds', 0):.0f} s", verdict.get("error", "")
    here = f"rank {rank} waited for it in {place}" if is_waiting else f"rank {rank} was in {place}"
    if verdict["kind"] == FAILED:
        return f"rank {ranks[0]}: {error}" if verdict["code"] == 2 else f"rank {ranks[0]} failed: {error}; {here}"
    if verdict["kind"] == GONE:
        if rank in ranks:
            return f"rank {rank} was silent for {seconds}, so the other ranks gave it up, in {verdict['place']}"
        who = _named(ranks) if ranks else verdict["who"]
        when = f"last heard of {seconds} ago" if verdict["seconds"] < float("inf") else "its connection broke"
        where = f" in {verdict['place']}" if verdict["place"] else ""
        return f"{who} is gone: {when}{where}; {here}"
    way_out = "--distributed-timeout-minutes says how long to wait"
    if not ranks:
        why = f" ({error})" if error else ""
        return f"no rank has come further for {seconds}{why}; rank {rank} is in {place}; {way_out}"
    if rank in ranks:
        return f"rank {rank} hangs: in {place} for {seconds}, and the others wait for it; {way_out}"
    return f"{_named(ranks)} hangs: in {verdict['place']} for {seconds}; {here}; {way_out}"


def _named(ranks: list[int]) -> str:
    more = f" (and {len(ranks) - 1} more)" if len(ranks) > 1 else ""
    return f"rank {ranks[0]}{more}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
