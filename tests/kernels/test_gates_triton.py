"""The gates' Triton kernels against the float64 reference, without Keras."""

import pytest
import torch

from keras_mom_kernels.gates import reference

pytest.importorskip("triton")

from keras_mom_kernels.gates.torch import decay_and_write_strength  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((2, 9, 4), (3, 5, 1), (1, 700, 3), (2, 2100, 8), (7, 24))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(shape, dtype=torch.float32, seed=0):
    """Inputs of the operation, among them some far from 0."""
    random = torch.Generator().manual_seed(seed)
    decay, strength = (torch.randn(shape, generator=random) * 8 for _ in range(2))
    decay.view(-1)[:3] = torch.tensor([-60.0, 60.0, -15.0])
    bias, rate = (torch.randn(shape[-1], generator=random) for _ in range(2))
    tensors = decay.to(dtype), strength.to(dtype), bias, rate
    return [x.to(DEVICE).requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients(shape, dtype):
    inputs = draw(shape, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = decay_and_write_strength(*inputs)
    expected = reference.decay_and_write_strength(*exact, xp=torch)
    for x, y in zip(results, expected):
        assert x.dtype == torch.float32
        # exp(x) is only good to x times the rounding of x, and x is up to 60.
        torch.testing.assert_close(x.double(), y, rtol=60 * 2**-23, atol=0)
    random = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=random).to(DEVICE) for _ in range(2)]
    actual = torch.autograd.grad(results, inputs, grads)
    wanted = torch.autograd.grad(expected, exact, [x.double() for x in grads])
    rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for x, y, limit in zip(actual, wanted, (rounding, rounding, 1e-6, 1e-6)):
        assert ((x - y).norm() / y.norm()).item() <= limit


def test_rows_without_a_gradient_may_hold_anything():
    inputs = draw((2, 5, 3))
    with torch.no_grad():
        for x in inputs[:2]:
            x[0, 2] = float("nan")
            x[1, 1] = float("inf")
    grads = [torch.ones(2, 5, 3, device=DEVICE) for _ in range(2)]
    for grad in grads:
        grad[0, 2] = grad[1, 1] = 0
    found = torch.autograd.grad(decay_and_write_strength(*inputs), inputs, grads)
    assert all(x.isfinite().all() for x in found)
    assert not any(x[0, 2].any() or x[1, 1].any() for x in found[:2])
    kept = [x.detach().reshape(10, 3)[[0, 1, 3, 4, 5, 7, 8, 9]] for x in inputs[:2]]
    kept = [x.requires_grad_() for x in kept]
    results = decay_and_write_strength(*kept, *inputs[2:])
    alone = torch.autograd.grad(results, inputs[2:], [torch.ones_like(x) for x in kept])
    for x, y in zip(found[2:], alone):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_the_operator_keeps_its_promises_to_torch():
    operator = torch.ops.keras_mom_kernels.decay_and_write_strength.default
    torch.library.opcheck(operator, tuple(draw((2, 3, 4))))


def test_no_rows_and_what_no_kernel_serves():
    empty = draw((2, 3, 4))
    empty[0], empty[1] = (x.detach()[:, :0].requires_grad_() for x in empty[:2])
    results = decay_and_write_strength(*empty)
    assert [x.shape for x in results] == [(2, 0, 4)] * 2
    grads = torch.autograd.grad(results, empty, list(results))
    assert not grads[2].any() and not grads[3].any()
    decay, strength, bias, rate = draw((2, 3, 4))
    with pytest.raises(NotImplementedError, match="decay of torch.float64"):
        decay_and_write_strength(decay.double(), strength, bias, rate)
    with pytest.raises(NotImplementedError, match="a_log is float32"):
        decay_and_write_strength(decay, strength, bias, rate.half())
    with pytest.raises(NotImplementedError, match="1025"):
        decay_and_write_strength(*draw((2, 1025)))
