"""Hidden states and the encoder's output in one tensor: back out as they went in, gradients too."""

import pytest
import torch
from model_helpers import make_model, randn

from megatron_retro.model.packing import boundary_rows, pack, unpack

S = 13
# (encoder's output, samples, hidden size): rows that divide evenly, rows that do not, less than one row
SHAPES = [((10, 6, 7), 2, 5), ((10, 6, 11), 2, 17), ((2, 3, 5), 7, 11)]


@pytest.mark.parametrize("shape, num_samples, hidden_size", SHAPES)
def test_unpack_is_the_inverse_of_pack(shape, num_samples, hidden_size):
    x_SxBxD, encoded = randn(S, num_samples, hidden_size), randn(*shape, seed=8)
    packed = pack(x_SxBxD, encoded, boundary_rows(shape, num_samples, hidden_size))
    assert packed.shape == (S + boundary_rows(shape, num_samples, hidden_size), num_samples, hidden_size)
    x_again, encoded_again = unpack(packed, S, shape)
    assert torch.equal(x_again, x_SxBxD) and torch.equal(encoded_again, encoded)
    spare = packed[S:].numel() - encoded.numel()
    assert 0 <= spare < num_samples * hidden_size


def test_shapes_that_do_not_divide_are_among_those_tested():
    left_over = [torch.Size(shape).numel() % (samples * width) for shape, samples, width in SHAPES]
    assert left_over[0] == 0 and left_over[1] and left_over[2]


@pytest.mark.parametrize("shape, num_samples, hidden_size", SHAPES)
def test_gradients_pass_the_boundary_unchanged(shape, num_samples, hidden_size):
    x, encoded = randn(S, num_samples, hidden_size).requires_grad_(), randn(*shape, seed=8).requires_grad_()
    x_gradient, encoded_gradient = randn(S, num_samples, hidden_size, seed=9), randn(*shape, seed=10)
    packed = pack(x, encoded, boundary_rows(shape, num_samples, hidden_size))
    received = packed.detach().requires_grad_()  # what the next stage gets
    torch.autograd.backward(unpack(received, S, shape), (x_gradient, encoded_gradient))
    packed.backward(received.grad)
    assert torch.equal(x.grad, x_gradient) and torch.equal(encoded.grad, encoded_gradient)


@pytest.mark.parametrize("shape, num_samples, hidden_size", SHAPES)
def test_stages_before_the_encoder_send_zeros_and_get_no_gradient_from_them(shape, num_samples, hidden_size):
    x, rows = randn(S, num_samples, hidden_size).requires_grad_(), boundary_rows(shape, num_samples, hidden_size)
    packed = pack(x, None, rows)
    assert packed.shape == pack(x, randn(*shape), rows).shape
    assert torch.equal(packed[:S], x) and (packed[S:] == 0).all()
    packed.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_retrieval_off_sends_the_hidden_states_alone():
    x = randn(S, 2, 5)
    assert pack(x, None, 0) is x
    assert unpack(x, S, None) == (x, None)


def test_a_shorter_encoder_output_fits_into_the_same_rows():
    """Batches differ in how many chunks read; the schedule takes one length."""
    x, encoded, rows = randn(S, 2, 17), randn(10, 4, 11), boundary_rows((10, 6, 11), 2, 17)
    packed = pack(x, encoded, rows)
    assert packed.shape == (S + rows, 2, 17)
    assert torch.equal(unpack(packed, S, encoded.shape)[1], encoded)


def test_an_encoder_output_that_does_not_fit_is_refused():
    with pytest.raises(AssertionError):
        pack(randn(S, 2, 17), randn(10, 6, 12), boundary_rows((10, 6, 11), 2, 17))


@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_schedule_is_told_the_length_that_stages_send(num_samples):
    model = make_model()
    length, width = model.retrieved_shape
    num_chunks, num_neighbors = 7, 3
    shape = (length, num_neighbors * num_samples * num_chunks, width)
    packed = pack(randn(35, num_samples, 26), randn(*shape), boundary_rows(shape, num_samples, 26))
    assert model.boundary_length(35, num_chunks, num_neighbors) == packed.shape[0]
    assert model.boundary_length(35, 0, num_neighbors) == 35
    sent = packed.to(model.config.pipeline_dtype)
    assert model.boundary_bytes(35, num_samples, num_chunks, num_neighbors) == sent.numel() * sent.element_size()
