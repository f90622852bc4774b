"""Ranks that stop, die, fail, hang or are slow: every other one ends, in time, with a line that names the rank."""

import concurrent.futures
import json
import pathlib
import re
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
from launch import ROOT, LeftAlone
from test_preprocess import copy_without
from test_training import flags

from megatron_retro.training.stragglers import Straggler, slowest
from megatron_retro.watch import FAILED, GONE, LOST, RUNS, STUCK, Roster, Watch, say

WORKER = ROOT / "tests" / "watch_worker.py"
TIMEOUT = ("--distributed-timeout-minutes", 0.1)


def error_lines(text: str) -> list[str]:
    return [line.split(": error: ")[1] for line in text.splitlines() if ": error: " in line]


# ------------------------------------------------------------------------------------------------ real ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(small_work: pathlib.Path, folder: pathlib.Path) -> Iterator[dict[str, LeftAlone]]:
    """Started together, for they mostly wait."""
    begun = copy_without(small_work, folder / "begun", "embeddings", "index", "neighbors").path
    for file in (begun / "embeddings").rglob("*.npy"):
        file.unlink()
    train = [*flags(small_work, "--train-iters", 100000, "--eval-iters", 0), *TIMEOUT]
    build = [ROOT / "tools" / "preprocess_retro_data.py", "--retro-work-dir", begun, *TIMEOUT]
    started = {
        "slow": LeftAlone(folder / "slow", *train, "--save", folder / "save", ranks=2, sabotage="sabotage:read_slowly"),
        "fails": LeftAlone(folder / "fails", *train, ranks=2, sabotage="sabotage:fail_in_the_fourth_batch"),
        "refuses": LeftAlone(
            folder / "refuses", *build, ranks=2, sabotage="sabotage:refuse_a_block_while_rank_0_has_hours_of_work"
        ),
        "hangs": LeftAlone(folder / "hangs", WORKER, 0.1, 1, ranks=3),
        **{name: LeftAlone(folder / name, WORKER, 0.1, ranks=3) for name in (*SIGNALS, "suspended")},
    }
    yield started
    for run in started.values():
        run.kill()


SIGNALS = {
    "killed 1": (1, signal.SIGKILL),
    "killed 0": (0, signal.SIGKILL),
    "stopped 0": (0, signal.SIGSTOP),
    "stopped 2": (2, signal.SIGSTOP),
}


def test_a_stopped_or_killed_rank_ends_the_others(runs: dict[str, LeftAlone]) -> None:
    for name, (rank, number) in SIGNALS.items():
        runs[name].wait_until_printed(rank, "round 6")
        runs[name].signal(rank, number)
    runs["suspended"].wait_until_printed(2, "round 6")
    for rank in range(3):
        runs["suspended"].signal(rank, signal.SIGSTOP)
    for name, (rank, _) in SIGNALS.items():
        others = [other for other in range(3) if other != rank]
        assert runs[name].wait(*others) == dict.fromkeys(others, 1), name
        for other in others:
            (line,) = error_lines(runs[name].printed(other))
            assert line.startswith(f"rank {rank} is gone: "), (name, line)
            assert re.search(rf"; rank {other} (waited for it|was) in round \d+$", line), (name, line)
            assert "Traceback" not in runs[name].printed(other)


def test_a_job_that_was_suspended_as_a_whole_goes_on(runs: dict[str, LeftAlone]) -> None:
    """For longer than the timeout: while the other runs ended."""
    before = runs["suspended"].printed(0).count("round")
    for rank in range(3):
        runs["suspended"].signal(rank, signal.SIGCONT)
    runs["suspended"].wait_until_printed(0, f"round {before + 60}\n")
    assert not error_lines(runs["suspended"].printed(0))


def test_a_hanging_rank_is_named(runs: dict[str, LeftAlone]) -> None:
    assert runs["hangs"].wait(0, 1, 2) == dict.fromkeys(range(3), 1)
    (line,) = error_lines(runs["hangs"].printed(2))
    assert line.startswith("rank 1 hangs: in a nap of round 6 for ")
    assert "; rank 2 waited for it in round 6; " in line
    (line,) = error_lines(runs["hangs"].printed(1))
    assert line.startswith("rank 1 hangs: in a nap of round 6 for ") and "the others wait for it" in line


def test_a_straggler_is_named_and_so_are_those_who_wait_for_it(
    runs: dict[str, LeftAlone], folder: pathlib.Path
) -> None:
    runs["slow"].wait_until_printed(0, " is slow: ")
    (line,) = [line for line in runs["slow"].printed(0).splitlines() if " is slow: " in line]
    assert re.search(
        r"rank 1 is slow: \d+\.\d × the median of its peers in the last 10 steps, most of it in data$", line
    )
    runs["slow"].signal(1, signal.SIGSTOP)
    assert runs["slow"].wait(0) == {0: 1}
    (line,) = error_lines(runs["slow"].printed(0))
    assert re.match(
        r"rank 1 is gone: last heard of \d+ s ago in the .* of iteration \d+; rank 0 waited for it in ", line
    )

    lines = map(json.loads, (folder / "save" / "metrics.jsonl").read_text().splitlines())
    (found,) = [line for line in lines if "straggler_rank" in line]
    assert found["straggler_rank"] == 1 and found["straggler_phase"] == "data" and found["straggler_factor"] > 1.5
    assert found["iteration"] <= 20


