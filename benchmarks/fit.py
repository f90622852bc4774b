"""What fitting RETRO to a trained GPT takes: few tokens more, beside a RETRO that had as many as the GPT.

python benchmarks/fit.py --output fit

Two corpora, half of the tokens each: the standard library's sources, which take long to learn, and documents of random
words that each have a copy in the database, which nothing but reading predicts. All models have the same shape; those
that are fitted begin with the GPT's last weights. Beside the longest stand a RETRO with the GPT's weights frozen, and
the GPT itself, trained as much longer.
"""

import argparse
import concurrent.futures
import json
import keyword
import os
import pathlib
import random
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = ROOT / "examples" / "quickstart" / "stdlib_documents.py"
PREPROCESS, PRETRAIN = ROOT / "tools" / "preprocess_retro_data.py", ROOT / "pretrain_retro.py"
EVALUATE = ROOT / "tools" / "evaluate_retro.py"

WORDS = keyword.kwlist[-32:]
COPIED, LENGTH = 1500, 120  # documents, words in each
CHUNK, SAMPLE, BATCH = 16, 128, 16
MODEL = "--num-layers 4 --hidden-size 64 --num-attention-heads 2".split()
READS = "--retro-add-retriever --retro-layers 2,4 --retro-num-neighbors 1".split()
TRAIN = f"--micro-batch-size {BATCH} --seq-length {SAMPLE} --log-interval 50 --eval-iters 0".split()
TRAIN += "--data-path 0.5 sources 0.5 random".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--train-iters", type=int, default=4800, help="of the GPT, and of RETRO from the start")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.03, 0.1, 0.2], help="of them that fitting takes")
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    work = build(args.output)
    shape = [*MODEL, "--lr", args.lr, "--train-iters", args.train_iters]
    runs: dict[str, list] = {"gpt": shape, "scratch": [*shape, *READS]}
    updates = dict.fromkeys(runs, args.train_iters)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # a core each
        list(pool.map(lambda name: train(args.output, work, name, runs[name]), runs))
        begin = ["--retro-fit-from", args.output / "gpt", "--seed", 4321, "--lr", args.lr]
        for share in args.shares:
            updates[f"fitted-{100 * share:g}"] = round(share * args.train_iters)
        for kind in ("frozen", "longer"):
            updates[f"{kind}-{100 * share:g}"] = round(share * args.train_iters)
        flags = {"fitted": READS, "frozen": [*READS, "--retro-freeze-decoder"], "longer": []}
        for name in updates.keys() - runs.keys():
            runs[name] = [*begin, *flags[name.split("-")[0]], "--train-iters", updates[name]]
        list(pool.map(lambda name: train(args.output, work, name, runs[name]), runs))
        asked = [(name, corpus) for name in updates for corpus in ("random", "sources")]
        modes = dict(zip(asked, pool.map(lambda one: evaluate(args.output, work, *one), asked), strict=True))
    columns = ["model", "tokens", *(f"{corpus}, {mode}" for corpus in ("random", "sources") for mode in MODES)]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in updates:
        tokens = SAMPLE * BATCH * updates[name]
        figures = [told(modes[name, corpus].get(mode)) for corpus in ("random", "sources") for mode in MODES]
        print(f"| {name} | {tokens:,} | {' | '.join(figures)} |")


MODES = ("on", "off", "random")


def told(figures: dict | None) -> str:
    """A loss with its interval, where there are documents enough for one."""
    if figures is None:
        return ""
    interval = "[{:.3f}, {:.3f}]".format(*figures["loss_interval"]) if figures["loss_interval"] else ""
    return f"{figures['loss']:.3f} {interval}".strip()


def build(output: pathlib.Path) -> pathlib.Path:
    """A work dir of the corpora `sources` and `random`, which are trained on, and `copies`, which is the database."""
    work = output / "work"
    if (work / "report" / "summary.json").exists():
        return work
    call(DOCUMENTS, output / "sources.jsonl", 800_000)
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=LENGTH)) for _ in range(COPIED)]
    write(output / "random.jsonl", texts)
    # Documents with the same number fall into the same split: one more in front moves the copies of the valid split.
    write(output / "copies.jsonl", ["The copies.", *texts])
    flags = ["--vocab-size", 1000, "--split", "95,5,0", "--retro-exclude-corpora", "sources", "random"]
    flags += ["--retro-chunk-length", CHUNK]
    inputs = [output / f"{name}.jsonl" for name in ("sources", "random", "copies")]
    call(PREPROCESS, "--retro-work-dir", work, "--input", *inputs, *flags)
    return work


def write(path: pathlib.Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def train(output: pathlib.Path, work: pathlib.Path, name: str, flags: list) -> None:
    if not (output / name / "latest_checkpointed_iteration.txt").exists():
        where = ["--retro-work-dir", work, "--save", output / name]
        call(PRETRAIN, *where, *flags, *TRAIN, log=output / f"{name}.log")


def evaluate(output: pathlib.Path, work: pathlib.Path, name: str, corpus: str) -> dict:
    report = output / f"{name}.{corpus}.json"
    where = ["--load", output / name, "--retro-work-dir", work, "--data-path", corpus, "--output", report]
    call(EVALUATE, *where, log=report.with_suffix(".log"))
    return json.loads(report.read_text())["retrieval"]


def call(program: pathlib.Path, *arguments: object, log: pathlib.Path | None = None) -> None:
    with open(log or os.devnull, "w", encoding="utf-8") as file:
        command = [sys.executable, str(program), *map(str, arguments)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with exit code {done.returncode}")


if __name__ == "__main__":
    main()
