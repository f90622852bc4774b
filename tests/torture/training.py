"""Training killed: the newest complete checkpoint is found, and everything from there on is bit-equal."""

import json
import pathlib
import random
import re
from typing import Any

from conftest import build, stdlib_texts, write_jsonl

from torture.saboteur import Event, Fault, Outcome, cut_power, forget_copies, launch
from torture.trees import checkpoint_hashes, difference, hash_of
from torture.trials import Lost, Result, run_trials, seeds, telling

ITERATIONS, SAVE_INTERVAL = 8, 3
SHAPE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 128 --retro-layers 1,2 "
    "--retro-encoder-hidden-size 16 --retro-encoder-num-attention-heads 2 --micro-batch-size 1 --global-batch-size 4 "
    "--lr 1e-2 --log-interval 1 --eval-iters 0 --retro-random-neighbor-prob 0.2"
).split()
TENSOR, STAGES = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
SHARDED = "--use-distributed-optimizer"

# Layouts that are killed: name -> (ranks, flags, share of the trials).
LAYOUTS = {
    "one rank": (1, "", 0.7),
    "DP 2": (2, "", 0.1),
    "PP 2": (2, STAGES, 0.1),
    "DP 2, distributed optimizer": (2, f"{SHARDED} --overlap-grad-reduce --overlap-param-gather", 0.1),
}


def make_work(folder: pathlib.Path) -> pathlib.Path:
    """A small work dir to train on, unless it is there."""
    from torture.preprocessing import write_tiny_embedder

    work = folder / "training-work"
    if not work.exists():
        documents = write_jsonl(folder / "training.jsonl", stdlib_texts(40))
        embedder = write_tiny_embedder(folder / "training-embedder")
        size = ["--vocab-size", "600", "--split", "80,10,10"]
        build(work, "--input", str(documents), "--retro-embedder", str(embedder), *size)
    return work


def pretrain(
    work: pathlib.Path,
    save: pathlib.Path,
    *more: object,
    ranks: int = 1,
    fault: Fault | None = None,
    reload: pathlib.Path | None = None,
) -> Outcome:
    """A run that saves to `save`, which its fault points lie in; later ones of `more` flags win."""
    flags = ["--retro-work-dir", work, "--retro-add-retriever", *SHAPE, "--save", save]
    outcome = launch(["pretrain_retro.py", *flags, *more], save, ranks=ranks, fault=fault, reload=reload)
    if not outcome.killed and outcome.code:
        raise Lost(f"training on {ranks} ranks ended with exit code {outcome.code}\n{outcome.text[-3000:]}")
    return outcome


class Run:
    """What a run has told: figures of its updates, samples and neighbors, drawn random numbers, its last state."""

    def __init__(self, save: pathlib.Path, outcomes: list[Outcome]):
        resumed = re.search(r"resumed from \S*iter_(\d+)", outcomes[-1].text)
        self.resumed = int(resumed[1]) if resumed else 0
        self.figures: dict[int, tuple] = {}
        for line in metrics_lines(save):
            if "lm_loss" in line:
                told = tuple(line[key] for key in ("lm_loss", "grad_norm", "learning_rate", "consumed_samples"))
                if self.figures.setdefault(line["iteration"], told) != told:
                    raise Lost(f"update {line['iteration']} was {self.figures[line['iteration']]}, then {told}")
        self.samples: dict[int, str] = {}
        for outcome in outcomes:
            for fact in outcome.facts:
                if "sample" in fact:
                    told = hash_of(json.dumps([fact["chunks"], fact["neighbors"]]).encode())
                    if self.samples.setdefault(fact["sample"], told) != told:
                        raise Lost(f"sample {fact['sample']} was read with other chunks or neighbors")
        self.drawn: dict[tuple[int, int], str] = {}  # (rank, updates before the end)
        for rank in {fact["rank"] for fact in outcomes[-1].facts}:
            drawn = [fact["drawn"] for fact in outcomes[-1].facts if fact["rank"] == rank and "drawn" in fact]
            self.drawn |= {(rank, number): state for number, state in enumerate(reversed(drawn))}


