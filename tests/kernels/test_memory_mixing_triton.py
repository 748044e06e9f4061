"""The memory mixing's Triton kernels against the float64 reference, without Keras.

In the interpreter, or on a GPU where there is one.
"""

import pytest
import torch

from keras_mom_kernels.memory_mixing import reference
from keras_mom_kernels.memory_mixing.shapes import CASES, Case, make_inputs

pytest.importorskip("triton")

from keras_mom_kernels.memory_mixing.torch import (  # noqa: E402
    memory_mixing,
    output_norm,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {
    "float32": (1e-5, 1e-4),
    "bfloat16": (5e-3, 1e-2),
    "float16": (5e-3, 1e-2),
}
DIFFERENTIABLE = ("outputs", "weights", "scale", "gate")


def tensors_of(case):
    """The inputs of a case, rounded to its dtype, on the device."""
    tensors = {}
    for name, array in make_inputs(case).items():
        tensor = torch.tensor(array if name == "targets" else array.astype("float32"))
        if name in ("outputs", "gate"):
            tensor = tensor.to(getattr(torch, case.dtype))
        tensors[name] = tensor.to(DEVICE)
    return tensors


def with_gradients(function, tensors, cotangent, **options):
    """The result, and the gradients by name."""
    leaves = {
        name: x.detach().requires_grad_() if name in DIFFERENTIABLE else x
        for name, x in tensors.items()
    }
    result = function(**leaves, **options)
    result.backward(cotangent.to(result))
    return result.detach(), {
        name: x.grad for name, x in leaves.items() if name in DIFFERENTIABLE
    }


def error(actual, expected):
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm().clamp(1e-300)).item()


def in_float64(tensors):
    """What the reference takes: float64, and 0 where the kernels read nothing."""
    tensors = {name: x.cpu() for name, x in tensors.items()}
    masked = (tensors["targets"] < 0).all(-1, keepdim=True)
    exact = {n: x if n == "targets" else x.double() for n, x in tensors.items()}
    for name in ("weights", "gate"):
        if name in exact:
            exact[name] = exact[name].masked_fill(masked, 0.0)
    return exact


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_the_reference(case):
    tensors = tensors_of(case)
    random = torch.Generator().manual_seed(0)
    shape = (case.B, case.T, case.H * case.V)
    cotangent = torch.randn(shape, generator=random)
    dtype = getattr(torch, case.dtype)
    cotangent = cotangent.to(dtype).to(DEVICE)
    actual, gradients = with_gradients(memory_mixing, tensors, cotangent, dtype=dtype)
    expected, exact = with_gradients(
        reference.memory_mixing, in_float64(tensors), cotangent, xp=torch
    )
    assert actual.dtype == dtype
    value_tolerance, gradient_tolerance = TOLERANCES[case.dtype]
    assert error(actual, expected) <= value_tolerance
    assert gradients.keys() == exact.keys()
    for name, y in exact.items():
        x = gradients[name]
        assert x.dtype == tensors[name].dtype
        found = error(x, y)
        assert found <= gradient_tolerance, (name, found)


def test_result_and_inputs_of_different_dtypes():
    tensors = tensors_of(Case("", dtype="bfloat16"))
    tensors["gate"] = tensors["gate"].float()
    tensors["scale"] = tensors["scale"].bfloat16()
    expected = reference.memory_mixing(**in_float64(tensors), xp=torch)
    result = memory_mixing(**tensors, dtype=torch.float32)
    assert result.dtype == torch.float32
    assert error(result, expected) <= 1e-5


@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("shape", ((3, 1, 2, 16), (2, 5, 3, 20)))
def test_what_is_read_already(shape, gated):
    batch, length, heads, width = shape
    random = torch.Generator().manual_seed(0)
    mixed = torch.randn(shape, generator=random).to(DEVICE)
    gate = torch.randn(batch, length, heads * width, generator=random).to(DEVICE)
    scale = torch.rand(width, generator=random).to(DEVICE)
    cotangent = torch.randn(gate.shape, generator=random).to(DEVICE)
    leaves = [mixed, scale, *[gate] * gated]
    exact = [x.double().requires_grad_() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    result = output_norm(*leaves, epsilon=0.1, dtype=torch.float32)
    rows = exact[0]
    normalized = rows / (rows.square().mean(-1, keepdim=True) + 0.1).sqrt()
    expected = (normalized * exact[1]).reshape(gate.shape)
    if gated:
        expected = expected * torch.nn.functional.silu(exact[2])
    assert error(result.detach(), expected.detach()) <= 1e-6
    found = torch.autograd.grad(result, leaves, cotangent)
    for x, y in zip(found, torch.autograd.grad(expected, exact, cotangent.double())):
        assert error(x, y) <= 1e-6


def test_epsilon():
    tensors = tensors_of(Case("", T=3))
    expected = reference.memory_mixing(**in_float64(tensors), epsilon=2.0, xp=torch)
    result = memory_mixing(**tensors, epsilon=2.0, dtype=torch.float32)
    assert error(result, expected) <= 1e-5


def test_batch_rows_and_runs_do_not_matter():
    tensors = tensors_of(Case("", B=3, T=41, R=130, masked=0.2))
    cotangent = torch.randn(3, 41, 32, device=DEVICE)

    def run(rows):
        mine = {n: x if n == "scale" else x[rows] for n, x in tensors.items()}
        result = with_gradients(
            memory_mixing, mine, cotangent[rows], dtype=torch.float32
        )
        return {"result": result[0], **result[1]}

    together, again, alone = run(slice(None)), run(slice(None)), run(slice(1, 2))
    for name, x in together.items():
        assert torch.equal(x, again[name]), name
        if name != "scale":
            assert torch.equal(x[1:2], alone[name]), name


@pytest.mark.parametrize("gated", (False, True))
def test_the_operators_keep_their_promises_to_torch(gated):
    tensors = tensors_of(Case("", T=5, masked=0.3, gated=gated))
    tensors = {n: x if n == "targets" else x.nan_to_num() for n, x in tensors.items()}
    for name in DIFFERENTIABLE:
        if name in tensors:
            tensors[name].requires_grad_()
    names = ("outputs", "weights", "targets", "scale", "gate")
    arguments = [tensors.get(name) for name in names]
    operator = torch.ops.keras_mom_kernels.memory_mixing.default
    torch.library.opcheck(operator, (*arguments, 1e-6, torch.float32))


def test_what_no_kernel_serves_is_named():
    tensors = tensors_of(Case("", T=2))
    with pytest.raises(NotImplementedError, match="up to 1024"):
        wide = {**tensors, "outputs": torch.zeros(2, 9, 1, 1025, device=DEVICE)}
        memory_mixing(**wide, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="float64"):
        memory_mixing(**tensors, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="1 weights and 3 rows"):
        few = {**tensors, "weights": tensors["weights"][..., :1]}
        memory_mixing(**few, dtype=torch.float32)


@pytest.mark.parametrize("batch, length", ((0, 3), (2, 0)))
def test_no_tokens_at_all(batch, length):
    tensors = tensors_of(Case("", T=3))
    few = {
        n: x if n == "scale" else x[:batch] if n == "outputs" else x[:batch, :length]
        for n, x in tensors.items()
    }
    cotangent = torch.zeros(batch, length, 32, device=DEVICE)
    result, gradients = with_gradients(
        memory_mixing, few, cotangent, dtype=torch.float32
    )
    assert result.shape == (batch, length, 32)
    for name, x in gradients.items():
        assert x.shape == few[name].shape and not x.any(), name
