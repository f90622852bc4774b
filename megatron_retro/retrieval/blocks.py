"""Rows by chunk id, in one `.npy` file a block of consecutive chunks of a corpus.

    <stage>/<corpus>/<a>-<b><suffix>    rows of chunks a … b-1, counted within the corpus

Blocks are the unit of sharing out work to ranks and of going on after an interruption.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from megatron_retro import distributed, watch
from megatron_retro.data.chunks import running_sum
from megatron_retro.reading import load_array
from megatron_retro.retrieval.progress import Progress
from megatron_retro.workdir import WorkDir

_QUERIES_AT_ONCE = 32_768

Advance = Callable[[int], None]  # told how many units of work were done


@dataclasses.dataclass(frozen=True)
class Block:
    """Chunks `begin` … `end`-1 of a corpus; `first` is the chunk id (over all corpora) of `begin`."""

    corpus: str
    begin: int
    end: int
    first: int

    @property
    def ids(self) -> np.ndarray:
        """Chunk ids, [end - begin] int64."""
        return np.arange(self.first, self.first + len(self), dtype=np.int64)

    def __len__(self) -> int:
        return self.end - self.begin

    def path(self, work: WorkDir, stage: str, suffix: str = ".npy") -> pathlib.Path:
        return work.directory(stage) / self.corpus / f"{self.begin}-{self.end}{suffix}"


def auto_block_size(num_chunks: int) -> int:
    """Chunks a block: about 1,000 blocks, within 2,048 (sorting by length pays) and 131,072 (an hour's work)."""
    wanted = max(1, num_chunks // 1000)
    return min(max(2048, 1 << (wanted - 1).bit_length()), 1 << 17)


def neighbors_block_size(given: int | None, embedded: int) -> int:
    """Chunks a block of neighbors: as many as share one pass over the index, or what `--retro-block-size` gave.

    Args:
        embedded: chunks a block of embeddings.
    """
    return given or max(embedded, _QUERIES_AT_ONCE)


def plan(work: WorkDir, block_size: int) -> list[Block]:
    """All blocks of a work dir, in the order of chunk ids."""
    blocks, first = [], 0
    for corpus in work.facts("chunks")["corpora"]:
        for begin in range(0, corpus["chunks"], block_size):
            end = min(begin + block_size, corpus["chunks"])
            blocks.append(Block(corpus["name"], begin, end, first + begin))
        first += corpus["chunks"]
    return blocks


def make_blocks(
    stage: str,
    sizes: list[int],
    is_made: Callable[[int], bool],
    make: Callable[[list[int], Advance], None],
    chunks_at_once: int = 0,
) -> None:
    """Make this rank's blocks that are not there yet: block b belongs to rank b % world size.

    Returns when every rank has done its share.

    Args:
        stage: name to show.
        sizes: chunks of each block.
        is_made: whether a block, by number, is there.
        make: makes some blocks, by number, telling how many chunks it has come further.
        chunks_at_once: `make` is given blocks of at least so many chunks in all, and at least one block.
    """

    def share() -> None:
        mine = range(distributed.rank(), len(sizes), distributed.world_size())
        missing = [number for number in mine if not is_made(number)]
        total = sum(sizes[number] for number in mine)
        done = total - sum(sizes[number] for number in missing)
        with Progress(stage, total, "chunks", done) as progress:
            group: list[int] = []
            for number in missing:
                group.append(number)
                if sum(sizes[member] for member in group) >= chunks_at_once or number == missing[-1]:
                    named = f"block {number}" if len(group) == 1 else f"blocks {group[0]} to {number}"
                    with watch.doing(named):
                        make(group, progress.advance)
                    group = []

    distributed.together(share)


class RowTable:
    """Rows by chunk id over memory-mapped block files, each opened once: when first read, or all by `open_all`.

    Args:
        dtype, width: of a row.
    """

    def __init__(
        self,
        work: WorkDir,
        stage: str,
        blocks: list[Block],
        suffix: str,
        dtype: type[np.generic],
        width: int,
    ):
        self._paths = [block.path(work, stage, suffix) for block in blocks]
        self._dtype, self._width = dtype, width
        self._first = running_sum(np.array([len(block) for block in blocks]))
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    def rows(self, chunks: np.ndarray) -> np.ndarray:
        """The rows of chunk ids [n] int64: [n, width], as stored.

        Raises:
            IndexError: an id that is no chunk.
            UserError: a block's file is missing or damaged.
        """
        if len(chunks) and not (chunks.min() >= 0 and chunks.max() < len(self)):
            raise IndexError(f"chunk ids {chunks.min()} … {chunks.max()} of a table of {len(self)} chunks")
        of_block = np.searchsorted(self._first, chunks, side="right") - 1
        rows = np.empty((len(chunks), self._width), self._dtype)
        order = np.argsort(of_block, kind="stable")
        bounds = np.searchsorted(of_block[order], np.unique(of_block))
        for here in np.split(order, bounds[1:]):
            if len(here):
                number = int(of_block[here[0]])
                rows[here] = self._block(number)[chunks[here] - self._first[number]]
        return rows

    def place(self, chunk: int) -> str:
        """The file and the row of a chunk, for messages."""
        number = int(np.searchsorted(self._first, chunk, side="right")) - 1
        return f"{self._paths[number]} row {chunk - int(self._first[number])}"

    def open_all(self) -> None:
        """Open every block now; later reads open no file."""
        for number in range(len(self._paths)):
            self._block(number)

    def _block(self, number: int) -> np.ndarray:
        if number not in self._open:
            size = int(self._first[number + 1] - self._first[number])
            self._open[number] = load_array(self._paths[number], self._dtype, (size, self._width))
        return self._open[number]
