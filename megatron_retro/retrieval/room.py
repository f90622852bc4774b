"""How much disk preprocessing will take, told before it is taken.

Exact once documents are tokenized; before that, tokens are estimated from a sample. What is there already is not
counted again.
"""

import collections
import contextlib
import functools
import itertools
import os
import pathlib
import re
import shutil
from typing import Any

import numpy as np

from megatron_retro.config.preprocessing import DEFAULTS, PreprocessConfig, split_weights
from megatron_retro.data.estimate import Counts, estimate
from megatron_retro.errors import UserError
from megatron_retro.retrieval.blocks import Block, auto_block_size, neighbors_block_size
from megatron_retro.retrieval.progress import say
from megatron_retro.workdir import WorkDir

_NPY_HEADER, _INDEX_HEADER = 128, 42  # bytes
_RECORDS_A_PART = 1000
_ID_BYTES = 8
_WORDS_BYTES = 220  # of a chunk in a BM25 index


def check(
    work: WorkDir,
    config: PreprocessConfig,
    todo: list[str],
    width: int | None,
    known: dict[str, Any] | None = None,
    *,
    tell: bool = True,
) -> None:
    """Refuse tasks that would fill the disk; by one rank.

    Args:
        todo: tasks that are not finished, in order; where the first one is `tokenize`, the tokenizer is there.
        width: E, None where it is not known.
        known: name -> entry of corpora that `tokenize` will not make.
        tell: show what is needed and what is free.

    Raises:
        UserError: tells both.
    """
    needed = Need(work, config, todo, width, known)
    most, free = needed.most, shutil.disk_usage(work.path).free
    parts = ", ".join(f"{name} {amount(size)}" for name, size in needed.bytes.items() if size)
    if most > free:
        raise UserError(
            f"--retro-work-dir {work.path} will grow by {amount(most)} ({parts}), its disk has {amount(free)} free; "
            "make room and run the same command again, or give a directory on another disk"
        )
    if tell and parts:
        say(f"disk: {work.path} will grow by {amount(most)} ({parts}); {amount(free)} are free")


def amount(num_bytes: float) -> str:
    """Like "12.3 GB" or "45.6 MB"."""
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


