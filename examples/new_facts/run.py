#!/usr/bin/env python
"""New facts without training: a model reads facts of a world that it has never seen, and follows when they change.

python examples/new_facts/run.py --output new_facts

World A is learned from: statements stand in the database, questions are trained on. World B has other people. Its
questions are asked with B's statements in the database, without them, with other values in them, and after they were
removed. Only the database changes; the weights stay. A GPT with as many parameters is asked too.
"""

import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from world import ATTRIBUTES, Fact, changed, facts, people  # noqa: E402

from megatron_retro.data.tokenizer import Tokenizer  # noqa: E402

CHUNK = 12  # tokens; a question ends with its chunk, its answer begins the next
QUESTIONS = 7  # a document; with the last answer they fill a sample
FILLER = " ."  # one token, as often as it takes to fill a question's chunk
ANSWER_TOKENS = 8
PREPROCESS, PRETRAIN = ROOT / "tools" / "preprocess_retro_data.py", ROOT / "pretrain_retro.py"
GENERATE, EVALUATE = ROOT / "tools" / "generate_retro_text.py", ROOT / "tools" / "evaluate_retro.py"

WIDTH = 64
MODEL = f"--num-layers 4 --hidden-size {WIDTH} --num-attention-heads 4 --seq-length {(QUESTIONS + 1) * CHUNK}".split()
RETRO = "--retro-add-retriever --retro-layers 2,4 --retro-num-neighbors 1".split()
TRAIN = "--micro-batch-size 16 --lr 4e-3 --lr-warmup-iters 100 --log-interval 50 --eval-iters 0".split()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """The share of right answers by case; `report.md` and `report.svg` in the output directory show it."""
    args = make_parser(__doc__ or "").parse_args(arguments)
    directory: pathlib.Path = args.output
    world_a, world_b = begin(args)
    world_c = changed(world_b, args.seed + 3)

    tokenizer = train_tokenizer(directory, world_a, world_b)
    write(directory / "statements.jsonl", (fact.stated() for fact in world_a))
    write(directory / "questions.jsonl", exams(world_a, tokenizer, args.seed + 4))
    write(directory / "new.jsonl", (fact.stated() for fact in world_b))
    write(directory / "changed.jsonl", (fact.stated() for fact in world_c))
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": filled(fact.asked(), tokenizer)}) + "\n" for fact in world_b))

    build(directory, "work", "--input", directory / "statements.jsonl", directory / "questions.jsonl")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # a core each
        retro = pool.submit(train, directory, "retro", args.train_iters, RETRO)
        width = equal_ffn(tokenizer.vocab_size)
        gpt = pool.submit(train, directory, "gpt", args.train_iters, ["--ffn-hidden-size", str(width)])
        retro.result(), gpt.result()

    add(directory, "new", "new.jsonl")
    add(directory, "changed", "changed.jsonl")
    remove(directory, "removed", "new", len(world_b))
    asked = {
        "a. new facts in the database": ("retro", "new", world_b),
        "b. not in the database": ("retro", "work", world_b),
        "c. values changed in the database": ("retro", "changed", world_c),
        "   asked for the old values": ("retro", "changed", world_b),
        "d. removed from the database": ("retro", "removed", world_b),
        "e. GPT of equal size": ("gpt", "new", world_b),
    }
    shares = {name: ask(directory, model, work, prompts, expected) for name, (model, work, expected) in asked.items()}
    losses = {model: evaluate(directory, model) for model in ("retro", "gpt")}
    report(directory, shares, losses, len(world_b))
    return shares


# ------------------------------------------------------------------------------------------------ worlds


