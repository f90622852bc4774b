"""Cross-entropy of the output layer, some positions at a time: logits of a whole batch never exist at once.

Letters: T positions of a batch, D hidden size, V rows of the output layer that this tensor-parallel rank holds.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_retro.mcore import parallel_state

LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2**27}  # fit a CPU's cache; fill a GPU


def cross_entropy(x_TxD: Tensor, weight_VxD: Tensor, labels_T: Tensor, loss_mask_T: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of logits x weightᵀ, the vocabulary divided over the tensor-parallel ranks.

    Gradients are made in the forward pass, so that a chunk's logits are needed once (as Liger-Kernel does, arXiv
    2410.10989, §3.2); those of the weight are added up in its dtype.

    Args:
        x_TxD: the same on every tensor-parallel rank; its gradient is this rank's part of a sum over them.
        labels_T: int64, over the whole vocabulary.
        loss_mask_T: float32, 0 where the position does not count.

    Returns:
        (sum over the counted positions, differentiable; loss of each position [T] without gradient), fp32, in nats.
    """
    return _CrossEntropy.apply(x_TxD, weight_VxD, labels_T, loss_mask_T, torch.is_grad_enabled())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_TxD: Tensor, weight_VxD: Tensor, labels_T: Tensor, loss_mask_T: Tensor, with_gradients: bool
    ) -> tuple[Tensor, Tensor]:
        wants_x, wants_weight = (with_gradients and wanted for wanted in ctx.needs_input_grad[:2])
        x_gradient = torch.empty_like(x_TxD) if wants_x else None
        weight_gradient = torch.empty_like(weight_VxD) if wants_weight else None
        losses = []
        at_once = LOGITS_AT_ONCE[x_TxD.device.type]
        length = max(1, at_once // len(weight_VxD))
        for begin in range(0, len(x_TxD), length):
            part = slice(begin, begin + length)
            logits_txV = x_TxD[part] @ weight_VxD.t()
            loss_t, gradient_of = _loss(logits_txV, labels_T[part])
            losses.append(loss_t)
            if wants_x or wants_weight:
                gradient_txV = gradient_of(loss_mask_T[part])
            if x_gradient is not None:
                torch.mm(gradient_txV, weight_VxD, out=x_gradient[part])
            if weight_gradient is not None:
                weight_gradient.addmm_(gradient_txV.t(), x_TxD[part], beta=min(1, begin))
        ctx.save_for_backward(x_gradient, weight_gradient)
        loss_T = torch.cat(losses)
        ctx.mark_non_differentiable(loss_T)
        return (loss_T * loss_mask_T).sum(), loss_T

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor, of_positions: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = (None if made is None else made.mul_(of_sum) for made in ctx.saved_tensors)
        return (*gradients, None, None, None)


def _loss(logits_txV: Tensor, labels_t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(loss [t], mask [t] -> gradient of the masked sum by the logits, written over them)."""
    labels_t = labels_t - parallel_state.get_tensor_model_parallel_rank() * logits_txV.shape[1]
    here_t = (labels_t >= 0) & (labels_t < logits_txV.shape[1])
    label_tx1 = torch.where(here_t, labels_t, 0)[:, None]
    of_label_t = logits_txV.gather(1, label_tx1)[:, 0].float() * here_t
    softmax_txV = torch.softmax(logits_txV, 1, torch.float32)
    own_normalizer_t = logits_txV.amax(1).float() - softmax_txV.amax(1).log()  # of this rank's part of the vocabulary
    normalizer_t, of_label_t = _over_ranks(own_normalizer_t, of_label_t)

    def gradient(loss_mask_t: Tensor) -> Tensor:
        share_t = (own_normalizer_t - normalizer_t).exp()
        torch.mul(softmax_txV, (share_t * loss_mask_t)[:, None], out=logits_txV)
        minus_one_tx1 = (-loss_mask_t * here_t)[:, None].to(logits_txV.dtype)
        return logits_txV.scatter_add_(1, label_tx1, minus_one_tx1)

    return normalizer_t - of_label_t, gradient


def _over_ranks(normalizer_t: Tensor, of_label_t: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp and the label's logit, of each rank's part of the vocabulary -> of the whole."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return normalizer_t, of_label_t
    group = parallel_state.get_tensor_model_parallel_group()
    highest_t = normalizer_t.clone()
    dist.all_reduce(highest_t, dist.ReduceOp.MAX, group)
    sums_2xt = torch.stack(((normalizer_t - highest_t).exp(), of_label_t))
    dist.all_reduce(sums_2xt, group=group)
    return highest_t + sums_2xt[0].log(), sums_2xt[1]
