"""The index of a Megatron project, taken over where the work dir's embedder is the one it was made with.

The project does not tell its embedder, so its codes do: they must describe the work dir's embeddings about as well as
codes that are made of these. Its trained quantizers then stay, and the codes of its full chunks, under our chunk ids.
Its other codes do not hold: Megatron embedded a chunk of fewer than C tokens with end-of-document tokens behind it.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.errors import UserError
from megatron_retro.retrieval.blocks import Block
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import EmbeddingTable
from megatron_retro.retrieval.index import inverted_lists, read_index
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.project_import import DatabaseRows
from megatron_retro.workdir import WorkDir

_SAMPLE = 1000  # codes that are looked at
_WORSE = 1.1  # times the error of our own codes
_ROUNDING = 1e-3  # of an embedding's squared norm: number types differ


class ProjectIndex:
    """A filled index.

    Args:
        path: its file; the directory is named by the factory string.
        chunk_of_row: [n] int64, the chunk under which each row of the project's database goes on, -1 for none.

    Raises:
        UserError: it is no index, or of another database.
    """

    def __init__(self, path: pathlib.Path, chunk_of_row: np.ndarray):
        self.path, self.factory, self._chunk_of_row = path, path.parent.name, chunk_of_row
        self._index = read_index(path, None, mapped=True)
        self._lists = inverted_lists(self._index)
        ends = [] if self._lists is None else [end for _, ids, _ in self._entries() for end in (ids.min(), ids.max())]
        if wrong := [end for end in ends if not 0 <= end < len(chunk_of_row)]:
            raise UserError(
                f"--retro-project-dir: {path} holds the row {wrong[0]}, the database has {len(chunk_of_row)} chunks; "
                "restore it, or the db/ it was made with"
            )

    @classmethod
    def open(cls, work: WorkDir, table: ChunkTable) -> "ProjectIndex | None":
        """The index of the project that a work dir is made from, if it has one."""
        path = Project(pathlib.Path(work.settings["retro_project_dir"])).index(work.settings["retro_index_str"])
        if path is None:
            return None
        rows = DatabaseRows.open(work, table)
        return cls(path, np.where(rows.is_full, rows.chunk, -1))

    def why_not(self, embeddings: EmbeddingTable, width: int) -> str:
        """Why it cannot be taken over; "" where it can."""
        if self._index.d != width:
            return f"its vectors have width {self._index.d}, the embeddings {width}"
        if self._lists is None:
            return "it has no inverted lists"
        rows = np.flatnonzero(self._chunk_of_row >= 0)
        sample = rows[np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(np.int64)] if len(rows) else rows
        ids, codes = self._codes(sample)
        if not len(ids):
            return "it holds no chunk of the work dir"
        vectors = embeddings.rows(self._chunk_of_row[ids]).astype(np.float32)
        error = _squared(vectors - self._index.sa_decode(codes))
        least = _squared(vectors - self._index.sa_decode(self._index.sa_encode(vectors)))
        if error > _WORSE * least + _ROUNDING * _squared(vectors):
            return (
                f"it was made with another embedder: its codes lie {error:.3g} from the embeddings, codes of their own "
                f"{least:.3g}"
            )
        return ""

    def empty(self) -> Any:
        """The index as trained."""
        import faiss

        index = read_index(self.path, None, mapped=True)
        lists = inverted_lists(index)
        none = faiss.ArrayInvertedLists(lists.nlist, lists.code_size)
        lists.replace_invlists(none, True)  # it owns them from now on; those of a mapped file cannot be emptied
        none.this.disown()  # type: ignore[attr-defined]
        index.ntotal = lists.ntotal = 0
        return index

    def copy_to(self, index: Any, blocks: list[Block], database: Database) -> np.ndarray:
        """Copy the codes of the database's chunks in `blocks`; the ids [n] of those, ascending int64."""
        import faiss

        first, end = blocks[0].first, blocks[-1].first + len(blocks[-1])
        lists, copied = inverted_lists(index), [np.zeros(0, np.int64)]
        for number, rows, codes in self._entries():
            chunk = self._chunk_of_row[rows]
            here = (first <= chunk) & (chunk < end)
            here[here] = database.holds(chunk[here])
            ids, kept = np.ascontiguousarray(chunk[here]), np.ascontiguousarray(codes[here])
            if len(ids):
                lists.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(kept))
                copied.append(ids)
        ids = np.sort(np.concatenate(copied))
        lists.ntotal += len(ids)
        index.ntotal = lists.ntotal
        return ids

    def _entries(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(list, rows [n] int64, codes [n, bytes] uint8) of every list that is not empty."""
        import faiss

        lists = self._lists.invlists
        for number in range(lists.nlist):
            size = lists.list_size(number)
            if size:
                rows = faiss.rev_swig_ptr(lists.get_ids(number), size)
                yield (
                    number,
                    rows,
                    faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size).reshape(size, -1),
                )

    def _codes(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(those of some rows that are in the index [n], their codes as `sa_decode` takes them [n, bytes])."""
        num_bytes, rows, codes = self._lists.coarse_code_size(), [np.zeros(0, np.int64)], []
        for number, held, code in self._entries():
            here = np.isin(held, wanted)
            prefix = np.frombuffer(int(number).to_bytes(num_bytes, "little"), np.uint8)
            rows.append(held[here])
            codes.append(np.concatenate([np.tile(prefix, (int(here.sum()), 1)), code[here]], axis=1))
        return np.concatenate(rows), np.concatenate(codes) if codes else np.zeros((0, 0), np.uint8)


def _squared(vectors: np.ndarray) -> float:
    """Mean squared norm of [n, E]."""
    return float(np.square(vectors, dtype=np.float64).sum(1).mean())
