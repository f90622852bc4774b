"""What a finished work dir holds, in figures: `report/summary.json` and the lines printed at the end."""

import collections
import json
from typing import Any

import numpy as np

from megatron_retro import distributed, mcore
from megatron_retro.retrieval import costs
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.retrieval.progress import duration, say
from megatron_retro.retrieval.project_import import described
from megatron_retro.retrieval.query import OpenIndex
from megatron_retro.retrieval.ranking import recall
from megatron_retro.retrieval.tuning import sample_truth
from megatron_retro.storage import write_atomically
from megatron_retro.workdir import STAGES, WorkDir

_RECALL_AT = (2, 10)
_ROWS = 1 << 18


def summarize(work: WorkDir) -> None:
    """Measure a work dir, write `report/summary.json`, and print it; every rank calls it."""
    index = distributed.together(lambda: OpenIndex.open(work))
    recalls = _recall(index) if work.settings["retro_retriever"] == "dense" else {}
    work.on_rank_0(lambda: _write(index, recalls))


def _write(index: OpenIndex, recalls: dict[str, float]) -> None:
    work = index.work
    chunks = work.facts("chunks")
    skipped: collections.Counter = collections.Counter()
    for corpus in work.facts("corpus")["corpora"]:
        skipped.update(corpus["skipped"])
    costs.note(work, "measured", recall=recalls, bytes_per_vector=work.facts("index")["bytes_per_vector"])
    spent = costs.read(work)
    summary = {
        "documents": chunks["documents"],
        "removed_documents": chunks["removed_documents"],
        "skipped": dict(skipped),
        "vocab_size": work.facts("tokenizer")["vocab_size"],
        "tokens": chunks["tokens"],
        "chunks": chunks["chunks"],
        "padding_share": 1 - chunks["tokens"] / (chunks["chunks"] * chunks["chunk_length"]),
        "database_chunks": chunks["database_chunks"],
        "embedder": work.facts("embeddings"),
        "index": work.facts("index"),
        "retriever": work.settings["retro_retriever"],
        "tuned": work.settings["tuned"],
        **spent["measured"],
        "share_with_fewer_neighbors": _share_with_fewer(NeighborTable(work, index.table), chunks["chunks"]),
        "project": {stage: facts["project"] for stage in STAGES if "project" in (facts := work.facts(stage))},
        "seconds": spent.get("seconds", {}),
    }
    text = json.dumps(summary, indent=1)
    write_atomically(work.path / "report" / "summary.json", lambda file: file.write(text.encode()))
    for line in lines(summary):
        say(line)


def lines(summary: dict[str, Any]) -> list[str]:
    """The summary for people."""
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in summary["skipped"].items()) or "none"
    removed = f", removed: {summary['removed_documents']:,}" if summary["removed_documents"] else ""
    recalls = ", ".join(f"@{k} {value:.4f}" for k, value in summary["recall"].items()) or "not measured"
    tuned = ", ".join(f"{name} {value}" for name, value in summary["tuned"].items() if name != "recall")
    cost = f", {summary['ms_per_query']:.2g} ms a query and rank" if "ms_per_query" in summary else ""
    return [
        f"documents            {summary['documents']:,} (skipped: {skipped}{removed})",
        f"tokens               {summary['tokens']:,} of a vocabulary of {summary['vocab_size']:,}",
        f"chunks               {summary['chunks']:,} ({summary['padding_share']:.1%} padding)",
        f"database chunks      {summary['database_chunks']:,}",
        f"index                {summary['index']['factory']}, {summary['bytes_per_vector']:,.0f} bytes a chunk",
        f"neighbors            {summary['retriever']}{', ' * bool(tuned)}{tuned}{cost}",
        f"recall vs exact      {recalls}",
        f"fewer neighbors      {summary['share_with_fewer_neighbors']:.2%} of chunks",
        *(described(summary["project"]["neighbors"]) if "neighbors" in summary["project"] else []),
        *(f"time {task:<15} {duration(seconds)}" for task, seconds in summary["seconds"].items()),
    ]


def _recall(index: OpenIndex) -> dict[str, float]:
    """Recall@K against exact search, for a random sample of all chunks that no setting was tuned on."""
    neighbors = NeighborTable(index.work, index.table)
    ks = sorted({min(k, neighbors.num_neighbors) for k in _RECALL_AT})
    seed = index.work.settings["seed"] + 1
    chunks, _, truth = sample_truth(
        index.table, index.embeddings, index.database, k=ks[-1], seed=seed, device=mcore.device()
    )
    kept = ~index.table.removed[index.table.document(chunks)]
    found, truth = neighbors.distances(chunks)[kept], truth[kept]
    return {str(k): round(recall(found[:, :k], truth[:, :k]), 4) for k in ks}


def _share_with_fewer(neighbors: NeighborTable, num_chunks: int) -> float:
    fewer = 0
    for begin in range(0, num_chunks, _ROWS):
        ids = neighbors.ids(np.arange(begin, min(begin + _ROWS, num_chunks)))
        fewer += int((ids[:, -1] < 0).sum())
    return fewer / num_chunks