class Need:
    """Bytes that tasks will add to a work dir.

    Attributes:
        bytes: stage -> bytes of its files that are not there yet.
        most: in use at once beyond what is there now.
    """

    def __init__(
        self,
        work: WorkDir,
        config: PreprocessConfig,
        todo: list[str],
        width: int | None,
        known: dict[str, Any] | None = None,
    ) -> None:
        self._work, self._config, self._todo, self._known = work, config, todo, known or {}
        self._disk_block = os.statvfs(work.path).f_frsize
        self.bytes: dict[str, float] = collections.defaultdict(float)
        self.bytes["corpus"] = parts = made = 0.0
        self._corpora = self._counted()
        if "tokenize" in todo:
            for source in work.settings["sources"]:
                if not source["tokens"] and source["name"] not in self._known:
                    counts = self._corpora[source["name"]]
                    self.bytes["corpus"] += self._of_corpus(counts)
                    more, there = self._of_parts(source["name"], counts)
                    parts, made = parts + more, made + there
        if "db-build" in todo:
            for name, counts in self._corpora.items():
                path = work.directory("chunks") / f"{name}.npy"
                self.bytes["chunks"] += self._unless_there(path, _NPY_HEADER + 8 * (counts.documents + 1))
        if width:
            if "embed" in todo:
                self.bytes["embeddings"] = self._of_rows("embeddings", {".npy": 2 * width})
            with contextlib.suppress(UserError):  # an index that cannot be is refused elsewhere
                self.bytes["index"] = self._of_index(width)
        if "query-neighbors" in todo:
            k = self._setting("retro_query_num_neighbors_save")
            self.bytes["neighbors"] = self._of_rows("neighbors", {".distances.npy": 4 * k, ".ids.npy": 8 * k})
            if self._setting("retro_retriever") != "dense":
                self.bytes["words"] = _WORDS_BYTES * self._database_chunks(0, self._num_chunks)
        # Parts stay until all corpora are merged, and go before the next task.
        self.most = max(self.bytes["corpus"] + parts, sum(self.bytes.values()) - made)

    def _setting(self, name: str) -> Any:
        return self._work.settings.get(name) or self._config.given().get(name, DEFAULTS[name])

    # -------------------------------------------------------------------------------------------- counts

    @property
    def _num_chunks(self) -> int:
        return round(sum(counts.chunks for counts in self._corpora.values()))

    def _counted(self) -> dict[str, Counts]:
        """What each corpus holds, in order."""
        work = self._work
        if work.has("chunks") and work.has("corpus"):
            chunks, corpora = work.facts("chunks")["corpora"], work.facts("corpus")["corpora"]
            return {
                counted["name"]: Counts(counted["documents"], entry["tokens"], counted["chunks"])
                for counted, entry in zip(chunks, corpora, strict=True)
            }
        if work.has("corpus") or "tokenize" not in self._todo:  # without either there is nothing to go on from
            return {
                entry["name"]: self._read(entry["name"], entry["prefix"]) for entry in work.facts("corpus")["corpora"]
            }
        return {source["name"]: self._of_source(source) for source in work.settings["sources"]}

    def _of_source(self, source: dict[str, Any]) -> Counts:
        from megatron_retro.data.documents import Source
        from megatron_retro.retrieval.corpora import open_tokenizer

        if source["tokens"] or source["name"] in self._known:
            return self._read(source["name"], self._known.get(source["name"], {"prefix": source["path"]})["prefix"])
        tokenizer, length = open_tokenizer(self._work), self._setting("retro_chunk_length")
        return estimate(Source.find(source["path"]), self._setting("json_key"), tokenizer, length)

    def _read(self, name: str, prefix: str) -> Counts:
        from megatron_retro.data.chunks import Corpus

        lengths = Corpus.open(name, str(self._work.path / prefix)).length
        chunks = -(-lengths // self._setting("retro_chunk_length"))
        return Counts(len(lengths), int(lengths.sum()), int(chunks.sum()))

    @functools.cached_property
    def _table(self) -> Any:
        from megatron_retro.data.chunks import ChunkTable

        return ChunkTable.open(self._work) if self._work.has("chunks") else None

    def _database_chunks(self, first: int, end: int) -> int:
        """How many of the chunks `first` … `end`-1 are in the database."""
        weights = split_weights(self._setting("split"))
        if self._table is None:
            excluded, begin, held = self._setting("retro_exclude_corpora"), 0, 0.0
            for name, counts in self._corpora.items():
                if name not in excluded:
                    held += max(0, min(end, begin + counts.chunks) - max(first, begin))
                begin += round(counts.chunks)
            return round(held * weights[0] / sum(weights))
        documents = self._table.database_documents(weights)
        begins, ends = (np.clip(self._table.first_chunk[documents + more], first, end) for more in (0, 1))
        return int((ends - begins).sum())

    # -------------------------------------------------------------------------------------------- bytes

    def _on_disk(self, size: float) -> float:
        """A file's size in whole blocks of the disk."""
        return -(-size // self._disk_block) * self._disk_block

    def _unless_there(self, path: pathlib.Path, size: float) -> float:
        return 0.0 if path.exists() else self._on_disk(size)

    def _of_corpus(self, counts: Counts) -> float:
        from megatron_retro.data.tokenize import token_dtype

        item = np.dtype(token_dtype(self._work.facts("tokenizer")["vocab_size"])).itemsize
        return self._on_disk(item * counts.tokens) + self._on_disk(_INDEX_HEADER + 20 * counts.documents)

    def _of_parts(self, name: str, counts: Counts) -> tuple[float, float]:
        """(bytes of a corpus's parts that are not there yet, and of those that are)."""
        number = -(-counts.documents // _RECORDS_A_PART)
        a_part = Counts(counts.documents / max(1, number), counts.tokens / max(1, number))
        whole = number * (self._of_corpus(a_part) + self._disk_block)  # and its counts
        directory = self._work.path / "corpus" / f"{name}.parts"
        there = sum(self._on_disk(file.stat().st_size) for file in directory.glob("*")) if directory.is_dir() else 0
        return max(0.0, whole - there), there

    def _of_rows(self, stage: str, widths: dict[str, int]) -> float:
        """Blocks of rows by chunk id; `widths` is a file's ending -> bytes a row."""
        size = self._work.settings.get("embedded_block_size") or self._setting("retro_block_size")
        size = size or auto_block_size(self._num_chunks)
        if stage == "neighbors":
            size = neighbors_block_size(self._setting("retro_block_size"), size)
        needed = 0.0
        for name, counts in self._corpora.items():
            for begin in range(0, round(counts.chunks), size):
                block = Block(name, begin, min(begin + size, round(counts.chunks)), 0)
                for ending, width in widths.items():
                    file = block.path(self._work, stage, ending)
                    needed += self._unless_there(file, _NPY_HEADER + len(block) * width)
        return needed

    def _of_index(self, width: int) -> float:
        from megatron_retro.retrieval.index import choose_factory, choose_num_shards
        from megatron_retro.retrieval.stages import half_of_memory, shard_path, trained_index

        memory = self._setting("retro_index_memory_gb") or half_of_memory()
        whole = self._database_chunks(0, self._num_chunks)
        factory = self._work.settings.get("index_factory")
        factory = factory or choose_factory(self._setting("retro_index_str"), whole, width, memory)
        fixed, per_vector = index_bytes(factory, width)
        shards = list(self._work.settings.get("index_shards", []))
        covered = shards[-1][1] if shards else 0
        if covered < self._num_chunks:
            number = choose_num_shards(self._num_chunks - covered)
            bounds = [covered + (self._num_chunks - covered) * bound // number for bound in range(number + 1)]
            shards += itertools.pairwise(bounds)
        needed = self._unless_there(trained_index(self._work), fixed) if "index-train" in self._todo else 0.0
        for first, end in shards if "index-add" in self._todo else []:
            size = fixed + per_vector * self._database_chunks(first, end)
            needed += self._unless_there(shard_path(self._work, first, end), size)
        return needed


def index_bytes(factory: str, width: int) -> tuple[float, float]:
    """(bytes of a file of an empty, trained index, bytes a vector adds to it); by arithmetic, nothing is trained."""
    import faiss

    from megatron_retro.retrieval.index import check_factory, inverted_lists

    index: Any = check_factory(factory, width)
    empty, lists = len(faiss.serialize_index(index)), inverted_lists(index)
    if lists is None:
        if not hasattr(index, "hnsw"):
            return empty, index.sa_code_size() + _ID_BYTES
        storage: Any = faiss.downcast_index(index.storage)
        return empty, storage.sa_code_size() + _graph_bytes(index.hnsw.nb_neighbors(1)) + _ID_BYTES
    graph = re.search(r"IVF\d+_HNSW(\d*)", factory)
    a_list = 4 * lists.d + 8 + (_graph_bytes(int(graph[1] or 32)) if graph else 0)
    coarse = lists.nlist * a_list if lists.quantizer_trains_alone != 1 else 0
    rotation = 4 * width * lists.d if isinstance(index, faiss.IndexPreTransform) else 0
    return empty + coarse + rotation, lists.code_size + _ID_BYTES


def _graph_bytes(links: int) -> float:
    """Of a vector in an HNSW graph: twice as many links at the bottom, one of `links` vectors a level up, and so on."""
    return 4 * (2 * links + links / (links - 1)) + 12
