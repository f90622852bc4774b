"""How much of an evaluated chunk is in the database word for word, and what a model's loss is without such chunks.

Borgeaud et al. (arXiv 2112.04426, section 2.6): r(C) is the longest run of tokens that a chunk C shares with one of its
nearest neighbors or their continuations, over the chunk length. Bits per byte over the chunks with r(C) ≤ α tell what
is left when copies do not count. Two neighborhoods are measured:

- `database`: the saved neighbors of C itself, as in the paper, which takes the 10 nearest: is C in the database?
- `read`: what the model reads while it predicts C, the neighbors of the chunk before it (Norlund et al., arXiv
  2302.12128): can C be copied? 0 where nothing is read.
"""

import math
from typing import Any

import numpy as np

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.data.overlap import longest_common_run
from megatron_retro.evaluation.bootstrap import estimate, ratio, resampled
from megatron_retro.evaluation.chunks import EvaluatedChunks
from megatron_retro.training.evaluation import SampleSource

GRID = tuple(step / 8 for step in range(1, 9))  # 12.5 % is eight tokens of a chunk of 64

_CHUNKS_AT_ONCE = 512


def database_runs(table: ChunkTable, chunks: np.ndarray, database: ChunkTable, ids_nxK: np.ndarray) -> np.ndarray:
    """The longest run that each chunk shares with any of its neighbors and their continuations, [n] int64.

    Args:
        table: the chunks of the text.
        chunks: [n] int64 ids in it.
        database: the chunks among which the neighbors are.
        ids_nxK: int64 ids in that, -1 for none.
    """
    runs = np.zeros(len(chunks), np.int64)
    for begin in range(0, len(chunks), _CHUNKS_AT_ONCE):
        here = slice(begin, begin + _CHUNKS_AT_ONCE)
        near, lengths = database.tokens(ids_nxK[here].reshape(-1), 2 * database.chunk_length, 0)
        runs[here] = _longest(table, chunks[here], near.reshape(*ids_nxK[here].shape, -1), lengths)
    return runs


def read_runs(source: SampleSource, slots: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The longest run that the chunk of each slot shares with what is read for it, [n, L + 1] int64.

    Args:
        source: whose neighbors are read.
        slots: [num_samples, L + 1] int64 chunk ids, -1 for none.
        numbers: [n] int64 samples.
    """
    runs = np.zeros((len(numbers), slots.shape[1]), np.int64)
    for row, sample in enumerate(numbers):
        batch = source.batch(np.array([sample]), "on")
        if batch.neighbor_tokens_BxLxKxR is not None and batch.neighbor_lengths_BxLxK is not None:
            near, lengths = batch.neighbor_tokens_BxLxKxR[0].numpy(), batch.neighbor_lengths_BxLxK[0].numpy()
            runs[row, 1:] = _longest(source.table, slots[sample, 1:], near, lengths.reshape(-1))
    return runs


def _longest(table: ChunkTable, chunks: np.ndarray, near_nxKxR: np.ndarray, near_lengths: np.ndarray) -> np.ndarray:
    """[n] int64; `near_lengths` is [n · K]."""
    num_chunks, num_neighbors, _ = near_nxKxR.shape
    own, own_lengths = (np.repeat(part, num_neighbors, 0) for part in table.tokens(chunks, table.chunk_length, 0))
    runs, _, _ = longest_common_run(own, near_nxKxR.reshape(len(own), -1), own_lengths, near_lengths)
    return runs.reshape(num_chunks, num_neighbors).max(1)


def curve(
    runs: np.ndarray, chunk_length: int, losses: dict[str, np.ndarray], chunks: EvaluatedChunks
) -> dict[str, Any]:
    """Bits per byte over the chunks with r(C) ≤ α, for every α of the grid.

    Args:
        runs: [n] int64, the longest run of each chunk.
        losses: mode -> [n] nats by chunk; differences are taken to "off".

    Returns:
        `alpha` (shares), and for each of them `chunks`, `share_of_bytes`, `bits_per_byte` (mode -> values) and
        `versus_off` with `versus_off_interval` (mode -> paired differences in bits per byte); None where no chunk is.
    """
    within = {alpha: runs <= alpha * chunk_length for alpha in GRID}
    columns = {("bytes", alpha): chunks.bytes * inside for alpha, inside in within.items()}
    columns |= {
        (mode, alpha): loss / math.log(2) * inside for mode, loss in losses.items() for alpha, inside in within.items()
    }
    sums = resampled(columns, chunks.documents)
    bits = {mode: [estimate(ratio(sums[mode, alpha], sums["bytes", alpha]))[0] for alpha in GRID] for mode in losses}
    result: dict[str, Any] = {
        "alpha": list(GRID),
        "chunks": [int(inside.sum()) for inside in within.values()],
        "share_of_bytes": [float(sums["bytes", alpha][0] / max(1, chunks.bytes.sum())) for alpha in GRID],
        "bits_per_byte": bits,
        "versus_off": {},
        "versus_off_interval": {},
    }
    for mode in losses if "off" in losses else ():
        if mode != "off":
            found = [estimate(ratio(sums[mode, a] - sums["off", a], sums["bytes", a])) for a in GRID]
            result["versus_off"][mode], result["versus_off_interval"][mode] = map(list, zip(*found, strict=True))
    return result
