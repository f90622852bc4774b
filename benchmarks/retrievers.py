"""What a retriever is worth: the same model, trained on the same samples with the neighbors of each.

python benchmarks/retrievers.py --retro-work-dir work --output retrievers --train-iters 800

Each variant is a copy of the work dir (files are linked, not copied) with neighbors of its own. Printed are bits a byte
on the valid split with retrieval on, off and random, and two figures that need no training: the share of a chunk's
tokens that complete a trigram standing in the two neighbors, with their continuations, of the chunk before it, and the
share that stands in them at all.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODEL = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --init-method-std 0.08 --retro-layers 2,4 "
    "--seq-length 512 --micro-batch-size 4 --lr 3e-3 --lr-warmup-iters 40 --bf16"
).split()
# name -> (retriever, flags of training); None is the GPT
VARIANTS: dict[str, tuple[str, list[str]] | None] = {
    "dense": ("dense", []),
    "bm25": ("bm25", []),
    "hybrid": ("hybrid", []),
    "dense, max overlap 0.5": ("dense", ["--retro-max-overlap", "0.5"]),
    "GPT": None,
}
SAMPLED = 2000  # chunks of the valid split


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--retro-work-dir", required=True, type=pathlib.Path)
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--train-iters", type=int, default=800)
    parser.add_argument("--at-once", type=int, default=2, help="models trained side by side, a core each")
    args = parser.parse_args()
    dirs = {kind: with_retriever(args.retro_work_dir, args.output / kind, kind) for kind in ("dense", "bm25", "hybrid")}
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        found = dict(zip(VARIANTS, pool.map(lambda name: trained(name, dirs, args), VARIANTS), strict=True))
    print(
        "| retriever | ms a query | next tokens completing a trigram | standing there | on | off | random | on − off |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, report in found.items():
        variant = VARIANTS[name]
        figures = ["", "", ""]
        if variant:
            cost = json.loads((dirs[variant[0]] / "report" / "summary.json").read_text())["ms_per_query"]
            figures = [f"{cost:.2f}", *(f"{share:.1%}" for share in copyable(dirs[variant[0]]))]
        modes = report["retrieval"]
        bits = [f"{modes[mode]['bits_per_byte']:.4f}" if mode in modes else "" for mode in ("on", "off", "random")]
        print(f"| {' | '.join([name, *figures, *bits, gain(modes)])} |")


def gain(modes: dict) -> str:
    """Nats a token, with its 95 % interval over samples."""
    if "on" not in modes:
        return ""
    low, high = modes["on"]["versus_off_interval"]
    return f"{modes['on']['versus_off']:+.4f} [{low:+.4f}, {high:+.4f}]"


def with_retriever(source: pathlib.Path, target: pathlib.Path, kind: str) -> pathlib.Path:
    """A linked copy of a work dir with the neighbors of another retriever."""
    from megatron_retro.workdir import WorkDir

    if not target.exists():
        ignored = shutil.ignore_patterns("neighbors*", "report", "*.tmp*")
        shutil.copytree(source, target, copy_function=os.link, ignore=ignored)
        work = WorkDir(target)
        del work.manifest["stages"]["neighbors"]
        del work.settings["retro_retriever"]
        work.write()
    tool = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    tool += [str(ROOT / "tools" / "preprocess_retro_data.py"), "--retro-work-dir", str(target)]
    subprocess.run([*tool, "--retro-tasks", "query-neighbors", "--retro-retriever", kind], check=True)
    return target


def trained(name: str, dirs: dict[str, pathlib.Path], args: argparse.Namespace) -> dict:
    """Train and evaluate one variant."""
    variant = VARIANTS[name]
    work = dirs[variant[0]] if variant else dirs["dense"]
    directory = args.output / "models" / name.replace(" ", "_").replace(",", "")
    report = directory / "eval.json"
    if not report.exists():
        flags = ["--retro-add-retriever", *variant[1]] if variant else []
        model = [arg for arg in MODEL] if variant else [arg for arg in MODEL if arg not in ("--retro-layers", "2,4")]
        train = ["pretrain_retro.py", "--retro-work-dir", work, "--save", directory, "--train-iters", args.train_iters]
        evaluate = ["tools/evaluate_retro.py", "--load", directory, "--retro-work-dir", work, "--split", "valid"]
        for command in ([*train, *model, *flags], [*evaluate, "--output", report]):
            program = [sys.executable, str(ROOT / str(command[0])), *map(str, command[1:])]
            subprocess.run(program, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return json.loads(report.read_text())


def copyable(path: pathlib.Path) -> tuple[float, float]:
    """Shares of a chunk's tokens that the neighbors of the chunk before it foretell: as trigrams, and at all."""
    import numpy as np

    from megatron_retro.data.chunks import ChunkTable
    from megatron_retro.retrieval.neighbors import NeighborTable
    from megatron_retro.training.data import split_weights
    from megatron_retro.workdir import WorkDir

    work = WorkDir(path)
    table, neighbors = ChunkTable.open(work), NeighborTable(work)
    chunks = table.chunks_of(table.documents_in("valid", split_weights(work)))
    chunks = chunks[~table.is_last(chunks)]
    chunks = np.random.default_rng(0).choice(chunks, min(SAMPLED, len(chunks)), replace=False)
    length = table.chunk_length
    text, text_lengths = table.tokens(chunks, 2 * length, -1)
    near, near_lengths = table.tokens(neighbors.ids(chunks)[:, :2].reshape(-1), 2 * length, -1)
    trigrams = single = total = 0
    for row in range(len(chunks)):
        seen: set[tuple[int, ...]] = set()
        pair = slice(2 * row, 2 * row + 2)
        for padded, count in zip(near[pair].tolist(), near_lengths[pair], strict=True):
            tokens = padded[:count]
            seen.update(zip(tokens, tokens[1:], tokens[2:], strict=False))
            seen.update((token,) for token in tokens)
        tokens = text[row].tolist()
        for place in range(length, int(text_lengths[row])):
            trigrams += tuple(tokens[place - 2 : place + 1]) in seen
            single += (tokens[place],) in seen
            total += 1
    return trigrams / total, single / total


if __name__ == "__main__":
    main()
