"""The task `query-neighbors`: every chunk's neighbors, from scratch or by bringing saved ones up to date."""

import dataclasses
import pathlib
import time
from typing import Any, Protocol

import numpy as np

from megatron_retro import distributed
from megatron_retro.config.preprocessing import PreprocessConfig, settle
from megatron_retro.data.chunks import ChunkTable
from megatron_retro.retrieval import costs
from megatron_retro.retrieval.blocks import Advance, make_blocks, neighbors_block_size, plan
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import EmbeddingTable
from megatron_retro.retrieval.index import Shards
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.retrieval.progress import say
from megatron_retro.retrieval.ranking import Search, check_neighbors
from megatron_retro.retrieval.retriever import DenseRetriever, Retriever
from megatron_retro.retrieval.stages import open_database, shard_path
from megatron_retro.storage import save_npy, set_aside
from megatron_retro.workdir import WorkDir

ENDINGS = (".distances.npy", ".ids.npy")


@dataclasses.dataclass
class OpenIndex:
    """What searching a work dir takes."""

    work: WorkDir
    table: ChunkTable
    embeddings: EmbeddingTable
    database: Database

    @classmethod
    def open(cls, work: WorkDir) -> "OpenIndex":
        return cls(work, *open_database(work))

    def shards(self, first: int = 0, *, keep_open: bool = False) -> Shards:
        """The shards of the chunks from `first` on."""
        facts, width = self.work.facts("index"), self.work.facts("embeddings")["width"]
        paths = [shard_path(self.work, *shard) for shard in facts["shards"] if shard[0] >= first]
        ef_search = self.work.settings.get("tuned", {}).get("ef_search")
        return Shards(paths, width, {"efSearch": ef_search} if ef_search else None, keep_open=keep_open)

    def search(self, database: Database, first: int = 0, *, complete: bool = True) -> Search:
        """The offline search that fits the index, over a database in the shards of the chunks from `first` on.

        `complete` is False where a query need not find as many neighbors as there are.
        """
        from megatron_retro import mcore
        from megatron_retro.retrieval.exact import ExactSearch
        from megatron_retro.retrieval.index import inverted_lists
        from megatron_retro.retrieval.index_search import IndexSearch
        from megatron_retro.retrieval.join import ListJoin

        if self.work.facts("index")["factory"] == "Flat":
            return ExactSearch(self.embeddings, database, mcore.device())
        shards, nprobe = self.shards(first), self.work.settings["tuned"].get("nprobe", 1)
        if inverted_lists(next(iter(shards))) is None:
            return IndexSearch(shards, self.embeddings, database, nprobe)
        return ListJoin(shards, self.embeddings, database, nprobe, mcore.device(), complete=complete)

    def retriever(self) -> Retriever:
        """The retriever that the work dir was made with."""
        kind = self.work.settings["retro_retriever"]
        dense = DenseRetriever(self.search(self.database), self.embeddings, self.table)
        return dense if kind == "dense" else lexical_retriever(kind, self, dense)


def lexical_retriever(kind: str, index: OpenIndex, dense: Retriever | None) -> Retriever:
    """A retriever by words; `dense` finds hybrid's candidates, None where they are given."""
    from megatron_retro.retrieval.corpora import open_tokenizer
    from megatron_retro.retrieval.lexical import Bm25Index, Bm25Retriever, HybridRetriever

    words = Bm25Index.open(bm25_directory(index.work))
    tokenizer = open_tokenizer(index.work)
    if kind == "bm25":
        return Bm25Retriever(words, index.table, tokenizer, index.database)
    return HybridRetriever(dense, words, index.table, tokenizer, index.database)


def bm25_directory(work: WorkDir) -> pathlib.Path:
    return work.directory("index") / f"bm25.{work.settings.get('generation', 0)}"


# ------------------------------------------------------------------------------------------------ the task


