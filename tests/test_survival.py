"""Kills, other layouts and damaged files: small numbers of what `make torture` does by the hundred."""

import pathlib

from torture import layouts, training
from torture.saboteur import Fault

LAYOUT = "one rank"


def test_a_run_killed_inside_a_save_ends_alike(small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """In the second save, and then in the last."""
    material = training.Material(tmp_path, small_work)
    material.make((LAYOUT,))
    saves = [event.number for event in material.outcomes[LAYOUT].events if "/iter_0000006.partial" in event.path]
    faults = [Fault(0, saves[len(saves) // 2]), Fault(0, len(saves) * 3 // 2)]
    assert training.kill_and_go_on(material, LAYOUT, faults, 0, tmp_path) == (2, 2)


def test_a_layout_changed_between_saving_and_loading(small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    material = layouts.Material(tmp_path, small_work, more=2)
    material.begin("TP2")
    layouts.change_layout(material, "TP2", "PP2", tmp_path)
