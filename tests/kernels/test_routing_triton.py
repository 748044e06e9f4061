"""The routing's Triton kernels against the float64 reference, without Keras."""

import numpy as np
import pytest
import torch

from keras_mom_kernels.routing import reference

pytest.importorskip("triton")

from keras_mom_kernels.routing.torch import (  # noqa: E402
    project_and_route,
    route,
    routing_statistics,
)

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


PROJECTED = (
    (2, 9, 24, 4, 2),
    (1, 260, 130, 5, 3),
    (3, 7, 16, 1, 1),
    (1, 3, 257, 16, 4),
)


def draw_projected(batch, length, width, memories, dtype=torch.float32):
    inputs = draw(batch, length, width).to(dtype)
    kernel = draw(1, width, memories, 1)[0] * width**-0.5
    return inputs.requires_grad_(), kernel.requires_grad_()


@pytest.mark.parametrize(
    "sizes, dtype",
    [
        *((sizes, torch.float32) for sizes in PROJECTED),
        *((PROJECTED[0], dtype) for dtype in (torch.bfloat16, torch.float16)),
        (PROJECTED[-1], torch.bfloat16),
    ],
)
def test_projected_routing(sizes, dtype):
    batch, length, width, memories, top_k = sizes
    inputs = draw_projected(batch, length, width, memories, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    probabilities, weights, indices = project_and_route(*inputs, top_k)
    all_of_them = (exact[0] @ exact[1]).softmax(-1)
    expected = reference.route(all_of_them.detach().cpu().numpy(), top_k)
    np.testing.assert_array_equal(indices.cpu(), expected.indices)
    picked = all_of_them.gather(-1, indices.long())
    wanted = all_of_them, picked / picked.sum(-1, keepdim=True)
    for x, y in zip((probabilities, weights), wanted):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=1e-9)
    grads = draw(batch, length, memories, 2), draw(batch, length, top_k, 3)
    actual = torch.autograd.grad((probabilities, weights), inputs, grads)
    grads = [x.double() for x in grads]
    rounding = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    limits = rounding, 1e-5
    for x, y, limit in zip(actual, torch.autograd.grad(wanted, exact, grads), limits):
        assert ((x - y).norm() / y.norm().clamp(1e-2)).item() <= limit


def test_projected_tokens_do_not_depend_on_each_other():
    inputs, kernel = draw_projected(2, 21, 130, 4)
    together = project_and_route(inputs, kernel, 2)
    for t in (0, 13, 20):
        # A tensor of its own, as aligned as the first: that decides on the sums' order.
        token = inputs[1:, t : t + 1].clone()
        alone = project_and_route(token, kernel, 2)
        assert all(torch.equal(x[1:, t : t + 1], y) for x, y in zip(together, alone))


def test_the_projection_keeps_its_promises_to_torch():
    operator = torch.ops.keras_mom_kernels.project_and_route.default
    torch.library.opcheck(operator, (*draw_projected(2, 3, 5, 4), 2))


def test_projections_no_kernel_serves():
    inputs, kernel = draw_projected(1, 2, 8, 17)
    with pytest.raises(NotImplementedError, match="17"):
        project_and_route(inputs, kernel, 2)
    with pytest.raises(NotImplementedError, match="float64"):
        project_and_route(inputs.double(), kernel[:, :4], 2)
    empty = project_and_route(inputs[:, :0], kernel[:, :4], 2)
    assert [x.shape for x in empty] == [(1, 0, 4)] + [(1, 0, 2)] * 2


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


# One program; programs whose sums are added; many memories in several programs.
STATISTICS = ((2, 9, 4, 2), (1, 1, 5, 3), (2, 2100, 3, 1), (17, 1100, 2, 2))
STATISTICS += ((1, 1030, 130, 2),)


def draw_routing(batch, length, memories, top_k, masked):
    """Probabilities, indices and mask; masked tokens hold no numbers."""
    # The interpreter takes a program for each few tokens of a routing.
    probabilities = draw(batch, length, memories).softmax(-1)
    indices = probabilities.topk(top_k).indices.int()
    if not masked:
        return probabilities, indices, None
    mask = draw(batch, length, 1, 3)[..., 0] > -0.3
    return probabilities.masked_fill(~mask[..., None], float("nan")), indices, mask


