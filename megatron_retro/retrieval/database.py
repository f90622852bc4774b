"""The database: the chunks that may be neighbors, those of the train split's documents in corpora not excluded."""

import numpy as np

from megatron_retro.data.chunks import ChunkTable, Stream
from megatron_retro.errors import UserError


class Database:
    """Chunks of some documents, known in O(documents) memory.

    Args:
        table: all chunks.
        documents: ascending ids of the documents whose chunks may be neighbors.

    Attributes:
        is_member: [num_documents] bool, whether a document is one of them.
        stream: its chunks, laid end to end.
    """

    def __init__(self, table: ChunkTable, documents: np.ndarray):
        self._table, self.stream = table, Stream(table, documents)
        self.is_member = np.zeros(table.num_documents, bool)
        self.is_member[documents] = True

    @classmethod
    def open(cls, table: ChunkTable, split: tuple[float, ...]) -> "Database":
        """The database of a work dir with these shares of train, valid and test.

        Raises:
            UserError: there is no document in the train split.
        """
        database = cls(table, table.database_documents(split))
        if not len(database):
            removed = f" ({table.removed.sum()} are removed)" if table.removed.any() else ""
            raise UserError(
                f"--split {','.join(map(str, split))} leaves no document of {table.num_documents} for train{removed}"
                + (
                    " in a corpus that --retro-exclude-corpora spares"
                    if not all(c.retrieved for c in table.corpora)
                    else ""
                )
            )
        return database

    def __len__(self) -> int:
        return len(self.stream)

    def chunks(self, begin: int, end: int) -> np.ndarray:
        """Ids of the begin-th to the (end - 1)-th chunk of the database, ascending int64."""
        return self.stream.chunks(np.arange(begin, min(end, len(self))))

    def chunks_within(self, first: int, end: int) -> np.ndarray:
        """Ids from `first` on and below `end` that are in the database, ascending int64."""
        chunks = np.arange(first, end)
        return chunks[self.holds(chunks)]

    def holds(self, chunks: np.ndarray) -> np.ndarray:
        """Whether each chunk id is in the database (same shape, bool)."""
        return self.is_member[self._table.document(chunks)]

    def num_foreign(self, own: np.ndarray) -> np.ndarray:
        """How many chunks of the database lie outside of each document, [n] int64.

        Args:
            own: [n, 2] int64, a document's first chunk id and the next one's; two equal ids stand for no document.
        """
        begin, end = own.T
        inside = self.is_member[self._table.document(np.minimum(begin, self._table.num_chunks - 1))]
        return len(self) - np.where(inside, end - begin, 0)

    def sample(self, count: int, seed: int) -> np.ndarray:
        """A random sample of distinct ids, one from each of `count` equal stretches, ascending int64."""
        count = min(count, len(self))
        bounds = len(self) * np.arange(count + 1) // count
        return self.stream.chunks(np.random.default_rng(seed).integers(bounds[:-1], bounds[1:]))
