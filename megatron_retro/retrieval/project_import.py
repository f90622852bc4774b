"""What of a Megatron project holds in a work dir: its database's chunks, its index, its neighbors.

A chunk of the project is one of ours where both have the same tokens, but for the end-of-document token that Megatron
leaves away. Neighbors hold for the windows that are chunks of ours; the others (queried across documents, or shifted)
answer for other text, and their chunks are searched as all others are. Of those that hold, a neighbor of the query's
own document becomes none. A continuation that would run into another document needs no mask here: it ends with its own.
"""

import collections
import pathlib
from typing import Any

import numpy as np

from megatron_retro import distributed
from megatron_retro.data.chunks import SPLITS, ChunkTable, sequences
from megatron_retro.errors import UserError
from megatron_retro.reading import load_array
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.progress import Progress, say
from megatron_retro.retrieval.project import NeighborBlock, Project
from megatron_retro.retrieval.project_order import Order, Windows
from megatron_retro.retrieval.query import OpenIndex
from megatron_retro.retrieval.ranking import rank_candidates
from megatron_retro.retrieval.retriever import Retriever
from megatron_retro.storage import save_npy
from megatron_retro.workdir import WorkDir


class Places:
    """Where Megatron's sequences lie in a work dir's documents.

    Args:
        table: its chunks; the corpora are the project's, in its order.
        prefixes: of the corpora.
    """

    def __init__(self, table: ChunkTable, prefixes: list[str]):
        self._table = table
        found = [sequences(prefix) for prefix in prefixes]
        self.lengths = [lengths for _, lengths, _ in found]
        self.first = np.cumsum([0] + [len(lengths) for lengths in self.lengths])
        self._length = np.concatenate(self.lengths)
        documents = [np.searchsorted(first, np.arange(len(lengths)), side="right") - 1 for _, lengths, first in found]
        self._document = np.concatenate(
            [of_corpus + begin for of_corpus, begin in zip(documents, table.corpus_documents[:-1], strict=True)]
        )
        starts = np.concatenate([corpus.start for corpus in table.corpora])
        self._offset = np.concatenate([begin for begin, _, _ in found]) - starts[self._document]

    @classmethod
    def open(cls, work: WorkDir, table: ChunkTable) -> "Places":
        return cls(table, [str(work.path / entry["prefix"]) for entry in work.facts("corpus")["corpora"]])

    def document(self, corpus: np.ndarray, sequence: np.ndarray) -> np.ndarray:
        """The document of sequences [n]: [n] int64."""
        return self._document[self.first[corpus] + sequence]

    def length(self, corpus: np.ndarray, sequence: np.ndarray) -> np.ndarray:
        """The tokens of sequences [n]: [n] int64."""
        return self._length[self.first[corpus] + sequence]

    def chunk(self, corpus: np.ndarray, sequence: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The chunk that holds the tokens `begin` … `end`-1 of a sequence, and no other; -1 for none. All [n] int64.

        The last token of a sequence may be missing in it.
        """
        length, document = self.length(corpus, sequence), self.document(corpus, sequence)
        offset = self._offset[self.first[corpus] + sequence] + begin
        chunk = self._table.first_chunk[document] + offset // self._table.chunk_length
        known = np.minimum(chunk, self._table.num_chunks - 1)
        held = self._table.lengths(known)
        is_all = (end - begin == held) | ((end == length - 1) & (end - begin + 1 == held))
        return np.where((offset % self._table.chunk_length == 0) & is_all & (end > begin), chunk, -1)


class DatabaseRows:
    """A project's database, row by row.

    Attributes:
        chunk: [n] int64, the chunk that each row is, -1 for none.
        document: [n] int64, the document that it stands in.
        is_full: [n] bool, whether it has C tokens.

    Raises:
        UserError: a row lies outside of the corpora.
    """

    def __init__(self, project: Project, places: Places, chunk_length: int):
        self._project, self._places = project, places
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for rows in project.chunks():
            corpus, sequence, begin, end = rows.T
            self._check(rows, sum(len(part[0]) for part in parts))
            chunk = places.chunk(corpus, sequence, begin, end)
            parts.append((chunk, places.document(corpus, sequence), end - begin == chunk_length))
        self.chunk, self.document, self.is_full = map(np.concatenate, zip(*parts, strict=True))

    @classmethod
    def open(cls, work: WorkDir, table: ChunkTable) -> "DatabaseRows":
        project = Project(pathlib.Path(work.settings["retro_project_dir"]))
        return cls(project, Places.open(work, table), table.chunk_length)

    def __len__(self) -> int:
        return len(self.chunk)

    def _check(self, rows: np.ndarray, first: int) -> None:
        corpus, sequence, begin, end = rows.T
        places = self._places
        inside = corpus < len(places.lengths)
        inside &= sequence < np.diff(places.first)[np.where(inside, corpus, 0)]
        known = np.where(inside, corpus, 0), np.where(inside, sequence, 0)
        inside &= (begin < end) & (end <= places.length(*known))
        if not inside.all():
            row = int(np.flatnonzero(~inside)[0])
            raise UserError(
                f"--retro-project-dir {self._project.path}: db/merged/train.hdf5 row {first + row} is corpus "
                f"{corpus[row]} sequence {sequence[row]} tokens {begin[row]} to {end[row]}, which the corpora do not "
                "have; give --data-path the corpora that it was made from"
            )


def describe_database(work: WorkDir, table: ChunkTable) -> dict[str, Any]:
    """How many of the project's chunks are chunks of a work dir that is being built."""
    rows, path = DatabaseRows.open(work, table), work.settings["retro_project_dir"]
    held = int((rows.chunk >= 0).sum())
    say(f"db-build: {held:,} of the {len(rows):,} chunks of {path} are chunks here")
    return {"path": path, "chunks": len(rows), "held": held}


# ------------------------------------------------------------------------------------------------ neighbors


class ProjectNeighbors:
    """Neighbors of a project, for the chunks for which they hold; all others are searched."""

    def __init__(self, work: WorkDir):
        self._work, self._path = work, work.directory("neighbors") / "project.npy"

    def files(self) -> list[pathlib.Path]:
        return [self._path]

    def facts(self) -> dict[str, Any]:
        return {"project": self._work.settings["project_neighbors"]}

    def prepare(self, index: OpenIndex, k: int) -> None:
        """Read the project's neighbors; every rank calls it."""
        unfinished = distributed.together(lambda: self._work.unfinished("neighbors"))
        if not distributed.together(lambda: unfinished.has(self._path)):
            self._work.on_rank_0(lambda: self._read(index))
        rows = distributed.together(lambda: load_array(self._path, np.int64, (None, None)))
        self._chunks, self._ids = np.array(rows[:, 0]), rows[:, 1:]

    def update(
        self, index: OpenIndex, retriever: Retriever, chunks: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and distances [n, k] of chunks [n]."""
        ids, distances = np.full((len(chunks), k), -1, np.int64), np.full((len(chunks), k), np.inf, np.float32)
        at = np.searchsorted(self._chunks, chunks)
        holds = np.isin(chunks, self._chunks)
        if holds.any():
            queries = index.embeddings.rows(chunks[holds])
            ids[holds], distances[holds] = rank_candidates(queries, self._ids[at[holds]], index.embeddings, k)
        foreign = index.database.num_foreign(index.table.document_chunks(chunks))
        short = (ids >= 0).sum(1) < np.minimum(k, foreign)
        if short.any():
            ids[short], distances[short] = retriever.neighbors(chunks[short], k)
        return ids, distances

    def _read(self, index: OpenIndex) -> None:
        project = Project(pathlib.Path(self._work.settings["retro_project_dir"]))
        reader = Reader(project, Places.open(self._work, index.table), index.table, index.database)
        rows, counts = reader.read()
        self._work.settings["project_neighbors"] = counts
        self._work.write()
        save_npy(self._path, rows)
        self._work.unfinished("neighbors").note(self._path)


def described(counts: dict[str, int]) -> list[str]:
    """What was found in a project's neighbors, for people."""
    windows = max(1, counts["windows"])
    return [
        f"project windows      {counts['windows']:,}, of which {counts['held']:,} ({counts['held'] / windows:.1%}) are "
        f"chunks here and keep their neighbors; {counts['across_documents']:,} lie across documents, "
        f"{counts['shifted']:,} elsewhere in one",
        f"project neighbors    {counts['neighbors']:,}; masked: {counts['none']:,} that were none (and read as the "
        f"last chunk), {counts['own_document']:,} of the own document, {counts['twice']:,} twice, "
        f"{counts['no_chunk_here']:,} that are no chunk of the database here",
        f"project continuation {counts['continuation_elsewhere']:,} would have run into another document, "
        f"{counts['continuation_own_document']:,} of these into the own one; they end with their document here",
    ]


_COUNTED = [
    *("windows", "held", "across_documents", "shifted"),
    *("neighbors", "none", "own_document", "twice", "no_chunk_here"),
    *("continuation_elsewhere", "continuation_own_document"),
]


class Reader:
    """Reads all neighbors of a project, counting what is wrong with them."""

    def __init__(self, project: Project, places: Places, table: ChunkTable, database: Database):
        self._project, self._places, self._table, self._database = project, places, table, database
        self._rows = DatabaseRows(project, places, table.chunk_length)
        self.counts: collections.Counter[str] = collections.Counter()

    def read(self) -> tuple[np.ndarray, dict[str, int]]:
        """([m, 1 + K] int64: a chunk and its neighbors, -1 for none, ascending by chunk; what was counted)."""
        held = [np.empty((0, 1), np.int64)]
        orders = {split: self._project.blocks(split) for split in SPLITS}
        total = sum(blocks[-1].end for blocks in orders.values() if blocks)
        with Progress("project neighbors", total, "windows") as progress:
            for split, blocks in orders.items():
                order = self._order(split) if blocks else None
                for block in blocks:
                    assert order
                    held.append(self._read_block(block, order.windows(block.begin, block.end)))
                    progress.advance(block.end - block.begin)
        width = max(rows.shape[1] for rows in held)
        rows = np.concatenate([np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=-1) for rows in held])
        _, first = np.unique(rows[:, 0], return_index=True)  # a later epoch asked again
        return rows[first], {name: self.counts[name] for name in _COUNTED} | {"chunks": len(first)}

    def _order(self, split: str) -> Order:
        project = self._project
        return Order(
            self._places.lengths,
            [weight for weight, _ in project.blend],
            project.split,
            split,
            samples=project.samples[split],
            seq_length=project.seq_length,
            chunk_length=project.chunk_length,
            seed=project.seed,
        )

    def _read_block(self, block: NeighborBlock, windows: Windows) -> np.ndarray:
        """[m, 1 + K] of the windows that are chunks; everything in the block is counted."""
        rows, counts = self._project.neighbors(block), self.counts
        if len(wrong := np.argwhere((rows < -1) | (rows >= len(self._rows)))):
            row, place = wrong[0]
            raise UserError(
                f"--retro-project-dir: {block.path} row {row} holds the neighbor {rows[row, place]}, the database has "
                f"{len(self._rows)} chunks; restore the file, or the db/ it was made with"
            )
        own = self._places.document(windows.corpus, windows.sequence)[:, None]
        last = self._places.document(windows.corpus, windows.last_sequence)[:, None]
        found, known = rows >= 0, np.maximum(rows, 0)
        document = self._rows.document[known]
        is_own = found & ((document == own) | (document == last))
        into = self._rows.document[(known + 1) % len(self._rows)]  # behind the last row Megatron reads the first
        elsewhere = found & (into != document)
        ids = np.where(found & ~is_own, self._rows.chunk[known], -1)
        ids[(ids >= 0) & ~self._database.holds(np.maximum(ids, 0))] = -1
        no_chunk = found & ~is_own & (ids < 0)
        twice = _repeated(ids)
        ids[twice] = -1
        across = windows.across
        chunk = self._places.chunk(
            windows.corpus, windows.sequence, windows.offset, windows.offset + self._table.chunk_length
        )
        holds = ~across & (chunk >= 0)
        counts.update(windows=len(rows), held=int(holds.sum()), across_documents=int(across.sum()))
        counts.update(shifted=int((~across & ~holds).sum()), neighbors=rows.size, none=int((~found).sum()))
        counts.update(own_document=int(is_own.sum()), twice=int(twice.sum()), no_chunk_here=int(no_chunk.sum()))
        counts.update(
            continuation_elsewhere=int(elsewhere.sum()),
            continuation_own_document=int((elsewhere & ((into == own) | (into == last))).sum()),
        )
        return np.concatenate([chunk[holds, None], ids[holds]], axis=1)


def _repeated(ids: np.ndarray) -> np.ndarray:
    """Whether an id stands further left in its row already (same shape, bool); -1 never does."""
    order = np.argsort(ids, axis=1, kind="stable")
    ascending = np.take_along_axis(ids, order, 1)
    again = np.zeros(ids.shape, bool)
    again[:, 1:] = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
    repeated = np.zeros(ids.shape, bool)
    np.put_along_axis(repeated, order, again, 1)
    return repeated
