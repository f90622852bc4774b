"""Kills, other layouts and damaged files: small numbers of what `make torture` does by the hundred."""

import pathlib
import shutil

from torture import corruption, layouts, preprocessing, training
from torture.saboteur import Fault

LAYOUT = "one rank"


def test_a_killed_build_ends_alike(tmp_path: pathlib.Path) -> None:
    """Killed before a write, in what is left before an fsync, in what is then left before a rename."""
    material = preprocessing.Material(tmp_path)
    material.make(("build",), num_ranks=(1,))
    kills = []
    for kind in ("write", "fsync", "rename"):
        events = [event for event in material.events["build", 1] if event.kind == kind and "embeddings" in event.path]
        kills.append((1, Fault(0, events[len(events) // 2].number)))
    assert preprocessing.kill_and_go_on(material, "build", kills, 0, tmp_path) >= 1


def test_a_run_killed_inside_a_save_ends_alike(small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """In the second save."""
    material = training.Material(tmp_path, small_work)
    material.make((LAYOUT,))
    saves = [event.number for event in material.outcomes[LAYOUT].events if "/iter_0000006.partial" in event.path]
    assert training.kill_and_go_on(material, LAYOUT, [Fault(0, saves[len(saves) // 2])], 0, tmp_path) == (1, 1)


def test_a_layout_changed_between_saving_and_loading(small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    material = layouts.Material(tmp_path, small_work, more=2)
    material.begin("TP2")
    layouts.change_layout(material, "TP2", "PP2", tmp_path)


def test_damaged_files_are_refused_and_repaired(
    small_work: pathlib.Path, trained: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    material = corruption.Material(
        shutil.copytree(small_work, tmp_path / "w"), shutil.copytree(trained, tmp_path / "s")
    )
    for number in range(40):
        corruption.refuse(material, number)
    corruption.repair(material, 0, tmp_path)
