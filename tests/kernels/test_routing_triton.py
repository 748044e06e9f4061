"""The routing's Triton kernels against the float64 reference, without Keras."""

import numpy as np
import pytest
import torch

from keras_mom_kernels.routing import reference

pytest.importorskip("triton")

from keras_mom_kernels.routing.torch import route  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = ((2, 9, 4, 2), (1, 300, 5, 3), (3, 7, 1, 1), (2, 5, 6, 6), (1, 3, 130, 8))


def draw(batch, length, memories, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, memories, generator=random).to(DEVICE)


@pytest.mark.parametrize("batch, length, memories, top_k", SIZES)
def test_routing_is_that_of_the_reference(batch, length, memories, top_k):
    logits = draw(batch, length, memories)
    probabilities, weights, indices = route(logits, top_k)
    exact = reference.softmax(logits.double().cpu().numpy())
    expected = reference.route(exact, top_k)
    assert indices.dtype == torch.int32
    np.testing.assert_array_equal(indices.cpu(), expected.indices)
    np.testing.assert_allclose(probabilities.cpu(), exact, rtol=1e-5)
    np.testing.assert_allclose(weights.cpu(), expected.weights, rtol=1e-5)


@pytest.mark.parametrize("batch, length, memories, top_k", SIZES)
@pytest.mark.parametrize("of", ("probabilities", "weights", "both"))
def test_gradients(batch, length, memories, top_k, of):
    logits = draw(batch, length, memories).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    grads = draw(batch, length, memories, 1), draw(batch, length, top_k, 2)

    def gradient(x, probabilities, weights):
        loss = 0
        if of != "weights":
            loss = loss + (probabilities * grads[0]).sum()
        if of != "probabilities":
            loss = loss + (weights * grads[1]).sum()
        loss.backward()
        return x.grad

    probabilities, weights, indices = route(logits, top_k)
    actual = gradient(logits, probabilities, weights)
    probabilities = exact.softmax(-1)
    picked = probabilities.gather(-1, indices.long())
    weights = picked / picked.sum(-1, keepdim=True)
    expected = gradient(exact, probabilities, weights)
    # Of one memory, or all of them, some gradients are zero.
    scale = expected.norm().clamp(1e-2)
    assert ((actual - expected).norm() / scale).item() <= 1e-5


def test_ties_go_to_the_lowest_index():
    logits = torch.tensor(
        [[[1.0, 2.0, 2.0, 1.0, 1.0], [0.0] * 5, [-200.0, 0.0, -200.0, -200.0, 0.0]]]
    )
    _, _, indices = route(logits.to(DEVICE), 3)
    assert indices.tolist() == [[[1, 2, 0], [0, 1, 2], [1, 4, 0]]]


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_no_number_goes_to_the_first_memories(value):
    logits = draw(1, 3, 5)
    logits[0, 1, 3] = value
    probabilities, weights, indices = route(logits, 2)
    assert indices[0, 1].tolist() == [0, 1]
    assert weights[0, 1].isnan().all() and probabilities[0, 1].isnan().all()
    others = [0, 2]
    assert weights[0, others].isfinite().all()
    alone = route(logits[:, others], 2)
    assert torch.equal(alone[2], indices[:, others])


def test_the_operator_keeps_its_promises_to_torch():
    logits = draw(2, 3, 4).requires_grad_()
    operator = torch.ops.keras_mom_kernels.route.default
    torch.library.opcheck(operator, (logits, 2))


def test_no_tokens_and_what_no_kernel_serves():
    assert [x.shape for x in route(draw(2, 0, 4), 2)] == [(2, 0, 4)] + [(2, 0, 2)] * 2
    with pytest.raises(NotImplementedError, match="float64"):
        route(draw(1, 2, 4).double(), 2)
    with pytest.raises(NotImplementedError, match="1025"):
        route(draw(1, 2, 1025), 2)
