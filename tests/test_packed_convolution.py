"""The packed convolution against its reference, on each backend."""

import keras
import numpy as np
import pytest
import torch
from agreement import assert_values_and_gradients
from gradients import value_and_grad
from keras import ops

from keras_mom.ops.packed_convolution import packed_convolution
from keras_mom_kernels.packed_convolution import reference
from keras_mom_kernels.packed_convolution.shapes import Case, make_inputs

CASES = (
    Case("keys", windows=True, heads=2),
    Case("queries", shared_projection=True, documents=3, heads=3),
    Case("values", E=10, documents=4, windows=True),
    Case("no-convolution", taps=0, activation=None, heads=2),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case):
    arrays = make_inputs(case)
    places = {n: x for n, x in arrays.items() if x.dtype == "int32"}
    floats = {n: x.astype("float32") for n, x in arrays.items() if n not in places}
    options = {"activation": case.activation, "heads": case.heads}
    filled = places["source"] >= 0
    random = np.random.default_rng(1)
    cotangent = random.normal(size=(*filled.shape, case.E)).astype("float32")

    def run(inputs, kernel=None):
        tensors = {n: ops.convert_to_tensor(x) for n, x in places.items()}
        rows = packed_convolution(inputs, kernel, **tensors, **options)
        # What an empty row holds is not defined.
        return (ops.where(ops.convert_to_tensor(filled)[..., None], rows, 0.0),)

    actual = value_and_grad(run, floats, [cotangent])
    leaves = {
        n: torch.tensor(x, dtype=torch.float64, requires_grad=True)
        for n, x in floats.items()
    }
    exact = {n: torch.tensor(x) for n, x in places.items() if n != "targets"}
    kernel = leaves.get("kernel")
    output = reference.packed_convolution(
        leaves["inputs"], kernel, **exact, **options, xp=torch
    )
    output.backward(torch.tensor(cotangent, dtype=torch.float64))
    # Rows that are taken nowhere are not a number, and have no gradient.
    gradients = {n: x.grad.numpy() for n, x in leaves.items() if x.grad is not None}
    expected = [output.detach().numpy()], gradients
    assert_values_and_gradients(actual, expected, "float32", ("output",))


if keras.backend.backend() == "torch":

    def test_a_cpu_has_no_kernel():
        arrays = {n: torch.tensor(x) for n, x in make_inputs(CASES[0]).items()}
        with pytest.raises(NotImplementedError, match="need a GPU"):
            packed_convolution(**arrays, implementation="triton")

    def test_the_kernels_take_what_the_operation_hands_them():
        pytest.importorskip("triton")
        inputs = make_inputs(CASES[1])
        arrays = {n: torch.tensor(x, device="meta") for n, x in inputs.items()}
        arrays["inputs"] = arrays["inputs"].to(torch.bfloat16)
        rows = packed_convolution(**arrays, heads=3, implementation="triton")
        assert rows.dtype == torch.bfloat16
        assert rows.shape == (*arrays["source"].shape, 24)
