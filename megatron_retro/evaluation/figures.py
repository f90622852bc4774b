"""Loss, perplexity and bits per byte of each mode over the same chunks, with paired differences."""

import math
from typing import Any

import numpy as np

from megatron_retro.evaluation.bootstrap import estimate, ratio, resampled
from megatron_retro.evaluation.chunks import EvaluatedChunks

_LARGEST = 700.0  # exp of more is no float


def summarize(losses: dict[str, np.ndarray], chunks: EvaluatedChunks) -> dict[str, dict[str, Any]]:
    """Figures of each mode, with 95 % intervals over documents.

    Args:
        losses: mode -> [n] nats by chunk.

    Returns:
        mode -> figures. `versus_off` and `versus_gpt` are the paired differences, mode − off and mode − GPT, in nats a
        token; a GPT has none to itself, nor to off.
    """
    columns = {**losses, "num_tokens": chunks.tokens, "num_bytes": chunks.bytes}
    sums = resampled(columns, chunks.documents)
    tokens, num_bytes = sums["num_tokens"], sums["num_bytes"]
    result = {}
    for mode in losses:
        loss, loss_interval = estimate(ratio(sums[mode], tokens))
        bits, bits_interval = estimate(ratio(sums[mode] / math.log(2), num_bytes))
        figures: dict[str, Any] = {
            "loss": loss,
            "loss_interval": loss_interval,
            "perplexity": math.exp(min(loss or 0.0, _LARGEST)),
            "perplexity_interval": loss_interval and [math.exp(min(bound, _LARGEST)) for bound in loss_interval],
            "bits_per_byte": bits,
            "bits_per_byte_interval": bits_interval,
            "tokens": int(tokens[0]),
            "chunks": len(chunks.ids),
            "documents": len(np.unique(chunks.documents)),
            "samples": len(chunks.rows),
        }
        for other in ("off", "gpt"):
            if other in losses and mode not in (other, "gpt"):
                difference, interval = estimate(ratio(sums[mode] - sums[other], tokens))
                figures[f"versus_{other}"], figures[f"versus_{other}_interval"] = difference, interval
        result[mode] = figures
    return result
