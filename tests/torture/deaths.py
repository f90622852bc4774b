"""Every rank of two to four, stopped or killed in everything that several ranks do: all others end, and name it."""

import itertools
import pathlib
import re
import shutil
import signal

from conftest import build, stdlib_texts, write_jsonl
from launch import ROOT, LeftAlone, run_forked

from torture.preprocessing import write_tiny_embedder
from torture.training import SHAPE
from torture.trials import Lost, Result, run_trials, seeds

WHERE = ("preprocessing", "training", "save", "evaluation")
TRIALS = [
    (where, ranks, victim, number)
    for where, ranks, number in itertools.product(WHERE, (2, 3, 4), (signal.SIGSTOP, signal.SIGKILL))
    for victim in range(ranks)
]
TIMEOUT_SECONDS, MORE_SECONDS = 6, 30
DISTRIBUTED = ("--distributed-timeout-minutes", TIMEOUT_SECONDS / 60)


class Material:
    """What the programs work on: documents in chunks, a finished work dir, a checkpoint."""

    def __init__(self, folder: pathlib.Path):
        self.begun, self.work, self.trained = (folder / name for name in ("begun", "work", "trained"))
        documents = write_jsonl(folder / "documents.jsonl", stdlib_texts(40))
        embedder = write_tiny_embedder(folder / "embedder")
        flags = ["--input", str(documents), "--retro-embedder", str(embedder), "--vocab-size", "600"]
        flags += ["--split", "80,10,10", "--retro-block-size", "50"]
        build(self.begun, *flags, "--retro-tasks", "tokenize,db-build")
        shutil.copytree(self.begun, self.work)
        build(self.work, *flags)
        run_forked(*self.training(1), "--train-iters", 1, "--save", self.trained)
        self.building = ("--retro-embedder", embedder, "--retro-block-size", 50)

    def training(self, ranks: int) -> list[object]:
        batch = ["--micro-batch-size", 1, "--global-batch-size", ranks]
        return ["pretrain_retro.py", "--retro-work-dir", self.work, "--retro-add-retriever", *SHAPE, *batch]

    def program(self, where: str, ranks: int, folder: pathlib.Path) -> list[object]:
        """One that runs until its victim's end."""
        if where == "preprocessing":
            work = shutil.copytree(self.begun, folder / "work")
            return [ROOT / "tools/preprocess_retro_data.py", "--retro-work-dir", work, *self.building]
        if where == "evaluation":
            load = ["--load", self.trained, "--retro-work-dir", self.work, "--micro-batch-size", 1]
            return [ROOT / "tools/evaluate_retro.py", *load]
        saves = ["--save", folder / "save", "--save-interval", 3] if where == "save" else []
        return [*self.training(ranks), "--train-iters", 100000, *saves]


def campaign(folder: pathlib.Path, count: int, only: int | None = None) -> Result:
    """So many of `TRIALS`, spread over them, or the one of number `only`."""
    material = Material(folder)

    def trial(number: int, place: pathlib.Path) -> None:
        where, ranks, victim, how = TRIALS[29 * number % len(TRIALS)]
        end_one_rank(material, place, where, ranks, victim, how)

    failures = run_trials("deaths", seeds(min(count, len(TRIALS)), only), trial)
    return Result(
        "A rank that is stopped or dies ends all others within the timeout and 30 s, and each names it",
        f"SIGSTOP and SIGKILL to each rank of 2, 3 and 4, in {', '.join(WHERE)}",
        f"{min(count, len(TRIALS))} ranks ended",
        failures,
    )


def end_one_rank(
    material: Material, folder: pathlib.Path, where: str, ranks: int, victim: int, how: signal.Signals
) -> None:
    """One trial.

    Raises:
        Lost: some rank did not end, or does not say who is gone.
    """
    sabotage = f"sabotage:signal_itself:{where}:{victim}:{int(how)}"
    program = [*material.program(where, ranks, folder), *DISTRIBUTED]
    run = LeftAlone(folder / "ranks", *program, ranks=ranks, sabotage=sabotage)
    what = f"{how.name} of rank {victim} of {ranks} in {where}"
    others = [rank for rank in range(ranks) if rank != victim]
    try:
        codes = run.wait(*others, seconds=60 + TIMEOUT_SECONDS + MORE_SECONDS)  # a minute to come there
    except AssertionError as error:
        raise Lost(f"{what}: {error}") from None
    for rank in others:
        text = run.printed(rank)
        line = rf"error: rank {victim} is gone: .*; rank {rank} (waited for it|was) in "
        if codes[rank] != 1 or not re.search(line, text) or "Traceback" in text:
            raise Lost(f"{what}: rank {rank} ended with exit code {codes[rank]}\n{text[-3000:]}")
