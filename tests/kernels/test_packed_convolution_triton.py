"""The packed convolution's Triton kernels against the sums, without Keras.

In the interpreter, or on a GPU where there is one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from keras_mom_kernels.packed_convolution import reference
from keras_mom_kernels.packed_convolution.shapes import CASES, Case, make_inputs

pytest.importorskip("triton")

from keras_mom_kernels.packed_convolution import torch as convolution  # noqa: E402

packed_convolution = convolution.packed_convolution

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {
    "float32": (1e-5, 1e-4),
    "bfloat16": (5e-3, 1e-2),
    "float16": (5e-3, 1e-2),
}


def tensors_of(case):
    """The inputs of a case, rounded to its dtype, on the device."""
    dtype = getattr(torch, case.dtype)
    tensors = {}
    for name, array in make_inputs(case).items():
        tensor = torch.tensor(array)
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        tensors[name] = tensor.to(DEVICE)
    return tensors


def options_of(case):
    return {"activation": case.activation, "heads": case.heads}


def cotangent_of(tensors):
    """Random, and not a number in rows that are empty."""
    source = tensors["source"]
    shape = (*source.shape, tensors["inputs"].shape[-1])
    random = torch.Generator().manual_seed(0)
    cotangent = torch.randn(shape, generator=random).to(source.device)
    cotangent[source < 0] = float("nan")
    return cotangent.to(tensors["inputs"].dtype)


def with_gradients(function, tensors, cotangent, **options):
    """Output, and the gradients by name."""
    leaves = {
        name: x.detach().requires_grad_() if x.is_floating_point() else x
        for name, x in tensors.items()
    }
    kernel = leaves.pop("kernel", None)
    output = function(kernel=kernel, **leaves, **options)
    output.backward(cotangent.to(output))
    gradients = {"inputs": leaves["inputs"].grad}
    if kernel is not None:
        gradients["kernel"] = kernel.grad
    return output.detach(), gradients


def exact(tensors, cotangent, **options):
    """What the reference gives in float64."""
    wide = {
        name: x.cpu().double() if x.is_floating_point() else x.cpu()
        for name, x in tensors.items()
        if name != "targets"
    }
    return with_gradients(
        lambda **x: reference.packed_convolution(**x, xp=torch),
        wide,
        cotangent.cpu(),
        **options,
    )


def error(actual, expected):
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm().clamp(1e-300)).item()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_the_reference(case):
    tensors, options = tensors_of(case), options_of(case)
    cotangent = cotangent_of(tensors)
    output, gradients = with_gradients(
        packed_convolution, tensors, cotangent, **options
    )
    expected, expected_gradients = exact(tensors, cotangent, **options)
    value_tolerance, gradient_tolerance = TOLERANCES[case.dtype]
    assert output.dtype == tensors["inputs"].dtype
    assert error(output, expected) <= value_tolerance
    for name, y in expected_gradients.items():
        found = error(gradients[name], y)
        assert found <= gradient_tolerance, (name, found)


def test_programs_of_many_steps(monkeypatch):
    monkeypatch.setattr(convolution, "_MANY_ROWS", 1)
    case = Case("", B=2, T=80, E=20, documents=2, windows=True)
    tensors = tensors_of(case)
    cotangent = cotangent_of(tensors)
    _, gradients = with_gradients(packed_convolution, tensors, cotangent)
    _, expected = exact(tensors, cotangent)
    for name, y in expected.items():
        assert error(gradients[name], y) <= 1e-5, name


def test_batch_rows_and_runs_do_not_matter():
    case = Case("", T=40, documents=3, heads=2, windows=True)
    tensors = tensors_of(case)
    cotangent = cotangent_of(tensors)
    output, gradients = with_gradients(packed_convolution, tensors, cotangent, heads=2)
    again = with_gradients(packed_convolution, tensors, cotangent, heads=2)
    assert torch.equal(output, again[0])
    assert all(torch.equal(x, again[1][name]) for name, x in gradients.items())
    alone = {name: x if name == "kernel" else x[1:] for name, x in tensors.items()}
    output_alone, gradients_alone = with_gradients(
        packed_convolution, alone, cotangent[1:], heads=2
    )
    assert torch.equal(output[1:], output_alone)
    assert torch.equal(gradients["inputs"][1:], gradients_alone["inputs"])


@pytest.mark.parametrize("convolved", (False, True))
def test_the_operators_keep_their_promises_to_torch(convolved):
    case = Case("", B=1, T=5, E=16, documents=2, taps=4 if convolved else 0)
    tensors = tensors_of(case)
    inputs = torch.nan_to_num(tensors["inputs"]).requires_grad_()
    kernel = tensors.get("kernel")
    if kernel is not None:
        kernel.requires_grad_()
    places = [tensors[name] for name in ("source", "targets", "documents")]
    operator = torch.ops.keras_mom_kernels.packed_convolution.default
    arguments = (inputs, kernel, *places, convolved, 2, 1e-6)
    torch.library.opcheck(operator, arguments)


def test_what_no_kernel_serves_is_named():
    tensors = tensors_of(Case("", T=3))
    with pytest.raises(NotImplementedError, match="5 heads of 24"):
        packed_convolution(**tensors, heads=5)
    with pytest.raises(NotImplementedError, match="relu"):
        packed_convolution(**tensors, activation="relu")
    with pytest.raises(NotImplementedError, match="float64"):
        packed_convolution(**{**tensors, "inputs": tensors["inputs"].double()})


def test_no_rows_at_all():
    tensors = tensors_of(Case("", B=1, T=3, E=16))
    tensors["inputs"] = torch.ones_like(tensors["inputs"], requires_grad=True)
    tensors["source"] = tensors["source"][:, :0]
    tensors["targets"] = torch.full_like(tensors["targets"], -1)
    output = packed_convolution(**tensors)
    assert output.shape == (1, 0, 16)
    output.sum().backward()
    assert not tensors["inputs"].grad.any()


def report(*arguments):
    """What `offline_convolution.py` prints: a process without the interpreter."""
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = str(here.parents[1] / "kernels")
    script = str(here / "offline_convolution.py")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [line.split() for line in result.stdout.splitlines()]


def test_the_layer_on_hopper_spills_no_register():
    lines = report("cuda", "90", "1024", "8", "bfloat16")
    assert len(lines) == 3
    for name, registers, stack, vectors in lines:
        assert int(stack) == 0, (name, registers, stack)
        # 16 bytes a load.
        assert int(vectors) > 0, name


def test_another_chip():
    assert len(report("hip", "gfx942", "96", "3", "float32")) == 3
