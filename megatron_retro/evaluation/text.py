"""Losses of several models and modes over the same tokens, and what follows from them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_retro.data.samples import NeighborSource, Samples
from megatron_retro.evaluation.chunks import Decode, EvaluatedChunks, by_ranks, slot_chunks
from megatron_retro.evaluation.figures import summarize
from megatron_retro.evaluation.leakage import curve, database_runs, read_runs
from megatron_retro.evaluation.other import OtherDatabase, OtherSamples
from megatron_retro.training.evaluation import SampleLosses, SampleSource, sample_losses


class TextEvaluation:
    """The first samples of a split, in one mode after the other; every rank calls every method.

    Args:
        samples: of the split, in the order of evaluation.
        num_samples: how many of them.
        neighbors: of the work dir; None where no model retrieves.
        other: another work dir's database, or None.
        num_neighbors: K.
        pad: fills up short neighbors.
    """

    def __init__(
        self,
        samples: Samples,
        num_samples: int,
        neighbors: NeighborSource | None,
        other: OtherDatabase | None,
        num_neighbors: int,
        pad: int,
    ):
        self._samples, self.num_samples, self._neighbors, self._other = samples, num_samples, neighbors, other
        self._slots = slot_chunks(samples, num_samples)
        self._losses: dict[str, SampleLosses] = {}
        if other:
            self._chunks = np.unique(self._slots[self._slots >= 0])
            self._other_ids = by_ranks(
                len(self._chunks), lambda rows: other.neighbors(samples.table, self._chunks[rows])
            )
            self._other_samples = OtherSamples(samples, other.table, self._chunks, self._other_ids, num_neighbors, pad)

    def measure(
        self, mode: str, model: torch.nn.Module, micro_batch_size: int, progress: Callable[[int], None]
    ) -> None:
        """Run a model over all samples: "on", "off", "random", "also" (the other database), or "gpt"."""
        source: SampleSource = self._other_samples if mode == "also" else self._samples
        self._losses[mode] = sample_losses(
            model,
            source,
            num_samples=self.num_samples,
            micro_batch_size=micro_batch_size,
            retrieval={"also": "on", "gpt": "off"}.get(mode, mode),
            progress=progress,
        )

    def result(self, decode: Decode) -> dict[str, Any]:
        """`bytes`, `retrieval` (mode -> figures of `summarize`) and `leakage` (neighborhood -> `curve`)."""
        tokens = next(iter(self._losses.values())).tokens
        chunks = EvaluatedChunks.of(self._samples, tokens, decode)
        losses = {mode: chunks.sum(of_mode.loss) for mode, of_mode in self._losses.items()}
        length = self._samples.table.chunk_length
        curves = {}
        for name, runs in self._runs(chunks).items():
            reading = "also" if name.startswith("also") else "on"
            shown = {mode: losses[mode] for mode in (reading, "off", "gpt") if mode in losses}
            curves[name] = curve(runs, length, shown, chunks)
        return {"bytes": int(chunks.bytes.sum()), "retrieval": summarize(losses, chunks), "leakage": curves}

    def _runs(self, chunks: EvaluatedChunks) -> dict[str, np.ndarray]:
        """Neighborhood -> the longest run of each chunk with it, [n] int64."""
        table, runs = self._samples.table, {}
        if self._neighbors is not None and "on" in self._losses:
            neighbors = self._neighbors
            runs["database"] = by_ranks(
                len(chunks.ids),
                lambda rows: database_runs(table, chunks.ids[rows], table, neighbors.ids(chunks.ids[rows])),
            )
            runs["read"] = self._read(self._samples, chunks)
        if self._other is not None:
            other, ids = self._other.table, self._other_ids[np.searchsorted(self._chunks, chunks.ids)]
            runs["also_database"] = by_ranks(
                len(ids), lambda rows: database_runs(table, chunks.ids[rows], other, ids[rows])
            )
            runs["also_read"] = self._read(self._other_samples, chunks)
        return runs

    def _read(self, source: SampleSource, chunks: EvaluatedChunks) -> np.ndarray:
        by_slot = by_ranks(self.num_samples, lambda rows: read_runs(source, self._slots, rows))
        return chunks.largest(by_slot)