class Known(Protocol):
    """Neighbors that are there already, for some chunks."""

    def prepare(self, index: OpenIndex, k: int) -> None:
        """Read them; every rank calls it."""

    def update(
        self, index: OpenIndex, retriever: Retriever, chunks: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and distances [n, k] of chunks [n], complete."""

    def files(self) -> list[pathlib.Path]:
        """What of it belongs to the stage."""

    def facts(self) -> dict[str, Any]:
        """What to record of it."""


def query(work: WorkDir, config: PreprocessConfig, saved: Known | None = None) -> None:
    """Find the neighbors of every chunk; where `saved` ones hold, only what has changed is searched."""
    work.on_rank_0(lambda: _settle(work, config))
    index = distributed.together(lambda: OpenIndex.open(work))
    _tune(index)
    k, kind = work.settings["retro_query_num_neighbors_save"], work.settings["retro_retriever"]
    if kind != "dense":
        work.on_rank_0(lambda: _build_words(index))
        saved = None  # a word's weight changes with the database
    retriever = distributed.together(index.retriever)
    if saved:
        saved.prepare(index, k)
    blocks, seconds, queries = plan(work, work.settings["neighbors_block_size"]), 0.0, 0
    unfinished = distributed.together(lambda: work.unfinished("neighbors"))

    def make(numbers: list[int], advance: Advance) -> None:
        nonlocal seconds, queries
        for number in numbers:
            start = time.monotonic()
            ids, distances = _neighbors(index, retriever, saved, blocks[number].ids, k)
            for path, array in zip(files_of(number), (distances, ids), strict=True):
                save_npy(path, array)
            unfinished.note(*files_of(number))
            seconds, queries = seconds + time.monotonic() - start, queries + len(ids)
            advance(len(ids))

    def files_of(number: int) -> list[pathlib.Path]:
        return [blocks[number].path(work, "neighbors", ending) for ending in ENDINGS]

    sizes = [len(block) for block in blocks]
    make_blocks("query-neighbors", sizes, lambda number: unfinished.has(*files_of(number)), make)
    spent = distributed.all_gather((seconds, queries))
    files = [path for number in range(len(blocks)) for path in files_of(number)] + (saved.files() if saved else [])
    more = saved.facts() if saved else {}
    work.on_rank_0(lambda: _commit(work, files, k, more, *map(sum, zip(*spent, strict=True))))


def _settle(work: WorkDir, config: PreprocessConfig) -> None:
    work.facts("index")
    settle(config, work, "query-neighbors")
    settings = work.settings
    size = neighbors_block_size(settings.get("retro_block_size"), work.facts("embeddings")["block_size"])
    settings.setdefault("neighbors_block_size", size)
    work.write()


def _commit(work: WorkDir, files: list[Any], k: int, more_facts: dict[str, Any], seconds: float, queries: int) -> None:
    if queries:
        costs.note(work, "measured", ms_per_query=round(1000 * seconds / queries, 4))
    kind = work.settings["retro_retriever"]
    facts = {"num_neighbors": k, "retriever": kind, "nprobe": work.settings["tuned"].get("nprobe")}
    facts |= {"block_size": work.settings["neighbors_block_size"], **more_facts}
    words = bm25_directory(work)
    more = sorted(path for path in words.rglob("*") if path.is_file()) if kind != "dense" else []
    work.commit("neighbors", facts, files + more)


def _build_words(index: OpenIndex) -> None:
    from megatron_retro.retrieval.corpora import open_tokenizer
    from megatron_retro.retrieval.lexical import Bm25Index
    from megatron_retro.retrieval.progress import Progress

    directory, prints = bm25_directory(index.work), index.work.unfinished("neighbors").prints
    recorded = [path for path in map(index.work.path.joinpath, prints) if path.is_relative_to(directory)]
    if directory.exists() and not all(path.exists() for path in recorded):
        set_aside(directory)
    if not directory.exists():
        with Progress("words", len(index.database), "chunks") as progress:
            Bm25Index.build(directory, index.table, open_tokenizer(index.work), index.database, progress.advance)


def _neighbors(
    index: OpenIndex, retriever: Retriever, saved: Known | None, chunks: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and distances [n, k] of chunks [n], checked."""
    if saved:
        ids, distances = saved.update(index, retriever, chunks, k)
    else:
        ids, distances = retriever.neighbors(chunks, k)
    gone = index.table.removed[index.table.document(chunks)]
    ids[gone], distances[gone] = -1, np.inf
    complete = ~gone if index.work.settings["retro_retriever"] != "bm25" else np.zeros(len(chunks), bool)
    check_neighbors(ids, distances, index.table.document_chunks(chunks), index.database, complete)
    return ids, distances


def _tune(index: OpenIndex) -> None:
    """Settle how far to look into the index, once a work dir; every rank calls it."""
    from megatron_retro import mcore
    from megatron_retro.retrieval import tuning
    from megatron_retro.retrieval.index import inverted_lists

    work = index.work
    if "tuned" in work.settings:
        return
    factory, given = work.facts("index")["factory"], work.settings["retro_index_nprobe"]
    shards = distributed.together(index.shards)
    lists = None if factory == "Flat" else distributed.together(lambda: inverted_lists(next(iter(shards))))
    if given and lists is not None:
        work.on_rank_0(lambda: _settle_tuned(work, {"nprobe": min(given, lists.nlist)}))
        return
    if factory == "Flat" or (lists is None and "HNSW" not in factory):
        work.on_rank_0(lambda: _settle_tuned(work, {}))
        return
    target, embeddings = work.settings["retro_target_recall"], index.embeddings
    chunks, true_ids, true_distances = tuning.sample_truth(
        index.table, embeddings, index.database, k=tuning.K_TRAIN, seed=work.settings["seed"], device=mcore.device()
    )

    def settle_best() -> None:
        if lists is not None:
            best, found = tuning.tune_nprobe(next(iter(shards)), embeddings, chunks, true_ids, target)
        else:
            best, found = tuning.tune_ef_search(
                shards, index.table, embeddings, index.database, chunks, true_distances, target
            )
        name = "ef_search" if lists is None else "nprobe"
        say(f"query-neighbors: {name} {best} finds {found:.1%} of the two nearest neighbors in {len(chunks):,} chunks")
        if found < target:
            say(
                f"query-neighbors: --retro-target-recall {target} cannot be met with {factory}; "
                "an index with larger codes, or --retro-index-str Flat, which is exact, meets it"
            )
        _settle_tuned(work, {name: best, "recall": round(found, 4)})

    work.on_rank_0(settle_best)


def _settle_tuned(work: WorkDir, tuned: dict[str, Any]) -> None:
    work.settings["tuned"] = tuned
    work.write()


# ------------------------------------------------------------------------------------------------ saved neighbors


class Saved:
    """Neighbors of an earlier state of the work dir, brought up to date.

    A row stays, but for what documents that were added since bring nearer; a row that names a removed document is
    searched again.

    Args:
        before: the work dir in its earlier state, whose chunks are the first ones of the new state.
    """

    def __init__(self, before: WorkDir):
        self._neighbors = NeighborTable(before)
        self._num_chunks: int = before.facts("chunks")["chunks"]
        self._num_documents: int = before.facts("chunks")["documents"]
        self._added: Retriever | None = None

    def files(self) -> list[pathlib.Path]:
        return []

    def facts(self) -> dict[str, Any]:
        return {}

    def prepare(self, index: OpenIndex, k: int) -> None:
        """Open the search of what was added."""
        documents = np.flatnonzero(index.database.is_member)
        added = Database(index.table, documents[documents >= self._num_documents])
        if len(added):
            search = index.search(added, self._num_chunks, complete=False)
            self._added = DenseRetriever(search, index.embeddings, index.table)

    def update(
        self, index: OpenIndex, retriever: Retriever, chunks: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and distances [n, k] of chunks [n]."""
        old = chunks < self._num_chunks
        ids, distances = np.full((len(chunks), k), -1, np.int64), np.full((len(chunks), k), np.inf, np.float32)
        ids[old], distances[old] = self._neighbors.ids(chunks[old]), self._neighbors.distances(chunks[old])
        lost = ((ids >= 0) & ~index.database.holds(np.maximum(ids, 0))).any(1) | ~old
        if lost.any():
            ids[lost], distances[lost] = retriever.neighbors(chunks[lost], k)
        if self._added and not lost.all():
            more_ids, more_distances = self._added.neighbors(chunks[~lost], k)
            ids[~lost], distances[~lost] = _merged(ids[~lost], distances[~lost], more_ids, more_distances)
            foreign = index.database.num_foreign(index.table.document_chunks(chunks))
            short = (ids >= 0).sum(1) < np.minimum(k, foreign)
            if short.any():
                ids[short], distances[short] = retriever.neighbors(chunks[short], k)
        return ids, distances


def _merged(
    ids: np.ndarray, distances: np.ndarray, more_ids: np.ndarray, more_distances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of two lists of neighbors, [n, k] each, by distance, then id."""
    every_id, every = np.concatenate([ids, more_ids], 1), np.concatenate([distances, more_distances], 1)
    order = np.lexsort((np.where(every_id < 0, np.iinfo(np.int64).max, every_id), every), axis=1)[:, : ids.shape[1]]
    return np.take_along_axis(every_id, order, 1), np.take_along_axis(every, order, 1)
