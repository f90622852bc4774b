"""Loss of a model on samples, chunk by chunk, without gradients."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_retro import distributed, mcore
from megatron_retro.data.chunks import ChunkTable
from megatron_retro.data.samples import Batch


class SampleSource(Protocol):
    """What is evaluated: `Samples`, or the same text with other neighbors.

    Attributes:
        table: the chunks of the text.
    """

    table: ChunkTable

    def batch(self, sample_ids: np.ndarray, retrieval: str = "on") -> Batch:
        """As `Samples.batch`."""


@dataclasses.dataclass
class SampleLosses:
    """What a model lost on each chunk of each sample.

    A token counts where it stands, not where it is predicted from: slot j < L of a sample holds the predicted tokens of
    its j-th chunk, which all read the neighbors of the chunk before it, and slot L the one token behind the sample.

    Attributes:
        loss: [num_samples, L + 1] float64, summed over the predicted tokens, in nats.
        tokens: [num_samples, L + 1] int64, how many they are.
    """

    loss: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Nats a predicted token."""
        return float(self.loss.sum() / max(1, self.tokens.sum()))


def sample_losses(
    model: torch.nn.Module,
    samples: SampleSource,
    *,
    num_samples: int,
    micro_batch_size: int,
    retrieval: str,
    progress: Callable[[int], None] = lambda more: None,
) -> SampleLosses:
    """Loss of samples 0 … num_samples-1; every rank takes part and gets all of it.

    Args:
        model: wrapped or not; runs without dropout and gradients.
        retrieval: "on", "off" or "random".
        progress: called with the number of samples that all ranks did since it was called before.
    """
    ranks = mcore.parallel_state.get_data_parallel_world_size()
    rank = mcore.parallel_state.get_data_parallel_rank()
    microbatches = num_microbatches(model)
    together = micro_batch_size * ranks * microbatches
    rows: list[np.ndarray] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for begin in range(0, num_samples, together):
            ids = begin + np.arange(together)
            mine = np.where(ids < num_samples, ids, -1).reshape(microbatches, ranks, micro_batch_size)[:, rank]
            batches = [samples.batch(row, retrieval) for row in mine]
            rows += [_by_slot(report, samples.table.chunk_length) for report in run_forward(model, batches)]
            progress(min(together, num_samples - begin))
    model.train(was_training)
    return _gather(rows, num_samples)


def run_forward(model: torch.nn.Module, batches: list[Batch]) -> list[dict[str, Any]]:
    """`num_microbatches` of equal shape through all pipeline stages without gradients; reports on the last stage."""
    return mcore.run_pipeline(
        forward_step,
        iter(batches),
        model,
        num_microbatches=len(batches),
        seq_length=boundary_length(model, batches[0]),
        micro_batch_size=len(batches[0].sample_ids),
        forward_only=True,
    )


def num_microbatches(model: torch.nn.Module) -> int:
    """The fewest that the pipeline takes: one, but with virtual stages one a pipeline rank."""
    virtual = isinstance(model, mcore.ModelChunks) and len(model) > 1
    return mcore.parallel_state.get_pipeline_model_parallel_world_size() if virtual else 1


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
    """megatron-core's contract: run one microbatch, return its output and the function that makes it a loss."""
    batch = next(batches).to(mcore.device())
    output = model(
        batch.tokens_BxS,
        batch.labels_BxS,
        batch.loss_mask_BxS,
        order_BxS=batch.order_BxS,
        examples_BxS=batch.examples_BxS,
        neighbor_tokens_BxLxKxR=batch.neighbor_tokens_BxLxKxR,
        neighbor_lengths_BxLxK=batch.neighbor_lengths_BxLxK,
        neighbor_chunks_M=batch.neighbor_chunks_M,
    )
    return output, lambda losses: _loss_of(losses, batch)


def boundary_length(model: torch.nn.Module, batch: Batch) -> int:
    """Rows of the tensor between pipeline stages for this batch."""
    return mcore.unwrap(model).boundary_length(batch.tokens_BxS.shape[1], *_chunks_and_neighbors(batch))


def boundary_bytes(model: torch.nn.Module, batch: Batch) -> int:
    """Bytes of that tensor, over all sequence-parallel parts."""
    num_samples, num_positions = batch.tokens_BxS.shape
    return mcore.unwrap(model).boundary_bytes(num_positions, num_samples, *_chunks_and_neighbors(batch))


def _chunks_and_neighbors(batch: Batch) -> tuple[int, int]:
    """(L, K), zeros with retrieval off."""
    if batch.neighbor_lengths_BxLxK is None:
        return 0, 0
    _, num_chunks, num_neighbors = batch.neighbor_lengths_BxLxK.shape
    return num_chunks, num_neighbors


def _loss_of(losses: tuple[Tensor, Tensor], batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(loss summed over predicted tokens, their number, a report of both by sample and by position)."""
    loss, losses_BxS = losses
    by_position = losses_BxS * batch.loss_mask_BxS
    tokens = batch.loss_mask_BxS.sum(1)
    report = {
        "ids": batch.sample_ids,
        "loss": by_position.sum(1),
        "tokens": tokens,
        "losses_BxS": by_position,
        "mask_BxS": batch.loss_mask_BxS,
        "reading": batch.reading,
    }
    return loss, tokens.sum().int(), report


def _by_slot(report: dict[str, Any], chunk_length: int) -> np.ndarray:
    """[B, 1 + 2 (L + 1)] float64: sample id, then loss and tokens of each slot (see `SampleLosses`)."""
    slots = []
    for name in ("losses_BxS", "mask_BxS"):
        shifted = torch.nn.functional.pad(report[name].double(), (1, chunk_length - 1))  # position p predicts p + 1
        slots.append(shifted.unflatten(1, (-1, chunk_length)).sum(2).cpu().numpy())
    return np.concatenate([report["ids"][:, None], *slots], axis=1)


def _gather(rows: list[np.ndarray], num_samples: int) -> SampleLosses:
    first_of_group = mcore.parallel_state.get_tensor_model_parallel_rank() == 0
    table = np.concatenate(
        [part for of_rank in distributed.all_gather(rows if first_of_group else []) for part in of_rank]
    )
    table = table[table[:, 0] >= 0]
    assert len(table) == num_samples
    table = table[np.argsort(table[:, 0])]
    loss, tokens = np.split(table[:, 1:], 2, axis=1)
    return SampleLosses(loss, tokens.astype(np.int64))
