"""The next token, chosen from its distribution."""

import numpy as np
import torch
from torch import Tensor


def choose(logits_BxV: Tensor, draws: np.ndarray, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token a row.

    Args:
        logits_BxV: any float type.
        draws: [B] uniform random numbers from 0 to below 1; a token depends on its row and its draw alone.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: the likeliest tokens to choose among; 0 is all.
        top_p: choose among the fewest likeliest tokens whose probability together is at least this (Holtzman et al.
            2020, arXiv 1904.09751).

    Returns:
        [B] int64.
    """
    if temperature == 0:
        return logits_BxV.argmax(-1)
    values, tokens = (logits_BxV.float() / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k:
        values, tokens = values[:, :top_k], tokens[:, :top_k]
    probability = values.softmax(-1).double()
    before = probability.cumsum(-1) - probability
    probability = torch.where(before < top_p, probability, 0.0)
    cumulative = probability.cumsum(-1)
    threshold = torch.from_numpy(draws).to(cumulative)[:, None] * cumulative[:, -1:]
    place = (cumulative <= threshold).sum(-1).clamp(max=cumulative.shape[1] - 1)
    return tokens.gather(1, place[:, None])[:, 0]
