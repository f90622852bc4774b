"""Where the time of a build goes, and what each stage reaches of the rate of the engine that it runs.

python benchmarks/preprocess.py --input proposals.jsonl.gz --retro-work-dir work --nproc-per-node 2
    builds the work dir where it is not there, then prints stage, seconds, share, rate, rate / bare engine, peak RSS
python benchmarks/preprocess.py --input proposals.jsonl.gz --retro-work-dir scale --chunks 10000 100000 1000000
    prints how the cost of everything but the embedder grows; --like WORK lends real embeddings, which are perturbed;
    peak memory is what a rank holds beside mapped files, which the system can take back

The bare engines are the tokenizer, the embedder's forward pass and FAISS, called in loops that do nothing else, on the
same data, with as many processes and threads as the build. The embedder and the pipeline around it embed the same
blocks in turn; the other stages' rates are those of the build.
"""

import argparse
import contextlib
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TOOL = ROOT / "tools" / "preprocess_retro_data.py"
TEXT_BYTES = 8_000_000  # that the bare tokenizer reads
EMBED_BLOCK, EMBED_BLOCKS, EMBED_ROUNDS = 512, 4, 3  # chunks that the two embedders embed in turn, a rank
SEARCHED = 2000  # chunks that bare FAISS searches, a rank


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input", required=True, nargs="+")
    parser.add_argument("--retro-work-dir", required=True, type=pathlib.Path)
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--chunks", type=int, nargs="+", help="sizes to build with stand-in embeddings")
    parser.add_argument("--like", type=pathlib.Path, help="work dir whose embeddings stand in")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        bare_engines(args)
    elif args.chunks:
        scaling(args)
    else:
        build_and_compare(args)


