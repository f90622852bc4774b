"""A database that learns and forgets while it is searched: changes are held in memory, the work dir stays as it is.

Documents that are added form one more corpus behind those of the work dir, so chunk ids never change and never stand
for another chunk later, not even when their document is removed.
"""

import dataclasses
import threading
from typing import Any

import numpy as np

from megatron_retro.data.chunks import ChunkTable, Corpus, Stream
from megatron_retro.data.tokenize import token_dtype
from megatron_retro.errors import UserError
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.exact import ExactSearch
from megatron_retro.retrieval.journal import Journal
from megatron_retro.retrieval.live import LiveRetriever

NAME = "live"  # of the corpus of added documents, without a journal


class NoSuchDocument(UserError):
    """The database has no such document."""


@dataclasses.dataclass(frozen=True)
class _State:
    """One state of the database, whole: a search takes one, a change makes the next.

    Attributes:
        base: the work dir's documents without the removed ones.
        table: all chunks, those of removed documents too.
        stream: the chunks in the database.
        added: searches the added documents; None where there are none.
        removed: ids of documents.
    """

    base: LiveRetriever
    table: ChunkTable
    stream: Stream
    added: ExactSearch | None
    removed: frozenset[int]


class _Rows:
    """Embeddings [n, E] float16 of the chunks from `first` on, with `EmbeddingTable`'s method."""

    def __init__(self, rows: np.ndarray, first: int):
        self._rows, self._first = rows, first

    def rows(self, chunks: np.ndarray) -> np.ndarray:
        return self._rows[np.maximum(chunks - self._first, 0)]  # chunk 0 stands for none in a ranking


