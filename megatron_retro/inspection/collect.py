"""What the page shows, as plain values: figures of the whole, and some chunks with their neighbors."""

from typing import Any

import numpy as np

from megatron_retro.data.chunks import ChunkTable, corpus_of
from megatron_retro.inspection import figures
from megatron_retro.inspection.sample import Sample, shared_runs
from megatron_retro.inspection.texts import ChunkTexts
from megatron_retro.retrieval.corpora import open_tokenizer
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.workdir import WorkDir

_SAMPLED = 20_000
_HARD = 20  # chunks in each list


def collect(work: WorkDir, max_chunks: int, seed: int) -> dict[str, Any]:
    """Everything on the page.

    Args:
        work: a finished work dir.
        max_chunks: chunks on the page. Where there are more: half of them at random, then the nearest neighbors of
            these, so that there are links to follow. The chunks of the hard lists come on top.
        seed: of the samples.

    Returns:
        `figures`, `histograms` and `mix`, see `figures`; `sampled` and `num_chunks`, what the histograms, the mix and
        the hard lists stand on; `hard`, ids by list; `shown`, `neighbors` and `texts`, see `_chunks`.
    """
    table = ChunkTable.open(work)
    neighbors = NeighborTable(work, table)
    sample = Sample.draw(table, neighbors, max(_SAMPLED, max_chunks), seed)
    hard = sample.hard(_HARD)
    shown = np.unique(np.concatenate([_on_page(sample, max_chunks), *hard.values()]))
    return {
        "name": work.path.absolute().name,
        "chunk_length": table.chunk_length,
        "num_chunks": sample.num_chunks,
        "sampled": len(sample.chunks),
        "figures": figures.recorded(work),
        "histograms": figures.histograms(sample, table.chunk_length),
        "mix": figures.source_mix(sample, table, _database_chunks(work, table)),
        "hard": {name: chunks.tolist() for name, chunks in hard.items()},
        **_chunks(work, table, neighbors, shown),
    }


def _on_page(sample: Sample, max_chunks: int) -> np.ndarray:
    if sample.num_chunks <= max_chunks:
        return sample.chunks
    half = -(-max_chunks // 2)
    nearest = sample.ids[:half, 0]
    return np.concatenate([sample.chunks[:half], nearest[nearest >= 0][: max_chunks - half]])


def _database_chunks(work: WorkDir, table: ChunkTable) -> np.ndarray:
    """Chunks of each corpus in the database, [num_corpora] int64."""
    documents = np.flatnonzero(Database.open(table, tuple(work.facts("chunks")["split"])).is_member)
    sizes = table.first_chunk[documents + 1] - table.first_chunk[documents]
    corpora = corpus_of(table.corpus_documents, documents)
    return np.bincount(corpora, sizes, minlength=len(table.corpora)).astype(np.int64)


def _chunks(work: WorkDir, table: ChunkTable, neighbors: NeighborTable, shown: np.ndarray) -> dict[str, Any]:
    """Chunks with their neighbors.

    Args:
        work: a finished work dir.
        table: all chunks.
        neighbors: of all chunks.
        shown: [n] int64 ids of the chunks that the page shows, ascending.

    Returns:
        `shown`: their ids; `neighbors`: for each of them a list of [id, distance, tokens of the longest shared run,
        and where in the two texts it stands: begin and end in the chunk, begin and end in the neighbor]; `texts`: by
        id [corpus, document's number in it, chunk's number in the document, chunks of the document, text] of the shown
        chunks, their neighbors, what precedes the former and what follows the latter.
    """
    ids = neighbors.ids(shown)
    found = ids >= 0
    own, near = np.broadcast_to(shown[:, None], ids.shape)[found], ids[found]
    needed = np.concatenate([shown, _within_document(table, shown, -1), near, _within_document(table, near, 1)])
    chunks = np.unique(needed)
    texts = ChunkTexts(table, open_tokenizer(work), chunks)
    run, own_start, near_start = shared_runs(table, own, near)
    cuts = [
        texts.offsets(*pair)
        for pair in ((own, own_start), (own, own_start + run), (near, near_start), (near, near_start + run))
    ]
    distances = np.round(neighbors.distances(shown)[found].astype(np.float64), 4)
    columns = [column.tolist() for column in (near, distances, run, *cuts)]
    rows = iter(zip(*columns, strict=True))
    return {
        "shown": shown.tolist(),
        "neighbors": [[next(rows) for _ in range(count)] for count in found.sum(1).tolist()],
        "texts": dict(zip(chunks.tolist(), _placed(table, chunks, texts), strict=True)),
    }


def _within_document(table: ChunkTable, chunks: np.ndarray, step: int) -> np.ndarray:
    """The chunks that stand `step` after these in the same document, where there is one."""
    beside = chunks + step
    first, end = table.document_chunks(chunks).T
    return beside[(beside >= first) & (beside < end)]


def _placed(table: ChunkTable, chunks: np.ndarray, texts: ChunkTexts) -> list[tuple[int, int, int, int, str]]:
    documents, (first, end) = table.document(chunks), table.document_chunks(chunks).T
    corpora = corpus_of(table.corpus_documents, documents)
    columns = (corpora, documents - table.corpus_documents[corpora], chunks - first, end - first)
    places = zip(*(column.tolist() for column in columns), strict=True)
    return [(*place, texts.text[chunk]) for place, chunk in zip(places, chunks.tolist(), strict=True)]
