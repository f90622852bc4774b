"""The pieces that a GPU runs as one kernel: compiled whole, without a break of the graph, to the same numbers."""

import pytest
import torch

from megatron_retro.model import attention, feed_forward

X, COSINE, SINE = torch.randn(7, 3, 2, 10), torch.rand(7, 1, 1, 5), torch.rand(7, 1, 1, 5)
PIECES = {
    "rotated": (attention._rotated, (X, COSINE, SINE)),
    "swiglu": (feed_forward._swiglu, (X,)),
    "swiglu_backward": (feed_forward._swiglu_backward, (X[..., :5], X)),
}


@pytest.mark.parametrize("piece", PIECES)
def test_pieces_compile_whole(piece: str) -> None:
    function, inputs = PIECES[piece]
    compiled = torch.compile(function.__wrapped__, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs), rtol=1e-6, atol=1e-6)


def test_swiglu_backward_is_its_derivative() -> None:
    assert torch.autograd.gradcheck(feed_forward.swiglu, X.double().requires_grad_())


@pytest.mark.gpu
@pytest.mark.parametrize("piece", PIECES)
def test_a_gpu_computes_what_a_cpu_does(piece: str) -> None:
    function, inputs = PIECES[piece]
    found = function(*(given.cuda() for given in inputs))
    torch.testing.assert_close(found.cpu(), function(*inputs), rtol=1e-5, atol=1e-5)