class LiveDatabase:
    """A work dir's database with documents added and removed; any thread may call any method.

    A search sees all of a change or nothing of it.

    Args:
        retriever: of the work dir.
        journal: every change is in it before it is made, and what it holds already is made at once; None keeps none.

    Attributes:
        tokenizer: of the corpora.
        name: of the corpus that added documents form.

    Raises:
        UserError: the journal does not fit the work dir.
    """

    def __init__(self, retriever: LiveRetriever, journal: Journal | None = None):
        self._retriever, self._journal, self.tokenizer = retriever, journal, retriever.tokenizer
        self._changing = threading.Lock()
        self._documents: list[np.ndarray] = []  # tokens of each added one
        self._rows = [np.zeros((0, 0), np.float16)]  # embeddings of each one's chunks
        taken = [corpus.name for corpus in retriever.table.corpora]
        self.name = journal.name if journal else next(name for name in _names() if name not in taken)
        if self.name in taken:
            raise UserError(
                f"--journal {self.name}.jsonl: the work dir has a corpus {self.name!r} already; if that holds the "
                "journal's documents, begin a new journal under another name"
            )
        self._state = _State(retriever, retriever.table, retriever.stream, None, frozenset())
        if journal:
            self._replay(journal.changes)

    # -------------------------------------------------------------------------------------------- searching

    @property
    def table(self) -> ChunkTable:
        """All chunks; it only grows, so ids that any search found are in it."""
        return self._state.table

    @property
    def stream(self) -> Stream:
        """The chunks in the database."""
        return self._state.stream

    def search(self, texts: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best chunks for texts, as `LiveRetriever.search` returns them."""
        state = self._state
        if state.added is None:
            return state.base.search(texts, k)
        queries = state.base.embed(texts)
        found = state.base.nearest(queries, k), state.added.search(queries, np.zeros((len(texts), 2), np.int64), k)
        ids, distances = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        order = np.lexsort((ids, distances), axis=1)[:, :k]
        return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)

    # -------------------------------------------------------------------------------------------- changes

    @property
    def added(self) -> list[str]:
        """Ids of the added documents that were not removed, oldest first."""
        first, removed = self._retriever.table.num_documents, self._state.removed
        kept = [number for number in range(len(self._documents)) if first + number not in removed]
        return [f"{self.name}:{number}" for number in kept]

    @property
    def removed(self) -> list[str]:
        """Ids of the work dir's documents that were removed."""
        from megatron_retro.retrieval.described import document_names

        table = self._retriever.table
        return document_names(table, np.array(sorted(d for d in self._state.removed if d < table.num_documents), int))

    @property
    def counts(self) -> tuple[int, int]:
        """How many added documents there are, and how many of the work dir's were removed."""
        own = sum(document < self._retriever.table.num_documents for document in self._state.removed)
        return len(self._documents) - (len(self._state.removed) - own), own

    def check_can_add(self) -> None:
        """Check that documents can be added.

        Raises:
            UserError: they cannot, as neighbors are found by words.
        """
        if self._retriever.kind != "dense":
            raise UserError(
                f"this work dir finds neighbors by words (--retro-retriever {self._retriever.kind}), whose weights "
                "depend on all documents; add them with tools/preprocess_retro_data.py --retro-tasks add-documents"
            )

    def add(self, texts: list[str]) -> list[str]:
        """Add documents; returns their ids `<corpus>:<number>`.

        Raises:
            UserError: the work dir finds neighbors by words, or a text is empty.
            OSError: the journal cannot be written.
        """
        self.check_can_add()
        documents = self._embedded(texts)
        with self._changing:
            first = len(self._documents)
            names = [f"{self.name}:{first + number}" for number in range(len(texts))]
            self._note([{"change": "add", "document": n, "text": t} for n, t in zip(names, texts, strict=True)])
            self._extend(documents)
            self._renew(self._state.removed)
        return names

    def remove(self, names: list[str]) -> None:
        """Remove documents by their ids, all of them or none.

        Raises:
            NoSuchDocument: the database has not got one of them.
            OSError: the journal cannot be written.
        """
        with self._changing:
            documents = frozenset(map(self._find, names))
            self._note([{"change": "remove", "document": name} for name in names])
            self._renew(self._state.removed | documents)

    def _embedded(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, embeddings of their chunks) of each text."""
        if not all(texts):
            raise UserError("a document is empty; give it a text")
        length, dtype = self.table.chunk_length, token_dtype(self.tokenizer.vocab_size)
        rows = [[*row, self.tokenizer.eod] for row in self.tokenizer.encode(texts)]
        chunks = [[row[begin : begin + length] for begin in range(0, len(row), length)] for row in rows]
        embeddings = self._retriever.embed(self.tokenizer.decode([chunk for some in chunks for chunk in some]))
        parts = np.split(embeddings, np.cumsum([len(some) for some in chunks])[:-1])
        return [(np.array(row, dtype), part) for row, part in zip(rows, parts, strict=True)]

    def _find(self, name: str) -> int:
        """The id of a document in the database."""
        table, (corpus, _, number) = self.table, name.rpartition(":")
        place = next((place for place, each in enumerate(table.corpora) if each.name == corpus), None)
        if place is not None and number.isascii() and number.isdecimal() and len(number) < 19:
            begin, end = table.corpus_documents[place : place + 2]
            document = int(begin) + int(number)
            is_own = document < self._retriever.table.num_documents
            known = document < end and (not is_own or self._retriever.database.is_member[document])
            if known and document not in self._state.removed:
                return document
        raise NoSuchDocument("the database has no such document: it was removed, held out of training, or never there")

    def _note(self, changes: list[dict[str, str]]) -> None:
        if self._journal:
            self._journal.append(changes)

    def _extend(self, documents: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self._documents += [tokens for tokens, _ in documents]
        self._rows += [rows for _, rows in documents]

    def _renew(self, removed: frozenset[int]) -> None:
        """The state with all documents in memory and these removed."""
        base, own = self._retriever.table, self._retriever.table.num_documents
        gone = np.array(sorted(removed), np.int64)
        searched = self._state.base
        if any(document < own for document in removed ^ self._state.removed):
            searched = self._retriever.without(gone[gone < own])
        table = base
        if self._documents:
            lengths = np.array([len(tokens) for tokens in self._documents])
            live = Corpus(self.name, np.concatenate(self._documents), np.cumsum(lengths) - lengths, lengths, 0.0)
            every_gone = np.union1d(np.flatnonzero(base.removed), gone)
            table = ChunkTable([*base.corpora, live], base.chunk_length, every_gone, base.vocab_size)
        kept = np.setdiff1d(np.arange(own, table.num_documents), gone)
        added: Any = None
        if len(kept):
            rows: Any = _Rows(np.concatenate(self._rows[1:]), base.num_chunks)
            added = ExactSearch(rows, Database(table, kept))
        members = np.append(np.flatnonzero(searched.database.is_member), kept)
        self._state = _State(searched, table, Stream(table, members), added, removed)

    def _replay(self, changes: list[dict[str, Any]]) -> None:
        added = [change for change in changes if change["change"] == "add"]
        if added:
            self.check_can_add()
            self._extend(self._embedded([change["text"] for change in added]))
            self._renew(frozenset())
        for number, change in enumerate(added):
            if change["document"] != f"{self.name}:{number}":
                raise UserError(
                    f"--journal {self.name}.jsonl: document {number} is called {change['document']!r}; a journal keeps "
                    "the name it was begun with"
                )
        gone = {change["document"] for change in changes if change["change"] == "remove"}
        self._renew(frozenset(self._find(name) for name in gone if self._holds(name)))

    def _holds(self, name: str) -> bool:
        try:
            self._find(name)
        except NoSuchDocument:  # removed from the work dir meanwhile
            return False
        return True


def _names() -> Any:
    yield NAME
    number = 2
    while True:
        yield f"{NAME}{number}"
        number += 1
