"""Kills, other layouts and damaged files: small numbers of what `make torture` does by the hundred."""

import pathlib

from torture import corruption, layouts, preprocessing, training
from torture.saboteur import Fault

LAYOUT = "one rank"


def test_a_killed_build_ends_alike(tmp_path: pathlib.Path) -> None:
    """Before the middle one of the writes, of the syncs and of the renames, on two ranks and on one."""
    material = preprocessing.Material(tmp_path)
    material.make(("build",))
    for number, kind in enumerate(("write", "fsync", "rename")):
        ranks = 1 + number % 2
        events = [event for event in material.events["build", ranks] if event.kind == kind]
        event = events[len(events) // 2]
        first = "build", ranks, Fault(event.rank, event.number, alone=number == 1)
        assert preprocessing.kill_and_go_on(material, first, number, tmp_path / kind) >= 1


def test_a_run_killed_inside_a_save_ends_alike(tmp_path: pathlib.Path) -> None:
    material = training.Material(tmp_path)
    material.make((LAYOUT,))
    second_save = [event for event in material.outcomes[LAYOUT].events if "/iter_0000006.partial" in event.path]
    for number, event in enumerate((second_save[len(second_save) // 2], second_save[-1])):
        kills, inside = training.kill_and_go_on(
            material, (LAYOUT, Fault(0, event.number)), number, tmp_path / str(number)
        )
        assert kills == inside >= 1


def test_a_layout_changed_between_saving_and_loading(tmp_path: pathlib.Path) -> None:
    material = layouts.Material(tmp_path, more=2)
    material.begin("TP2")
    layouts.change_layout(material, "TP2", "PP2", tmp_path)


def test_damaged_files_are_refused_and_repaired(tmp_path: pathlib.Path) -> None:
    material = corruption.Material(tmp_path)
    for number in range(40):
        corruption.refuse(material, number)
    corruption.repair(material, 0, tmp_path)
