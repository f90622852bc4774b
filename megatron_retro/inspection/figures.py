"""A work dir in figures: what its stages recorded, and what a sample of its chunks shows."""

import collections
import itertools
from typing import Any

import numpy as np

from megatron_retro.config.preprocessing import CHANGES, TASKS
from megatron_retro.data.chunks import ChunkTable
from megatron_retro.errors import UserError
from megatron_retro.inspection.sample import Sample
from megatron_retro.reading import parse_json, read_text
from megatron_retro.retrieval import costs
from megatron_retro.retrieval.progress import duration
from megatron_retro.workdir import WorkDir

_BARS = 33

Rows = list[tuple[str, str]]


def recorded(work: WorkDir) -> list[tuple[str, Rows]]:
    """Titles, each with rows of a name and its value; "not measured" is a value."""
    return [("Text", _text(work)), ("Retrieval", _retrieval(work)), ("Time and memory", _cost(work))]


def _text(work: WorkDir) -> Rows:
    chunks, tokenizer = work.facts("chunks"), work.facts("tokenizer")
    skipped: collections.Counter = collections.Counter()
    for corpus in work.facts("corpus")["corpora"]:
        skipped.update(corpus["skipped"])
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    padding = 1 - chunks["tokens"] / max(1, chunks["chunks"] * chunks["chunk_length"])
    removed = chunks.get("removed_documents", 0)
    return [
        ("corpora", ", ".join(corpus["name"] for corpus in chunks["corpora"])),
        ("documents", f"{chunks['documents']:,}" + (f", {removed:,} removed" if removed else "")),
        ("skipped records", reasons or "none"),
        ("tokens", f"{chunks['tokens']:,}"),
        ("vocabulary", f"{tokenizer['vocab_size']:,}"),
        ("chunks", f"{chunks['chunks']:,} of {chunks['chunk_length']} tokens"),
        ("padding", f"{padding:.1%}"),
        ("in the database", f"{chunks['database_chunks']:,} ({chunks['database_chunks'] / chunks['chunks']:.0%})"),
    ]


def _retrieval(work: WorkDir) -> Rows:
    embedder, index, neighbors = (work.facts(stage) for stage in ("embeddings", "index", "neighbors"))
    summary = _summary(work)
    measured = {**index, **neighbors, **summary.get("tuned", {}), **summary}
    recall = measured.get("recall", {})

    def told(name: str, form: str, unit: str = "") -> str:
        return f"{measured[name]:{form}}{unit}" if measured.get(name) is not None else "not measured"

    rows = [
        ("retriever", measured.get("retriever", "dense")),
        ("embedder", embedder["embedder"]),
        ("embedding", f"{embedder['width']} wide, {embedder['dtype']}"),
        ("index", index["factory"]),
        ("neighbors a chunk", f"{neighbors['num_neighbors']}"),
        *((f"recall@{k}", f"{recall[k]:.4f}" if k in recall else "not measured") for k in ("2", "10")),
        ("time a query", told("ms_per_query", ",.2f", " ms")),
        ("bytes a vector", told("bytes_per_vector", ",.0f")),
    ]
    return rows + ([("lists searched", f"{measured['nprobe']:,}")] if measured.get("nprobe") else [])


def _cost(work: WorkDir) -> Rows:
    spent = costs.read(work)
    seconds, memory = spent.get("seconds", {}), spent.get("peak_memory_mb", {})
    tasks = [task for task in (*TASKS, *CHANGES) if task in seconds]
    rows = [(task, duration(seconds[task]) + (f", {memory[task]:,} MB" if task in memory else "")) for task in tasks]
    rows.append(("in all", duration(sum(seconds[task] for task in tasks))))
    training = [("of it, training the tokenizer", duration(seconds["tokenizer"]))] if "tokenizer" in seconds else []
    return rows + training


def _summary(work: WorkDir) -> dict[str, Any]:
    """`report/summary.json`; empty where it was not written."""
    file = work.path / "report" / "summary.json"
    if not file.exists():
        return {}
    try:
        return dict(parse_json(read_text(str(file), file)))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is no summary ({error}); remove it") from None


def histograms(sample: Sample, chunk_length: int) -> list[dict[str, Any]]:
    """Of the nearest neighbor: its distance, and the longest run shared with it.

    Each has a `title`, a `note`, `counts` of chunks in equal intervals, what to call these `ranges`, and three `ticks`.
    """
    found = sample.ids[:, 0] >= 0
    return [_distances(sample.distances[found, 0]), _runs(sample.run[found], chunk_length)]


def _distances(nearest: np.ndarray) -> dict[str, Any]:
    low, high = (min(0.0, float(nearest.min())), max(0.0, float(nearest.max()))) if len(nearest) else (0.0, 1.0)
    counts, edges = np.histogram(nearest, bins=_BARS, range=(low, high))
    note = "median {:.3f}; one in ten above {:.3f}".format(*np.quantile(nearest, (0.5, 0.9))) if len(nearest) else ""
    return {
        "title": "Distance of the nearest neighbor",
        "note": note,
        "counts": counts.tolist(),
        "ranges": [f"{begin:.3f} – {end:.3f}" for begin, end in itertools.pairwise(edges)],
        "ticks": [f"{edge:.2f}" for edge in (low, (low + high) / 2, high)],
    }


def _runs(run: np.ndarray, chunk_length: int) -> dict[str, Any]:
    width = -(-(chunk_length + 1) // _BARS)
    bounds = range(0, chunk_length + 1 + width, width)
    counts, _ = np.histogram(run, bins=np.array(bounds))
    half = (run >= chunk_length / 2).mean() if len(run) else 0.0
    note = f"median {np.median(run):.0f} tokens; {half:.1%} share half a chunk or more" if len(run) else ""
    return {
        "title": "Longest run shared with that neighbor",
        "note": note,
        "counts": counts.tolist(),
        "ranges": [f"{begin} – {end - 1} tokens" for begin, end in itertools.pairwise(bounds)],
        "ticks": ["0", f"{chunk_length // 2}", f"{chunk_length} tokens"],
    }


def source_mix(sample: Sample, table: ChunkTable, database: np.ndarray) -> dict[str, Any]:
    """Which corpora the neighbors of each corpus' chunks come from.

    Args:
        sample: chunks with neighbors.
        table: all chunks.
        database: [num_corpora] int64, chunks of each corpus in the database.

    Returns:
        `corpora`: names; `shares`: a row a corpus of chunks, a column a corpus of neighbors, each row's sum 1 (or 0);
        `database`: the database's share of each.
    """
    mix = sample.mix(table)
    return {
        "corpora": [corpus.name for corpus in table.corpora],
        "shares": np.round(mix / np.maximum(1, mix.sum(1, keepdims=True)), 4).tolist(),
        "database": np.round(database / max(1, database.sum()), 4).tolist(),
    }
