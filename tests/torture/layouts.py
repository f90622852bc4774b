"""Layouts changed between saving and loading: the same weights, Adam state, samples, and soon the same losses."""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

from torture.training import SHARDED, STAGES, TENSOR, make_work, metrics_lines, pretrain
from torture.trees import checkpoint_hashes, difference, hash_of
from torture.trials import Lost, Result, run_trials, seeds

BEGUN, MORE = 3, 20  # updates before and after the change
TOLERANCE = 1e-5  # relative, of a loss

LAYOUTS = {
    "1": (1, ""),
    "TP2": (2, f"{TENSOR} --sequence-parallel"),
    "PP2": (2, STAGES),
    "DP2": (2, ""),
    "TP2×PP2": (4, f"{TENSOR} {STAGES} --sequence-parallel"),
}
SHARDED_LAYOUTS = {
    f"{name}, distributed optimizer": (ranks, f"{flags} {SHARDED}") for name, (ranks, flags) in LAYOUTS.items()
}
EVERY = {**LAYOUTS, **SHARDED_LAYOUTS}
PAIRS = list(itertools.product(LAYOUTS, LAYOUTS))
PAIRS += [(a, b) for a, b in itertools.product(SHARDED_LAYOUTS, SHARDED_LAYOUTS) if ("DP2" in a) != ("DP2" in b)]


class Material:
    """A work dir, and for each layout a checkpoint that it saved.

    Attributes:
        last: the update at which a run ends that has changed its layout.
        alone: layout -> the run in one process from what it saved.
        worst: the largest relative difference of two losses so far.
    """

    def __init__(self, folder: pathlib.Path, work: pathlib.Path | None = None, more: int = MORE):
        self.folder, self.work, self.last = folder, work or make_work(folder), BEGUN + more
        self.worst, self.alone = 0.0, dict[str, GoneOn]()

    def save_of(self, layout: str) -> pathlib.Path:
        return self.folder / f"saved at {layout}"

    def run(self, layout: str, save: pathlib.Path, iterations: int, *more: object, reload: Any = None) -> Any:
        ranks, flags = EVERY[layout]
        same = ["--hidden-dropout", 0, "--lr", "1e-3", "--lr-decay-iters", self.last, "--train-iters", iterations]
        return pretrain(self.work, save, *same, *flags.split(), *more, ranks=ranks, reload=reload)

    def begin(self, layout: str) -> None:
        """Train a few updates at a layout, save, and go on from there in one process."""
        self.run(layout, self.save_of(layout), BEGUN)
        self.alone[layout] = self.go_on(layout, alone_like(layout), self.folder / f"alone from {layout}")

    def go_on(self, saved_at: str, loaded_at: str, folder: pathlib.Path) -> "GoneOn":
        """Load what a layout saved, save it again at once, and train on."""
        save, again = folder / "save", folder / "again"
        outcome = self.run(loaded_at, save, self.last, "--load", self.save_of(saved_at), reload=again)
        read = [fact for fact in outcome.facts if "sample" in fact]
        samples = {fact["sample"]: hash_of(json.dumps([fact["chunks"], fact["neighbors"]]).encode()) for fact in read}
        losses = {line["iteration"]: line["lm_loss"] for line in metrics_lines(save) if "lm_loss" in line}
        return GoneOn(state_at(again), samples, losses)


@dataclasses.dataclass(frozen=True)
class GoneOn:
    """A run from a loaded checkpoint: hashes of the state that it loaded and of each sample it read, its losses."""

    state: dict[str, str]
    samples: dict[int, str]
    losses: dict[int, float]


def alone_like(layout: str) -> str:
    """The layout of one process with the same kind of optimizer."""
    return next(
        name
        for name, (ranks, flags) in EVERY.items()
        if ranks == 1 and (SHARDED in flags) == (SHARDED in EVERY[layout][1])
    )


def change_layout(material: Material, saved_at: str, loaded_at: str, folder: pathlib.Path) -> None:
    """Load at one layout what another one has saved, save it again at once, and go on.

    Raises:
        Lost: anything differs from what was saved, or from one process that went on.
    """
    alone = material.alone[saved_at]
    gone_on = alone if loaded_at == alone_like(saved_at) else material.go_on(saved_at, loaded_at, folder)
    if problem := difference(gone_on.state, state_at(material.save_of(saved_at) / f"iter_{BEGUN:07d}")):
        raise Lost(f"{saved_at} → {loaded_at}: state after loading: {problem}")
    if problem := difference(gone_on.samples, alone.samples):
        raise Lost(f"{saved_at} → {loaded_at}: samples: {problem}")
    if gone_on.losses.keys() != set(range(BEGUN + 1, material.last + 1)):
        raise Lost(f"{saved_at} → {loaded_at}: updates {sorted(gone_on.losses)}")
    off = max(abs(gone_on.losses[number] / loss - 1) for number, loss in alone.losses.items())
    material.worst = max(material.worst, off)
    if off > TOLERANCE:
        raise Lost(f"{saved_at} → {loaded_at}: losses differ by {off:.2g} from those of one process")


def state_at(directory: pathlib.Path) -> dict[str, str]:
    """Hashes of weights, Adam state and the optimizer's settings, by unsharded names."""
    return {
        name: value for name, value in checkpoint_hashes(directory).items() if not name.startswith("content_metadata")
    }


def campaign(folder: pathlib.Path, count: int, only: int | None = None) -> Result:
    """All pairs (the first `count`), or the one of number `only`."""
    material, pairs = Material(folder), PAIRS[:count]
    wanted = sorted({PAIRS[number][0] for number in seeds(len(pairs), only)})
    run_trials("layouts-begun", list(range(len(wanted))), lambda n, _: material.begin(wanted[n]))

    def trial(number: int, place: pathlib.Path) -> None:
        change_layout(material, *PAIRS[number], place)

    return Result(
        "What one layout saves, another one loads: unsharded weights, Adam state and scheduler are bit-equal, the "
        f"order of samples stays, and in fp32 the losses of {MORE} updates agree to {TOLERANCE:g} with those of one "
        "process that went on.",
        f"All pairs of {', '.join(LAYOUTS)}, and to and from DP2 with the distributed optimizer; the state is saved "
        "again right after loading and compared by hashes.",
        f"{len(pairs)} pairs",
        run_trials("layouts", seeds(len(pairs), only), trial),
        f"losses differ by at most {material.worst:.1g}",
    )