def make_parser(doc: str) -> argparse.ArgumentParser:
    """The arguments that every program with these worlds has."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="directory for everything")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--people", type=int, default=600, help="in world A")
    parser.add_argument("--new-people", type=int, default=60, help="in world B")
    parser.add_argument("--train-iters", type=int, default=600)
    return parser


def begin(args: argparse.Namespace) -> tuple[list[Fact], list[Fact]]:
    """Make the output directory; the facts of worlds A and B."""
    args.output.mkdir(parents=True, exist_ok=True)
    everyone = people(args.seed)
    new_people = everyone[args.people : args.people + args.new_people]
    return facts(everyone[: args.people], args.seed + 1), facts(new_people, args.seed + 2)


# ------------------------------------------------------------------------------------------------ texts


def write(path: pathlib.Path, texts: Iterable[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def exams(known: list[Fact], tokenizer: Tokenizer, seed: int) -> Iterator[str]:
    """Documents of questions in random order; a chunk is an answer, fillers and the next question."""
    order = random.Random(seed).sample(known, len(known))
    for begin in range(0, len(order), QUESTIONS):
        text = ""
        for fact in order[begin : begin + QUESTIONS]:
            text += filled(fact.asked(), tokenizer, CHUNK - bool(text)) + f" {fact.value}"
        yield text + " ."


def train_tokenizer(directory: pathlib.Path, *worlds: list[Fact]) -> Tokenizer:
    """A word a token. All names and values are in it; who has what is not."""
    import sentencepiece

    path = directory / "words.model"
    texts = [f"{FILLER} {fact.asked()} {fact.value} {fact.stated()}" for world in worlds for fact in world]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(path.with_suffix("")),
        model_type="word",
        vocab_size=1000,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        bos_id=-1,
        eos_id=1,
        eos_piece="<eod>",
        pad_id=2,
        pad_piece="<pad>",
        minloglevel=2,
    )
    return Tokenizer.open(path)


def filled(question: str, tokenizer: Tokenizer, room: int = CHUNK) -> str:
    """The question behind so many fillers that it takes `room` tokens."""
    missing = room - len(tokenizer.encode([question])[0])
    assert missing >= 0, f"{question!r} has more than {room} tokens"
    return FILLER * missing + " " + question


# ------------------------------------------------------------------------------------------------ steps


def call(program: pathlib.Path, *arguments: object, ranks: int = 1, log: pathlib.Path | None = None) -> None:
    """Run a program of this project, or leave it to say why not."""
    start = [
        sys.executable,
        *(("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()),
    ]
    command = [*start, str(program), *map(str, arguments)]
    with open(log, "w", encoding="utf-8") if log else open(os.devnull, "w", encoding="utf-8") as file:
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with exit code {done.returncode}")


def build(directory: pathlib.Path, name: str, *inputs: object) -> None:
    flags = ["--tokenizer-model", directory / "words.model", "--retro-chunk-length", CHUNK, "--split", "97,3,0"]
    flags += ["--retro-exclude-corpora", "questions"]
    call(PREPROCESS, "--retro-work-dir", directory / name, *inputs, *flags, ranks=2)


def copy(directory: pathlib.Path, source: str, name: str) -> pathlib.Path:
    """A work dir beside another; the files that a change leaves are shared."""
    shutil.rmtree(directory / name, ignore_errors=True)
    return shutil.copytree(directory / source, directory / name, copy_function=os.link)


def add(directory: pathlib.Path, name: str, documents: str) -> None:
    work = copy(directory, "work", name)
    call(PREPROCESS, "--retro-work-dir", work, "--retro-tasks", "add-documents", "--input", directory / documents)


def remove(directory: pathlib.Path, name: str, source: str, count: int) -> None:
    ids = directory / "removed.txt"
    ids.write_text("".join(f"{source}:{number}\n" for number in range(count)))
    work = copy(directory, source, name)
    call(PREPROCESS, "--retro-work-dir", work, "--retro-tasks", "remove-documents", "--document-ids", ids)


def train(directory: pathlib.Path, name: str, iterations: int, flags: list[str]) -> None:
    where = ["--retro-work-dir", directory / "work", "--save", directory / name, "--data-path", "questions"]
    shape = [*MODEL, *flags, *TRAIN, "--train-iters", iterations]
    if not (directory / name / "latest_checkpointed_iteration.txt").exists():  # a second run skips what is there
        call(PRETRAIN, *where, *shape, log=directory / f"{name}.log")


def ask(directory: pathlib.Path, model: str, work: str, prompts: pathlib.Path, expected: list[Fact]) -> float:
    """The share of questions whose answer begins with the expected value."""
    output = directory / f"answers_{model}_{work}.jsonl"
    flags = ["--max-new-tokens", ANSWER_TOKENS, "--temperature", 0, "--json", "--output", output]
    call(GENERATE, "--load", directory / model, "--retro-work-dir", directory / work, "--prompt-file", prompts, *flags)
    answers = [json.loads(line)["text"].split() for line in output.read_text().splitlines()]
    return sum(words[:1] == [fact.value] for words, fact in zip(answers, expected, strict=True)) / len(expected)


def evaluate(directory: pathlib.Path, model: str) -> dict:
    """Losses on questions of world A that were not trained on."""
    output = directory / f"{model}.json"
    where = ["--load", directory / model, "--retro-work-dir", directory / "work", "--data-path", "questions"]
    call(EVALUATE, *where, "--output", output)
    return json.loads(output.read_text())["retrieval"]


def equal_ffn(vocab_size: int) -> int:
    """The width of a GPT's MLP that gives it as many parameters as RETRO has: encoder and cross-attentions count."""
    from megatron_retro.config.flags import parse
    from megatron_retro.config.training import PretrainConfig

    config = parse(PretrainConfig, [*MODEL, *RETRO])
    model, retro = config.model, config.retro
    model.finish()
    retro.finish(model)
    width, inner = model.hidden_size, model.ffn_hidden_size or 0
    attention, mlp = 4 * width * width, 2 * width * inner
    cross_attentions = (len(retro.layers) + 1) * attention  # one of them the encoder's
    extra = cross_attentions + retro.retro_encoder_layers * (attention + mlp) + vocab_size * width
    return inner + round(extra / (2 * width * model.num_layers))