def metrics_lines(save: pathlib.Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without a last one that a kill has cut."""
    file = save / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Material:
    """For each layout, an uninterrupted run on a work dir (made, if none is given)."""

    def __init__(self, folder: pathlib.Path, work: pathlib.Path | None = None):
        self.folder, self.work = folder, work or make_work(folder)
        self.runs: dict[str, Run] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.state: dict[str, dict[str, str]] = {}

    def make(self, layouts: tuple[str, ...] = tuple(LAYOUTS)) -> None:
        for layout in layouts:
            save = self.folder / layout
            outcome = self.pretrain(layout, save)
            self.outcomes[layout], self.runs[layout] = outcome, Run(save, [outcome])
            self.state[layout] = checkpoint_hashes(save / f"iter_{ITERATIONS:07d}")

    def pretrain(self, layout: str, save: pathlib.Path, fault: Fault | None = None) -> Outcome:
        ranks, flags, _ = LAYOUTS[layout]
        more = ["--load", save, "--train-iters", ITERATIONS, "--save-interval", SAVE_INTERVAL, "--hidden-dropout", 0.1]
        return pretrain(self.work, save, *more, *flags.split(), ranks=ranks, fault=fault)


def plan(material: Material, count: int) -> list[tuple[str, list[Fault]]]:
    """(layout, kills) of each trial: first each kind of fault point of a save, then random ones and random times."""
    draw = random.Random(0)
    alone = [event for event in material.outcomes["one rank"].events if is_in_save(event)]
    kinds = {
        (event.kind, re.sub(r"\d+", "0", event.path.rpartition("/")[2])): event
        for event in draw.sample(alone, len(alone))
    }
    planned = [("one rank", [Fault(0, event.number)]) for event in kinds.values()][: count * 2 // 3]
    layouts = list(material.outcomes)
    while len(planned) < count:
        (layout,) = draw.choices(layouts, [LAYOUTS[name][2] for name in layouts])
        outcome = material.outcomes[layout]
        event = draw.choice([event for event in outcome.events if is_in_save(event)])
        at_random = Fault(seconds=outcome.seconds * draw.uniform(0.3, 0.8))
        planned.append((layout, [draw.choice([at_random, Fault(event.rank, event.number, alone=draw.random() < 0.5)])]))
    for layout, faults in planned:
        while len(faults) < 3 and draw.random() < 0.3:  # what goes on is killed too
            event = draw.choice(material.outcomes[layout].events)
            faults.append(Fault(event.rank, event.number))
    return planned


def is_in_save(event: Event) -> bool:
    return "/iter_" in event.path or "latest" in event.path


def kill_and_go_on(
    material: Material, layout: str, faults: list[Fault], seed: int, folder: pathlib.Path
) -> tuple[int, int]:
    """Train, killed each time, then once to the end; the number of kills before it, and of those inside a save.

    Raises:
        Lost: more than a save interval is lost, or anything differs from the uninterrupted run.
    """
    draw, save, told = random.Random(seed), folder / "save", list[str]()
    outcomes: list[Outcome] = []
    done, cut = 0, False
    with telling(told):
        for fault in [*faults, None]:
            outcome = material.pretrain(layout, save, fault)
            outcomes.append(outcome)
            check_resumed(outcome, done)
            done = max([line["iteration"] for line in metrics_lines(save)], default=0)
            if not outcome.killed:  # it came to its end before its fault
                break
            told.append(f"killed {layout}, {fault}: before {outcome.events[-1:]}")
            if draw.random() < 0.5:
                told.append("power cut: " + cut_power(outcome, save, draw))
                cut = True
            forget_copies(save)
        check_alike(material, layout, Run(save, outcomes), save, cut=cut)
    killed = [outcome for outcome in outcomes if outcome.killed]
    return len(killed), sum(bool(outcome.events) and is_in_save(outcome.events[-1]) for outcome in killed)


def check_resumed(outcome: Outcome, done: int) -> None:
    """Check that a run which had come to `done` updates lost no more than those since the last save."""
    found = re.search(r"resumed from \S*iter_(\d+)", outcome.text)
    if outcome.killed and not found:
        return  # before it could say so
    resumed = int(found[1]) if found else 0
    if done - resumed > SAVE_INTERVAL:
        raise Lost(f"{done} updates were done, the run went on from {resumed}")


def check_alike(material: Material, layout: str, run: Run, save: pathlib.Path, *, cut: bool) -> None:
    """Compare with the uninterrupted run; where power was `cut`, figures from before the last start may be lost."""
    whole = material.runs[layout]
    expected = {update: told for update, told in whole.figures.items() if update > run.resumed or not cut}
    if problem := difference({update: run.figures.get(update) for update in expected}, expected):
        raise Lost(f"figures of updates: {problem}")
    if problem := difference(run.samples, whole.samples):
        raise Lost(f"samples and neighbors: {problem}")
    if run.drawn != {key: whole.drawn[key] for key in run.drawn}:
        raise Lost("random states differ")
    if problem := difference(checkpoint_hashes(save / f"iter_{ITERATIONS:07d}"), material.state[layout]):
        raise Lost(f"last checkpoint: {problem}")
    if left := [
        place.name
        for place in save.iterdir()
        if not re.fullmatch(r"iter_\d+|latest.*txt|metrics.jsonl|\.lock", place.name)
    ]:
        raise Lost(f"left behind: {left}")


def campaign(folder: pathlib.Path, count: int, only: int | None = None) -> Result:
    """`count` trials, each of a kill or more; or the one of number `only`."""
    material = Material(folder)
    material.make()
    planned = plan(material, count)
    kills = []
    failures = run_trials(
        "training", seeds(count, only), lambda n, place: kills.append(kill_and_go_on(material, *planned[n], n, place))
    )
    return Result(
        "A killed run finds its newest complete checkpoint and loses at most one save interval; from there on losses, "
        "gradient norms, learning rates, weights, Adam state, random states and the ids of samples and neighbors are "
        "bit-equal to those of a run that was not killed.",
        "SIGKILL of one rank or all, at each kind of fault point inside a save and at random ones and times, with "
        f"dropout and random neighbors, at {', '.join(LAYOUTS)}; half of the times power is cut too.",
        f"{sum(number for number, _ in kills)} kills, {sum(inside for _, inside in kills)} inside a save",
        failures,
    )
