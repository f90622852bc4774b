"""What a stage says while it runs."""

import types

import pytest

from megatron_retro import distributed
from megatron_retro.retrieval import progress
from megatron_retro.retrieval.progress import Progress


@pytest.mark.parametrize(("together", "where"), [(False, " on each of 3 ranks"), (True, "")])
def test_lines_tell_rate_and_time_left(
    together: bool, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with Progress("on", 5000, "samples", done=1000, together=together) as counted:
        for seconds, units in ((9, 3), (11, 2), (5, 95), (5, 1900)):
            now[0] += seconds
            counted.advance(units)
    assert capsys.readouterr().err.splitlines() == [
        f"on: 1,005 of 5,000 samples, 0.25/s{where}, 4 h 26 min left",
        f"on: 3,000 of 5,000 samples, 67/s{where}, 30 s left",
    ]