# ------------------------------------------------------------------------------------------------ report


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.96
    center, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (center - half) / (1 + z * z / count), (center + half) / (1 + z * z / count)


def report(directory: pathlib.Path, shares: dict[str, float], losses: dict[str, dict], count: int) -> None:
    chance = sum(1 / len(values.split()) for values, _, _ in ATTRIBUTES.values()) / len(ATTRIBUTES)
    lines = [f"| {count} questions about people never seen | right | 95 % interval |", "|---|---|---|"]
    for name, share in shares.items():
        low, high = wilson(share, count)
        lines.append(f"| {name.strip()} | {share:.1%} | {low:.1%} … {high:.1%} |")
    lines.append(f"| chance | {chance:.1%} | |")
    off, gpt = losses["retro"]["off"]["loss"], losses["gpt"]["off"]["loss"]
    lines += [
        "",
        f"Loss on held-out questions of world A: RETRO {losses['retro']['on']['loss']:.4f} on, {off:.4f} off, "
        f"{losses['retro']['random']['loss']:.4f} random; GPT {gpt:.4f}; off / GPT {off / gpt:.3f}.",
    ]
    text = "\n".join(lines)
    (directory / "report.md").write_text(text + "\n")
    (directory / "report.svg").write_text(plot(shares, count, chance))
    print(text)


def plot(shares: dict[str, float], count: int, chance: float) -> str:
    """Bars with their intervals and a line at chance, as SVG."""
    left, width, step = 240, 400, 34
    height = step * len(shares) + 50
    box = f"{left + width + 80} {height}"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {box}" font-family="sans-serif" font-size="13">']
    parts.append(f'<rect width="{left + width + 80}" height="{height}" fill="white"/>')
    for row, (name, share) in enumerate(shares.items()):
        top, (low, high) = 12 + step * row, wilson(share, count)
        from_to = f"M{left + width * low:.1f} {top + 10}H{left + width * high:.1f}"
        parts.append(f'<text x="{left - 10}" y="{top + 15}" text-anchor="end">{name.strip()}</text>')
        parts.append(f'<rect x="{left}" y="{top}" width="{width * share:.1f}" height="20" fill="#2f5fc4"/>')
        parts.append(f'<path d="{from_to}" stroke="#111" stroke-width="1.5"/>')
        parts.append(f'<text x="{left + width * max(high, chance) + 8:.1f}" y="{top + 15}">{share:.1%}</text>')
    bottom, at = 12 + step * len(shares), left + width * chance
    parts.append(f'<path d="M{at:.1f} 4V{bottom}" stroke="#c33" stroke-dasharray="4 3"/>')
    parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#c33">chance</text>')
    parts.append(f'<text x="{left + width}" y="{bottom + 16}" text-anchor="middle">all right</text>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    main()
