"""Loss over the same tokens with retrieval on, off and random, with intervals."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_retro import distributed, mcore
from megatron_retro.data.samples import Batch, Samples

_BOOTSTRAP_ROUNDS = 2000


@dataclasses.dataclass
class SampleLosses:
    """What a model lost on each sample.

    Attributes:
        loss: [num_samples] float64, summed over the sample's predicted tokens, in nats.
        tokens: [num_samples] int64, predicted tokens.
    """

    loss: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Nats a predicted token."""
        return float(self.loss.sum() / max(1, self.tokens.sum()))


def sample_losses(
    model: torch.nn.Module,
    samples: Samples,
    *,
    num_samples: int,
    micro_batch_size: int,
    retrieval: str,
    progress: Callable[[int], None] = lambda done: None,
) -> SampleLosses:
    """Loss of samples 0 … num_samples-1; every rank takes part and gets all of it.

    Args:
        model: wrapped or not; runs without dropout and gradients.
        retrieval: "on", "off" or "random".
        progress: called with the number of samples done.
    """
    ranks = mcore.parallel_state.get_data_parallel_world_size()
    rank = mcore.parallel_state.get_data_parallel_rank()
    together = micro_batch_size * ranks
    reports: list[dict[str, Any]] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for begin in range(0, num_samples, together):
            ids = begin + rank * micro_batch_size + np.arange(micro_batch_size)
            batch = samples.batch(np.where(ids < num_samples, ids, -1), retrieval)
            reports += run_forward(model, batch)
            progress(min(num_samples, begin + together))
    model.train(was_training)
    return _gather(reports, num_samples)


def run_forward(model: torch.nn.Module, batch: Batch) -> list[dict[str, Any]]:
    """One microbatch through all pipeline stages without gradients; reports on the last stage."""
    return mcore.run_pipeline(
        forward_step,
        iter([batch]),
        model,
        num_microbatches=1,
        seq_length=boundary_length(model, batch),
        micro_batch_size=len(batch.sample_ids),
        forward_only=True,
    )


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
    """megatron-core's contract: run one microbatch, return its output and the function that makes it a loss."""
    batch = next(batches).to(mcore.device())
    output = model(
        batch.tokens_BxS,
        batch.labels_BxS,
        mask=batch.mask,
        neighbor_tokens_BxLxKxR=batch.neighbor_tokens_BxLxKxR,
        neighbor_lengths_BxLxK=batch.neighbor_lengths_BxLxK,
    )
    return output, lambda losses: _loss_of(losses, batch)


def boundary_length(model: torch.nn.Module, batch: Batch) -> int:
    """Rows of the tensor between pipeline stages for this batch."""
    num_chunks = num_neighbors = 0
    if batch.neighbor_lengths_BxLxK is not None:
        _, num_chunks, num_neighbors = batch.neighbor_lengths_BxLxK.shape
    return mcore.unwrap(model).boundary_length(batch.tokens_BxS.shape[1], num_chunks, num_neighbors)


def _loss_of(losses_BxS: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(loss summed over predicted tokens, their number, a report of both by sample)."""
    by_sample = (losses_BxS.float() * batch.loss_mask_BxS).sum(1)
    tokens = batch.loss_mask_BxS.sum(1)
    report = {"ids": batch.sample_ids, "loss": by_sample.detach().clone(), "tokens": tokens}
    return by_sample.sum(), tokens.sum().int(), report


def _gather(reports: list[dict[str, Any]], num_samples: int) -> SampleLosses:
    first_of_group = mcore.parallel_state.get_tensor_model_parallel_rank() == 0
    rows = [
        np.stack([report["ids"], report["loss"].double().cpu().numpy(), report["tokens"].cpu().numpy()])
        for report in reports
        if first_of_group
    ]
    losses = SampleLosses(np.zeros(num_samples), np.zeros(num_samples, np.int64))
    for part in distributed.all_gather(rows):
        for ids, loss, tokens in part:
            real = ids >= 0
            losses.loss[ids[real].astype(int)] = loss[real]
            losses.tokens[ids[real].astype(int)] = tokens[real]
    return losses


def summarize(losses: dict[str, SampleLosses], num_bytes: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Loss, perplexity and bits per byte of each retrieval mode, with 95 % bootstrap intervals over samples.

    Args:
        losses: mode -> losses over the same samples.
        num_bytes: UTF-8 bytes of the predicted tokens.

    Returns:
        mode -> figures; `versus_off` is the paired difference of loss to retrieval off, in nats a token.
    """
    result = {}
    for mode, of_mode in losses.items():
        figures: dict[str, Any] = {
            "loss": of_mode.mean,
            "loss_interval": _interval(of_mode.loss, of_mode.tokens, seed),
            "perplexity": math.exp(min(of_mode.mean, 700.0)),
            "bits_per_byte": float(of_mode.loss.sum()) / math.log(2) / max(1, num_bytes),
            "tokens": int(of_mode.tokens.sum()),
            "samples": len(of_mode.loss),
        }
        if mode != "off" and "off" in losses:
            difference = of_mode.loss - losses["off"].loss
            figures["versus_off"] = float(difference.sum() / max(1, of_mode.tokens.sum()))
            figures["versus_off_interval"] = _interval(difference, of_mode.tokens, seed)
        result[mode] = figures
    return result


def _interval(total: np.ndarray, tokens: np.ndarray, seed: int) -> list[float]:
    """95 % percentile bootstrap interval of sum(total) / sum(tokens), resampling samples."""
    draw = np.random.default_rng(seed)
    picks = draw.integers(len(total), size=(_BOOTSTRAP_ROUNDS, len(total)))
    means = total[picks].sum(1) / np.maximum(1, tokens[picks].sum(1))
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def predicted_bytes(samples: Samples, num_samples: int, decode: Callable[[list[list[int]]], list[str]]) -> int:
    """UTF-8 bytes of the text of all predicted tokens of samples 0 … num_samples-1."""
    total = 0
    for sample in range(num_samples):
        batch = samples.batch(np.array([sample]), "off")
        predicted = batch.labels_BxS[batch.loss_mask_BxS > 0].tolist()
        total += len(decode([predicted])[0].encode("utf-8", errors="replace"))
    return total
