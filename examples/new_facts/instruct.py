#!/usr/bin/env python
"""Instruction tuning: a model learns to answer from what it is given to read, and is asked about people never seen.

python examples/new_facts/instruct.py --output instruct

A small RETRO and a GPT of the same shape are pretrained on statements about world A. Both are tuned on questions about
it: half of them bring the statement that answers them, the other half read what the work dir finds. World B has other
people. Its questions are asked with their statements, with statements about somebody else, with nothing to read, and
without texts, with and without B's statements in the database.
"""

import argparse
import concurrent.futures
import json
import pathlib
import random
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from run import (  # noqa: E402
    CHUNK,
    EVALUATE,
    PREPROCESS,
    PRETRAIN,
    add,
    begin,
    call,
    make_parser,
    train_tokenizer,
    wilson,
    write,
)
from world import ATTRIBUTES, Fact  # noqa: E402

MODEL = f"--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length {8 * CHUNK}".split()
RETRO = "--retro-add-retriever --retro-layers 2,4 --retro-num-neighbors 1".split()
PRETRAINING = "--micro-batch-size 16 --lr 4e-3 --log-interval 50 --eval-iters 0".split()
TUNING = "--micro-batch-size 16 --lr 3e-3 --lr-warmup-iters 50 --log-interval 50 --eval-iters 5".split()
PROMPT = ("--qa-prompt", "{question}")


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """(exact match, F1) by case; `instruct.md` in the output directory shows them."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--pretrain-iters", type=int, default=100, help="before the --train-iters of tuning")
    args = parser.parse_args(arguments)
    directory: pathlib.Path = args.output
    world_a, world_b = begin(args)
    train_tokenizer(directory, world_a, world_b)
    write(directory / "statements.jsonl", (fact.stated() for fact in world_a))
    write(directory / "new.jsonl", (fact.stated() for fact in world_b))
    half = len(world_a) // 2
    write_questions(directory / "given.jsonl", world_a[:half], args.seed + 3, right=True)
    write_questions(directory / "searched.jsonl", world_a[half:])
    write_questions(directory / "right.jsonl", world_b, args.seed + 4, right=True)
    write_questions(directory / "wrong.jsonl", world_b, args.seed + 5, right=False)
    write_questions(directory / "asked.jsonl", world_b)

    build(directory)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # a core each
        trainings = [
            pool.submit(train, directory, name, args, flags) for name, flags in (("retro", RETRO), ("gpt", []))
        ]
        for training in trainings:
            training.result()
    add(directory, "new", "new.jsonl")

    right = ask(directory, "right", "work", gpt=True)
    results = {
        "the right text is given": right["on"],
        "a text about somebody else is given": ask(directory, "wrong", "work")["on"],
        "nothing to read": right["off"],
        "found in the database": ask(directory, "asked", "new")["on"],
        "not in the database": ask(directory, "asked", "work")["on"],
        "GPT, tuned on the same questions": right["gpt"],
    }
    report(directory, results, len(world_b))
    return {name: (figures["exact_match"], figures["f1"]) for name, figures in results.items()}


def write_questions(path: pathlib.Path, known: list[Fact], seed: int = 0, right: bool | None = None) -> None:
    """Questions with a text to read, the statement of the fact or one about somebody else; None for no text."""
    draw = random.Random(seed)
    lines = []
    for fact in known:
        line: dict[str, Any] = {"question": fact.asked(), "answers": [fact.value]}
        if right is not None:
            others = [other for other in known if other.attribute == fact.attribute and other.person != fact.person]
            line["ctxs"] = [(fact if right else draw.choice(others)).stated()]
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


def build(directory: pathlib.Path, *more: object) -> None:
    flags = ["--tokenizer-model", directory / "words.model", "--retro-chunk-length", CHUNK, "--split", "97,3,0", *more]
    call(PREPROCESS, "--retro-work-dir", directory / "work", "--input", directory / "statements.jsonl", *flags)


def train(directory: pathlib.Path, name: str, args: argparse.Namespace, flags: list[str]) -> None:
    """Pretrain, then tune what was pretrained; what is there already is not made again."""
    begun = f"{name}.pretrained"
    pretraining = [*flags, *PRETRAINING, "--train-iters", args.pretrain_iters]
    if not (directory / begun / "latest_checkpointed_iteration.txt").exists():
        call(PRETRAIN, *shape(directory), *pretraining, "--save", directory / begun, log=directory / f"{begun}.log")
    if not (directory / name / "latest_checkpointed_iteration.txt").exists():
        tune(directory, name, [*flags, "--retro-fit-from", directory / begun], args.train_iters, "given", "searched")


def tune(directory: pathlib.Path, name: str, flags: list[object], iterations: int, *files: str) -> None:
    data = ["--sft-data", *(directory / f"{file}.jsonl" for file in files)]
    data += ["--sft-valid-data", directory / "right.jsonl", *PROMPT]
    more = [*flags, *TUNING, "--train-iters", iterations, "--save", directory / name]
    call(PRETRAIN, *shape(directory), *data, *more, log=directory / f"{name}.log")


def shape(directory: pathlib.Path) -> list[object]:
    return ["--retro-work-dir", directory / "work", *MODEL]


def ask(directory: pathlib.Path, questions: str, work: str, *, gpt: bool = False) -> dict[str, dict[str, Any]]:
    """Figures by mode."""
    output = directory / f"{questions}.{work}.json"
    flags = ["--load", directory / "retro", "--retro-work-dir", directory / work, "--split", "none", *PROMPT]
    flags += ["--qa", directory / f"{questions}.jsonl", "--qa-max-new-tokens", 6, "--micro-batch-size", 60]
    call(EVALUATE, *flags, *(["--gpt", directory / "gpt"] if gpt else []), "--output", output)
    return json.loads(output.read_text())["questions"]["modes"]


def report(directory: pathlib.Path, results: dict[str, dict[str, Any]], count: int) -> None:
    lines = [f"| {count} questions about people never seen | exact match | 95 % interval | F1 |", "|---|---|---|---|"]
    for name, figures in results.items():
        low, high = wilson(figures["exact_match"], count)
        lines.append(f"| {name} | {figures['exact_match']:.1%} | {low:.1%} … {high:.1%} | {figures['f1']:.1%} |")
    chance = sum(1 / len(values.split()) for values, _, _ in ATTRIBUTES.values()) / len(ATTRIBUTES)
    lines.append(f"| chance | {chance:.1%} | | |")
    text = "\n".join(lines)
    (directory / "instruct.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