def exact_statistics(probabilities, indices, mask):
    """Differentiable entropy and balance loss of the valid tokens."""
    memories, top_k = probabilities.shape[-1], indices.shape[-1]
    valid = slice(None) if mask is None else mask
    p, chosen = probabilities[valid].reshape(-1, memories), indices[valid].long()
    fraction = torch.bincount(chosen.flatten(), minlength=memories) / len(p)
    loss = memories * (fraction.double() * p.mean(0)).sum() / top_k
    return -(p * p.log()).sum(-1).mean(), loss


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("sizes", STATISTICS)
def test_statistics(sizes, masked):
    *_, memories, top_k = sizes
    probabilities, indices, mask = draw_routing(*sizes, masked)
    found = routing_statistics(probabilities, indices, mask)
    exact = probabilities.double()
    entropy, loss = exact_statistics(exact, indices, mask)
    chosen = indices if mask is None else indices[mask]
    counts = torch.bincount(chosen.flatten().long(), minlength=memories)
    torch.testing.assert_close(found.share.double(), counts / counts.sum().double())
    assert found.entropy.item() == pytest.approx(entropy.item(), rel=1e-6)
    assert found.balance_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    again = routing_statistics(probabilities, indices, mask)
    assert all(torch.equal(x, y) for x, y in zip(found, again))


def test_statistics_are_those_of_the_reference():
    probabilities, indices, mask = draw_routing(2, 30, 5, 2, True)
    found = routing_statistics(probabilities, indices, mask)
    p = probabilities.double().cpu().numpy()
    expected = reference.route(p, 2, mask.cpu().numpy())
    np.testing.assert_allclose(found.share.cpu(), expected.share, rtol=1e-6)
    assert found.entropy.item() == pytest.approx(expected.entropy, rel=1e-6)
    assert found.balance_loss.item() == pytest.approx(expected.balance_loss, rel=1e-6)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("of", ("entropy", "balance_loss", "both"))
@pytest.mark.parametrize("sizes", STATISTICS[:3])
def test_gradients_of_statistics(sizes, of, masked):
    probabilities, indices, mask = draw_routing(*sizes, masked)
    probabilities.requires_grad_()
    exact = probabilities.detach().double().requires_grad_()
    factors = {"entropy": (1.5, 0), "balance_loss": (0, 0.7), "both": (1.5, 0.7)}[of]
    names = [
        name for name, factor in zip(("entropy", "balance_loss"), factors) if factor
    ]
    found = routing_statistics(probabilities, indices, mask)
    loss = sum(f * getattr(found, n) for n, f in zip(names, filter(None, factors)))
    (actual,) = torch.autograd.grad(loss, probabilities)
    loss = sum(f * x for f, x in zip(factors, exact_statistics(exact, indices, mask)))
    (expected,) = torch.autograd.grad(loss, exact)
    assert ((actual - expected).norm() / expected.norm()).item() <= 1e-6
    if masked:
        assert not actual[~mask].any()


def test_statistics_of_impossible_memories_and_of_no_tokens():
    probabilities = torch.tensor([[[1.0, 0.0, 0.0]]], device=DEVICE)
    probabilities.requires_grad_()
    indices = torch.tensor([[[0, 1]]], device=DEVICE, dtype=torch.int32)
    found = routing_statistics(probabilities, indices)
    assert found.entropy.item() == 0 and found.share.tolist() == [0.5, 0.5, 0]
    (grad,) = torch.autograd.grad(found.entropy, probabilities)
    assert grad.tolist() == [[[-1.0, *[pytest.approx(-np.log(1e-30))] * 2]]]
    mask = torch.zeros((1, 1), dtype=torch.bool, device=DEVICE)
    for found in (
        routing_statistics(probabilities, indices, mask),
        routing_statistics(probabilities[:, :0], indices[:, :0]),
    ):
        assert not found.share.any()
        assert found.entropy.item() == 0 and found.balance_loss.item() == 0


def test_the_statistics_operator_keeps_its_promises_to_torch():
    probabilities, indices, _ = draw_routing(2, 3, 4, 2, False)
    mask = draw(2, 3, 1)[..., 0] > 0
    operator = torch.ops.keras_mom_kernels.routing_statistics.default
    torch.library.opcheck(operator, (probabilities.requires_grad_(), indices, mask))


def test_statistics_no_kernel_serves():
    probabilities, indices, _ = draw_routing(1, 2, 4, 2, False)
    with pytest.raises(NotImplementedError, match="float64"):
        routing_statistics(probabilities.double(), indices)
