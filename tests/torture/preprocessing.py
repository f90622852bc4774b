"""Preprocessing killed: whatever is killed and wherever, the same commands end with the same bytes."""

import collections
import pathlib
import random
import re
import shutil

import torch
import transformers
from conftest import stdlib_texts, write_jsonl

from torture.saboteur import Event, Fault, Outcome, cut_power, forget_copies, launch
from torture.trees import difference, tree
from torture.trials import Lost, Result, run_trials, seeds, telling

TOOL = "tools/preprocess_retro_data.py"


class Material:
    """Documents, a tiny embedder, and what uninterrupted runs make of them, step by step.

    Attributes:
        steps: name -> (name of the step before or "", command behind the work dir's).
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        texts = stdlib_texts(30, 1000)
        first = write_jsonl(folder / "first.jsonl", texts[:20])
        second = write_jsonl(folder / "second.jsonl", texts[20:])
        (folder / "gone.txt").write_text("first:3\nfirst:4\nfirst:17\n")
        embedder = write_tiny_embedder(folder / "embedder")
        begin = ["--input", first, "--vocab-size", 600, "--split", "80,10,10", "--retro-block-size", 30]
        begin += ["--retro-embedder", embedder]
        lists = ["--retro-index-str", "IVF4,Flat", "--retro-retriever", "hybrid"]
        self.steps: dict[str, tuple[str, list[object]]] = {
            "build": ("", begin),
            "build-lists": ("", [*begin, *lists]),
            "add": ("build", ["--retro-tasks", "add-documents", "--input", second]),
            "remove": ("add", ["--retro-tasks", "remove-documents", "--document-ids", folder / "gone.txt"]),
            "compact": ("remove", ["--retro-tasks", "compact"]),
        }
        self.events: dict[tuple[str, int], list[Event]] = {}
        self.seconds: dict[tuple[str, int], float] = {}

    def make(self, steps: tuple[str, ...] = (), num_ranks: tuple[int, ...] = (1, 2)) -> None:
        """Run the steps (all, if none is named) once, uninterrupted, on each number of ranks.

        Raises:
            Lost: the numbers of ranks differ in what they make.
        """
        for step in steps or tuple(self.steps):
            for ranks in num_ranks:
                work = self.begin(step, self.folder / f"{step}.{ranks}" / "work")
                outcome = self.run(step, work, ranks)
                self.events[step, ranks], self.seconds[step, ranks] = outcome.events, outcome.seconds
                if ranks == num_ranks[0]:
                    shutil.copytree(work, self.reference(step))
                if told := difference(tree(work), tree(self.reference(step))):
                    raise Lost(f"{step} on {ranks} ranks differs from {num_ranks[0]}'s: {told}")

    def reference(self, step: str) -> pathlib.Path:
        return self.folder / "references" / step

    def begin(self, step: str, work: pathlib.Path) -> pathlib.Path:
        """The work dir from which a step starts."""
        before = self.steps[step][0]
        work.parent.mkdir(parents=True, exist_ok=True)
        if before:
            shutil.copytree(self.reference(before), work)
        return work

    def run(self, step: str, work: pathlib.Path, ranks: int, fault: Fault | None = None) -> Outcome:
        outcome = launch([TOOL, "--retro-work-dir", work, *self.steps[step][1]], work, ranks=ranks, fault=fault)
        if not outcome.killed and outcome.code:
            raise Lost(f"{step} on {ranks} ranks ended with exit code {outcome.code}\n{outcome.text[-3000:]}")
        return outcome


def write_tiny_embedder(directory: pathlib.Path) -> pathlib.Path:
    """A BERT of one narrow layer with random weights."""
    directory.mkdir()
    letters = [chr(number) for number in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (directory / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **shape)).save_pretrained(directory)
    transformers.BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory)
    return directory


def kind_of(event: Event) -> tuple[str, str]:
    """Fault points that are alike: numbers and names of corpora left out of their paths."""
    path = (event.second or event.path).partition("/work")[2]
    return event.kind, re.sub(r"\d+", "0", re.sub("first|second", "*", path))


Kill = tuple[int, Fault]  # of a launch on so many ranks


def plan(material: Material, count: int) -> list[tuple[str, list[Kill]]]:
    """(step, kills) of each trial: first each kind of fault point once, then random ones and random times."""
    draw = random.Random(0)
    planned: list[tuple[str, list[Kill]]] = []
    for points in points_alike(material).values():
        step, ranks, event = draw.choice(points)
        planned.append((step, [_kill(ranks, event, draw)]))
    draw.shuffle(planned)
    keys = sorted(material.events)
    while len(planned) < count:
        step, ranks = draw.choice(keys)
        at_random = (ranks, Fault(seconds=draw.uniform(0.1, 0.8) * material.seconds[step, ranks]))
        planned.append(
            (step, [draw.choice([at_random, _kill(ranks, draw.choice(material.events[step, ranks]), draw)])])
        )
    for step, kills in planned:
        while len(kills) < 3 and draw.random() < 0.4:  # what goes on is killed too
            ranks = draw.choice([1, 2])
            kills.append(_kill(ranks, draw.choice(material.events[step, ranks]), draw))
    return planned[:count]


def points_alike(material: Material) -> dict[tuple[str, str], list[tuple[str, int, Event]]]:
    """Kind of fault point -> (step, ranks, event) of all of them."""
    alike = collections.defaultdict(list)
    for (step, ranks), events in material.events.items():
        for event in events:
            alike[kind_of(event)].append((step, ranks, event))
    return alike


def _kill(ranks: int, event: Event, draw: random.Random) -> Kill:
    return ranks, Fault(event.rank, event.number, alone=draw.random() < 0.3)


def kill_and_go_on(material: Material, step: str, kills: list[Kill], seed: int, folder: pathlib.Path) -> int:
    """Run a step, killed each time, then once to its end; the number of kills that came before it ended.

    Raises:
        Lost: the end differs from an uninterrupted run's, or more than a block a rank was made again.
    """
    draw, work, told = random.Random(seed), material.begin(step, folder / "work"), list[str]()
    finished: collections.Counter[str] = collections.Counter()
    allowed, cut = 0, False
    with telling(told):
        for ranks, fault in [*kills, (draw.choice([1, 2, 3]), None)]:
            outcome = material.run(step, work, ranks, fault)
            finished.update(finished_blocks(outcome))
            if not outcome.killed:  # it came to its end before its fault
                break
            allowed += ranks
            told.append(f"killed {step} on {ranks} ranks, {fault}: {_last(outcome)}")
            if draw.random() < 0.5:
                told.append("power cut: " + cut_power(outcome, work, draw))
                cut = True
            forget_copies(work)
        again = sum((finished - collections.Counter(finished.keys())).values())
        if again > allowed and not cut:
            raise Lost(f"{again} blocks were made again, {finished.most_common(4)}")
        if problem := difference(tree(work), tree(material.reference(step))):
            raise Lost(problem)
    return sum(line.startswith("killed") for line in told)


def finished_blocks(outcome: Outcome) -> set[str]:
    """Blocks, of any stage, that a launch has given their names."""
    files = [event.second for event in outcome.events[: -1 if outcome.killed else None] if event.kind == "rename"]
    found = [_BLOCK.search(file) for file in files if ".partial/" not in file]  # a file in there is part of a whole
    return {match[1] for match in found if match}


_BLOCK = re.compile(
    r"/work/((?:corpus|embeddings|index|neighbors)[^/]*/.*?)(?:\.ids|\.distances)?\.(?:npy|bin|idx|json|faiss)$"
)


def _last(outcome: Outcome) -> str:
    if not outcome.events:
        return "before its first fault point"
    last = outcome.events[-1]
    return f"before {last.kind} {last.path} {last.second}"


def campaign(folder: pathlib.Path, count: int, only: int | None = None) -> Result:
    """`count` kills or more; all trials, or the one of number `only`."""
    material = Material(folder)
    material.make()
    planned = plan(material, count)
    kills = []

    def trial(number: int, place: pathlib.Path) -> None:
        kills.append(kill_and_go_on(material, *planned[number], number, place))

    failures = run_trials("preprocessing", seeds(len(planned), only), trial)
    kinds = len(points_alike(material))
    return Result(
        "A killed build goes on with any number of ranks and ends with the bytes of one that was not; no more than one "
        "block a rank is made again.",
        f"SIGKILL of one rank or all, at {min(kinds, len(planned))} of the {kinds} kinds of fault point (before a "
        "write with half of it done, an fsync, a rename, a removal) and at random times, 1 and 2 ranks, while building "
        "(dense and hybrid), adding, removing and compacting; half of the times power is cut too: what was not synced "
        "is lost. "
        "Gone on with 1, 2 or 3 ranks, killed again now and then.",
        f"{sum(kills)} kills",
        failures,
    )