def launch(program: pathlib.Path, num_ranks: int, *arguments: object) -> tuple[str, int]:
    """Run a program on some ranks; (what it printed, the most memory that is no mapped file of any rank, in bytes)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command = [*(launcher if num_ranks > 1 else [sys.executable]), str(program), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak, over = [0], threading.Event()
    watch = threading.Thread(target=_watch_memory, args=(psutil.Process(process.pid), peak, over))
    watch.start()
    printed, _ = process.communicate()
    over.set()
    watch.join()
    if process.returncode:
        sys.exit(process.returncode)
    return printed, peak[0]


def _watch_memory(parent: psutil.Process, peak: list[int], over: threading.Event) -> None:
    while not over.wait(0.1):
        with contextlib.suppress(psutil.Error):
            for process in [parent, *parent.children(recursive=True)]:
                used = process.memory_info()
                peak[0] = max(peak[0], used.rss - used.shared)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------------------------------------------------------ one build


def build_and_compare(args: argparse.Namespace) -> None:
    from megatron_retro.retrieval import costs
    from megatron_retro.workdir import WorkDir

    inputs = ["--input", *args.input]
    launch(TOOL, args.nproc_per_node, "--retro-work-dir", args.retro_work_dir, *inputs)
    common = ["--retro-work-dir", args.retro_work_dir, "--nproc-per-node", args.nproc_per_node]
    printed, _ = launch(pathlib.Path(__file__), args.nproc_per_node, *inputs, *common, "--bare")
    bare = json.loads(printed.splitlines()[-1])
    work = WorkDir(args.retro_work_dir)
    spent = costs.read(work)
    seconds, memory = spent["seconds"], spent["peak_memory_mb"]
    seconds["tokenize"] -= seconds.get("tokenizer", 0)
    chunks, total = work.facts("chunks"), sum(seconds.values())
    texts = work.facts("corpus")["corpora"]
    megabytes = sum(entry["tokens"] for entry in texts) * bare["bytes_a_token"] / 1e6
    rates: dict[str, tuple[float, str, float | None]] = {
        "tokenize": (megabytes, "MB", bare["tokenize"]),
        "embed": (chunks["chunks"], "chunks", None),  # compared in turns, below
        "index-add": (chunks["database_chunks"], "chunks", bare["add"]),
        "query-neighbors": (chunks["chunks"], "queries", bare["search"]),
    }
    rows = []
    for stage in ("tokenizer", "tokenize", "db-build", "embed", "index-train", "index-add", "query-neighbors"):
        if stage not in seconds:
            continue
        amount, unit, engine = rates.get(stage, (0, "", None))
        rate = amount / max(seconds[stage], 0.05)
        ratio = rate / engine if engine else bare["embed"] / bare["bare_embed"] if stage == "embed" else None
        rows.append(
            [
                {"tokenizer": "tokenizer training"}.get(stage, stage),
                f"{seconds[stage]:,.1f}",
                f"{seconds[stage] / total:.1%}",
                f"{rate:,.0f} {unit}/s" if amount else "",
                f"{ratio:.2f}" if ratio else "",
                f"{memory.get(stage, memory['tokenize']):,} MB",
            ]
        )
    rows.append(["all", f"{total:,.1f}", "100 %", f"{chunks['chunks'] / total:,.0f} chunks/s", "", ""])
    print(markdown(["stage", "seconds", "share", "rate", "rate / bare engine", "peak RSS a rank"], rows))
    share = 1 - seconds["embed"] / total
    print(f"\nEverything but the embedder: {share:.1%} of the time; {args.nproc_per_node} ranks.")


def bare_engines(args: argparse.Namespace) -> None:
    """Rates of all ranks together, as one JSON line of rank 0."""
    import faiss
    import numpy as np

    from megatron_retro import distributed
    from megatron_retro.data.documents import Source
    from megatron_retro.retrieval.corpora import open_tokenizer
    from megatron_retro.retrieval.embedding import Embedder, chunk_texts
    from megatron_retro.retrieval.index import inverted_lists, read_index
    from megatron_retro.retrieval.query import OpenIndex
    from megatron_retro.retrieval.stages import trained_index
    from megatron_retro.workdir import WorkDir

    distributed.init_gloo(timeout_minutes=60)
    faiss.omp_set_num_threads(distributed.use_this_ranks_share())
    work = WorkDir(args.retro_work_dir)
    index = OpenIndex.open(work)
    tokenizer, facts = open_tokenizer(work), work.facts("embeddings")
    generator = np.random.default_rng(distributed.rank())

    texts, size = [], 0
    for record in Source.find(args.input[0]).records(work.settings["json_key"]):
        texts.append(record.text(work.settings["json_key"]))
        size += record.num_bytes
        if size > TEXT_BYTES:
            break
    num_bytes = sum(len(text.encode()) for text in texts)
    distributed.all_gather(0)
    start = time.perf_counter()
    num_tokens = sum(len(row) for row in tokenizer.encode(texts))
    rates = {"tokenize": num_bytes / 1e6 / (time.perf_counter() - start)}

    embedder = Embedder(facts["embedder"], facts["dtype"], 32)
    first = int(generator.integers(max(1, len(index.embeddings) - EMBED_BLOCK * EMBED_BLOCKS)))
    chunks = np.arange(first, min(first + EMBED_BLOCK * EMBED_BLOCKS, len(index.embeddings)))
    blocks = np.array_split(chunks, EMBED_BLOCKS)
    rates |= _embedders(embedder, blocks, lambda block: chunk_texts(index.table, block, tokenizer))

    count = min(SEARCHED, len(index.embeddings))
    chunks = np.sort(generator.choice(len(index.embeddings), count, replace=False))
    vectors = index.embeddings.rows(chunks).astype(np.float32)
    empty = read_index(trained_index(work), facts["width"])
    distributed.all_gather(0)
    start = time.perf_counter()
    empty.add_with_ids(vectors, chunks)
    rates["add"] = len(chunks) / (time.perf_counter() - start)
    shards = list(index.shards(keep_open=True))
    for shard in shards:
        if inverted_lists(shard) is not None:
            inverted_lists(shard).nprobe = work.settings["tuned"]["nprobe"]
        shard.search(vectors[:100], 10)
    distributed.all_gather(0)
    start = time.perf_counter()
    for shard in shards:
        shard.search(vectors, 10)
    rates["search"] = len(chunks) / (time.perf_counter() - start)

    every = distributed.all_gather(rates)
    if distributed.rank() == 0:
        summed = {name: sum(rates[name] for rates in every) for name in rates}
        print(json.dumps(summed | {"bytes_a_token": num_bytes / num_tokens}))


def _embedders(embedder: Any, blocks: list[Any], texts: Callable[[Any], list[str]]) -> dict[str, float]:
    """Chunks a second of the pipeline's embedder, and of the model alone on batches that are padded and lie ready.

    They take turns, so that a machine that is busy for a while slows both.
    """
    import numpy as np
    import torch

    from megatron_retro import distributed

    batches = []
    for block in blocks:
        rows = sorted(embedder.encode(texts(block)), key=len, reverse=True)
        batches += [embedder.pad(rows[begin : begin + 32]) for begin in range(0, len(rows), 32)]

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                last = embedder.model(dict(batch))["sentence_embedding"]
            last.cpu()  # a GPU has finished then

    def ours(folder: str) -> None:
        numbers = list(range(len(blocks)))

        def write(number: int, rows: np.ndarray) -> None:
            np.save(f"{folder}/{number}.npy", rows)

        embedder.embed_blocks(numbers, lambda number: texts(blocks[number]), write)

    seconds: dict[str, list[float]] = {"embed": [], "bare_embed": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(EMBED_ROUNDS):
            for name, run in (("bare_embed", bare), ("embed", lambda: ours(folder))):
                distributed.all_gather(0)
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    return {name: sum(map(len, blocks)) / statistics.median(values) for name, values in seconds.items()}


# ------------------------------------------------------------------------------------------------ growth


def scaling(args: argparse.Namespace) -> None:
    """Build at several sizes with stand-in embeddings; what is compared is everything but the embedder."""
    from megatron_retro.retrieval import costs
    from megatron_retro.workdir import WorkDir

    rows = []
    before: dict[str, float] = {}
    for wanted in args.chunks:
        path = args.retro_work_dir / str(wanted)
        if not WorkDir(path).has("neighbors"):
            documents = path.parent / f"documents_{wanted}.jsonl"
            if not documents.exists():
                write_documents(args.input[0], documents, wanted)
            tasks = ["--input", documents, "--retro-tasks", "tokenize,db-build", "--vocab-size", "8000"]
            _, first_peak = launch(TOOL, args.nproc_per_node, "--retro-work-dir", path, *tasks)
            stand_in(WorkDir(path), WorkDir(args.like))
            peaks = []
            for tasks in ("index-train", "index-add,query-neighbors"):
                flags = ["--retro-work-dir", path, "--retro-tasks", tasks]
                peaks.append(launch(TOOL, args.nproc_per_node, *flags)[1])
            private = {"training the index": peaks[0], "else": max(first_peak, peaks[1])}
            (path / "report" / "private_bytes.json").write_text(json.dumps(private))
        work = WorkDir(path)
        seconds = costs.read(work)["seconds"]
        private = json.loads((path / "report" / "private_bytes.json").read_text())
        now = {
            "tokenizer training": seconds["tokenizer"],
            "tokenize, db-build": seconds["tokenize"] - seconds["tokenizer"] + seconds["db-build"],
            "index-train, index-add": seconds["index-train"] + seconds["index-add"],
            "query-neighbors": seconds["query-neighbors"],
        }
        now["all"] = sum(now.values())
        factory, tuned = work.facts("index")["factory"], work.settings["tuned"]
        rows.append(
            [
                f"{work.facts('chunks')['chunks']:,}",
                f"{factory}{', nprobe ' + str(tuned['nprobe']) if tuned else ''}",
                *(f"{now[name]:,.1f}{f' (× {now[name] / before[name]:.1f})' if before else ''}" for name in now),
                f"{1000 * now['all'] / work.facts('chunks')['chunks']:.2f}",
                f"{work.settings['measured']['recall']['2']:.3f}",
                *(f"{peak / 1e6:,.0f} MB" for peak in private.values()),
            ]
        )
        before = now
    header = ["chunks", "index", *before, "ms a chunk", "recall@2", "peak memory of training the index", "of all else"]
    print(markdown(header, rows))


def write_documents(source: str, target: pathlib.Path, num_chunks: int) -> None:
    """Real lines of text in documents of random lines, about `num_chunks` chunks of them."""
    from megatron_retro.data.documents import Source

    generator = random.Random(num_chunks)
    lines = []
    for record in Source.find(source).records("text"):
        lines += [line for line in record.text("text").splitlines() if len(line) > 20]
        if len(lines) > 500_000:
            break
    num_bytes, wanted = 0, num_chunks * 64 * 4.1
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "w", encoding="utf-8") as file:
        while num_bytes < wanted:
            text = "\n".join(generator.choices(lines, k=generator.randrange(20, 400)))
            num_bytes += len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")


def stand_in(work: Any, like: Any) -> None:
    """Embeddings of another work dir, in random order with noise, in place of the embedder's."""
    import numpy as np

    from megatron_retro.retrieval.blocks import auto_block_size, plan
    from megatron_retro.retrieval.embedding import EmbeddingTable
    from megatron_retro.storage import save_npy

    real, facts = EmbeddingTable(like), like.facts("embeddings")
    size = auto_block_size(work.facts("chunks")["chunks"])
    files = []
    for block in plan(work, size):
        generator = np.random.default_rng(block.first)
        rows = real.rows(generator.integers(len(real), size=len(block))).astype(np.float32)
        rows += 0.5 * generator.standard_normal(rows.shape).astype(np.float32) / rows.shape[1] ** 0.5
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        files.append(block.path(work, "embeddings"))
        save_npy(files[-1], rows.astype(np.float16))
    work.commit("embeddings", {**facts, "embedder": "stand-in", "block_size": size}, files)


if __name__ == "__main__":
    main()
