"""The pieces that a GPU runs as one kernel: compiled whole, without a break of the graph, to the same numbers."""

import itertools

import pytest
import torch

from megatron_retro import mcore
from megatron_retro.model import attention, feed_forward

X, ANGLE = torch.randn(7, 3, 2, 10), torch.rand(7, 1, 1, 5)
PIECES = {
    "rotated": (attention._rotated, (X, ANGLE)),
    "swiglu": (feed_forward._swiglu, (X,)),
    "swiglu_backward": (feed_forward._swiglu_backward, (X[..., :5], X)),
}


@pytest.mark.parametrize("piece", PIECES)
def test_pieces_compile_whole(piece: str) -> None:
    function, inputs = PIECES[piece]
    compiled = torch.compile(function.__wrapped__, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs), rtol=1e-6, atol=1e-6)


def test_any_number_of_kinds_of_input_works() -> None:
    """torch.compile has a limit of kinds; what comes behind it must run all the same."""
    piece = attention._rotated.__wrapped__
    compiled = mcore.compiled(piece, backend="eager")
    kinds = itertools.product((1, 3, 7), (1, 2, 5), (1, 2, 3), (False, True), (False, True))
    for num_positions, num_samples, num_heads, strided, with_gradient in kinds:
        x = torch.randn(num_positions, num_samples, num_heads, 30 if strided else 10)[..., :10]
        angle = torch.rand(num_positions, 1, 1, 5)
        with torch.set_grad_enabled(with_gradient):
            torch.testing.assert_close(compiled(x, angle), piece(x, angle))


def test_clipping_takes_the_norm_of_large_gradients_to_the_last_digit() -> None:
    gradients = [torch.randn(3_000_001), torch.randn(5, 7)]
    norm, _ = mcore._norm_of_all(0, None, [gradients], False)
    exact = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    assert norm.shape == (1,) and norm.item() == pytest.approx(exact.item(), rel=1e-6)


def test_swiglu_backward_is_its_derivative() -> None:
    assert torch.autograd.gradcheck(feed_forward.swiglu, X.double().requires_grad_())


@pytest.mark.gpu
@pytest.mark.parametrize("piece", PIECES)
def test_a_gpu_computes_what_a_cpu_does(piece: str) -> None:
    function, inputs = PIECES[piece]
    found = function(*(given.cuda() for given in inputs))
    torch.testing.assert_close(found.cpu(), function(*inputs), rtol=1e-5, atol=1e-5)