def test_an_exception_on_one_rank_ends_the_other(runs: dict[str, LeftAlone]) -> None:
    assert runs["fails"].wait(0, 1) == {0: 1, 1: 1}
    (line,) = error_lines(runs["fails"].printed(0))
    assert re.match("rank 1 failed: ValueError: no luck; rank 0 waited for it in .*iteration 4$", line)
    assert "ValueError: no luck" in runs["fails"].printed(1) and "Traceback" in runs["fails"].printed(1)


def test_bad_input_on_one_rank_ends_another_in_its_work(runs: dict[str, LeftAlone]) -> None:
    begin = time.monotonic()
    assert runs["refuses"].wait(0, 1) == {0: 2, 1: 2}
    assert error_lines(runs["refuses"].printed(0)) == ["rank 1: no such block"]
    assert "Traceback" not in runs["refuses"].printed(0) + runs["refuses"].printed(1)
    assert time.monotonic() - begin < 100


# ------------------------------------------------------------------------------------------------ judging


def record(state: str, beats: int, place: str = "iteration 1", **more: object) -> bytes:
    body = {"place": place, "ticks": 0, "waiting": True, "error": "", "code": 0, **more}
    return f"{state} {beats}\n{json.dumps(body)}".encode()


def read(roster: Roster, *records: bytes, seconds: float = 1.0, must_progress: bool = False) -> None:
    roster.update(records, seconds, must_progress=must_progress)


class Store:
    """Stands in for torch's, of which each rank has a connection, until its holder has ended."""

    def __init__(self, values: dict[str, bytes], seconds: float = 0.0):
        self.values, self.seconds, self.refused = values, seconds, 0

    def set(self, key: str, value: str) -> None:
        self._check()
        self.values[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._check()
        answers = [self.values.get(key, b"") for key in keys]
        time.sleep(self.seconds)
        return answers

    def _check(self) -> None:
        if "closed" in self.values:
            self.refused += 1
            raise RuntimeError("Connection reset by peer")


def test_ranks_that_fail_at_once_all_hear_of_each_other() -> None:
    """Rank 0, whose end is the end of the store, goes last: another one would not know that it need say nothing."""
    values: dict[str, bytes] = {}
    stores = [Store(values), Store(values, seconds=0.4)]
    first, second = (Watch(store, rank, 2, 60.0, "rank 0") for rank, store in enumerate(stores))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        heard = threads.submit(second.leave_with, "the disk is full", 2)
        while b"failed" not in values.get("watch/1", b""):
            time.sleep(0.01)
        first.leave_with("the disk is full", 2)
        values["closed"] = b""
        assert heard.result() and not stores[1].refused


def test_silence_is_judged_by_the_timeout_and_soon_after_a_lost_connection() -> None:
    roster = Roster(3)
    for beats in range(9):
        read(roster, record(RUNS, beats), record(RUNS, 1), record(RUNS, beats))
        assert roster.verdict(timeout=10) is None
    read(roster, record(LOST, 10), record(RUNS, 1), record(RUNS, 10))
    found = roster.verdict(timeout=10)
    assert found and found["kind"] == GONE and found["ranks"] == [1]
    assert say(found, 0, "the save of iteration 2", is_waiting=False) == (
        "rank 1 is gone: last heard of 9 s ago in iteration 1; rank 0 was in the save of iteration 2"
    )


def test_a_failed_rank_comes_before_a_silent_one() -> None:
    roster = Roster(2)
    for _ in range(20):
        read(roster, record(RUNS, 1), record(FAILED, 1, error="no room", code=2))
    found = roster.verdict(timeout=10)
    assert (
        found and found["kind"] == FAILED and say(found, 0, "block 7 of embed", is_waiting=False) == "rank 1: no room"
    )


def test_ranks_without_progress_are_stuck_where_progress_is_expected() -> None:
    for must_progress in (False, True):
        roster = Roster(3)
        for beats in range(20):
            here = [record(RUNS, beats), record(RUNS, beats, "the samples", waiting=False), record(RUNS, beats)]
            read(roster, *here, must_progress=must_progress)
        found = roster.verdict(timeout=10)
        if must_progress:
            assert found and found["kind"] == STUCK and found["ranks"] == [1]
        else:
            assert found is None


def test_stragglers_are_compared_with_peers() -> None:
    work = np.ones((4, 3))
    seconds = np.array([[0.1, 1, 0.1], [0.1, 1.1, 0.1], [0.1, 3, 0.1], [0.1, 3.1, 0.1]])
    assert slowest(seconds, work, np.array([0, 0, 1, 1])) is None  # each stage is a world of its own
    work[2:, 1] = 3
    assert slowest(seconds, work, np.arange(4)) is None  # a stage of three times the work
    found = slowest(seconds, work / 2, np.zeros(4))
    assert found is None
    seconds[3, 0] = 5
    found = slowest(seconds, work, np.array([0, 0, 1, 1]))
    assert found == Straggler(3, "data", pytest.approx(8.2 / 3.2))
    assert slowest(seconds[:1], work[:1], np.zeros(1)) is None
