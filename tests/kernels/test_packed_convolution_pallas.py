"""The packed convolution's Pallas kernels against the sums, without Keras.

They run in Pallas' interpreter, and are lowered for GPUs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from keras_mom_kernels.packed_convolution import jax as convolution
from keras_mom_kernels.packed_convolution import pallas_rows, reference
from keras_mom_kernels.packed_convolution.shapes import CASES, Case, make_inputs

TOLERANCES = {
    "float32": (1e-5, 1e-4),
    "bfloat16": (5e-3, 1e-2),
    "float16": (5e-3, 1e-2),
}
# The kernels have a convolution; without one XLA takes the rows. The inputs' dtype
# changes only what is loaded and stored.
CONVOLVED = [
    case for case in CASES if case.taps and not case.name.startswith("bfloat16-")
]

packed_convolution = functools.partial(convolution.packed_convolution, interpret=True)


def arrays_of(case):
    """The arguments of a case, rounded to its dtype, and those in float64."""
    arrays = make_inputs(case)
    rounded = {
        name: jnp.asarray(x, case.dtype if x.dtype == float else "int32")
        for name, x in arrays.items()
    }
    return rounded, {
        name: np.asarray(rounded[name], "float64") if x.dtype == float else x
        for name, x in arrays.items()
    }


def cotangent_of(arrays):
    """Random, and not a number in rows that are empty."""
    source = np.asarray(arrays["source"])
    shape = (*source.shape, arrays["inputs"].shape[-1])
    cotangent = np.random.default_rng(0).normal(size=shape)
    cotangent[source < 0] = np.nan
    return jnp.asarray(cotangent, arrays["inputs"].dtype)


def with_gradients(arrays, cotangent, **options):
    floats = {name: arrays[name] for name in ("inputs", "kernel")}
    rest = {name: x for name, x in arrays.items() if name not in floats}

    @jax.jit
    def both(floats, rest, cotangent):
        output, pull = jax.vjp(
            lambda x: packed_convolution(**x, **rest, **options), floats
        )
        return output, pull(cotangent)[0]

    return both(floats, rest, cotangent)


def exact(arrays, cotangent, **options):
    """What the reference gives in float64."""
    import torch

    leaves = {
        name: torch.tensor(x, requires_grad=x.dtype == float)
        for name, x in arrays.items()
        if name != "targets"
    }
    output = reference.packed_convolution(**leaves, **options, xp=torch)
    output.backward(torch.tensor(np.asarray(cotangent, "float64")))
    gradients = {name: leaves[name].grad.numpy() for name in ("inputs", "kernel")}
    return output.detach().numpy(), gradients


def error(actual, expected):
    actual = np.asarray(actual, "float64")
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-300)


@pytest.mark.parametrize("case", CONVOLVED, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_the_reference(case):
    arrays, wide = arrays_of(case)
    options = dict(activation=case.activation, heads=case.heads)
    cotangent = cotangent_of(arrays)
    output, gradients = with_gradients(arrays, cotangent, **options)
    expected, expected_gradients = exact(wide, cotangent, **options)
    value_tolerance, gradient_tolerance = TOLERANCES[case.dtype]
    assert output.dtype == arrays["inputs"].dtype
    assert error(output, expected) <= value_tolerance
    for name, y in expected_gradients.items():
        assert error(gradients[name], y) <= gradient_tolerance, name


def test_programs_of_many_steps(monkeypatch):
    monkeypatch.setattr(pallas_rows, "_MANY_ROWS", 1)
    fresh = functools.cache(convolution._function.__wrapped__)
    monkeypatch.setattr(convolution, "_function", fresh)
    arrays, wide = arrays_of(Case("", B=2, T=80, E=20, documents=2, windows=True))
    cotangent = cotangent_of(arrays)
    _, gradients = with_gradients(arrays, cotangent)
    _, expected = exact(wide, cotangent)
    for name, y in expected.items():
        assert error(gradients[name], y) <= 1e-5, name


def test_vmap_maps_by_batch_rows():
    arrays, _ = arrays_of(Case("", B=2, T=9, E=16, heads=2))
    kernel = arrays.pop("kernel")
    whole = packed_convolution(kernel=kernel, **arrays, heads=2)
    parts = {name: x[:, None] for name, x in arrays.items()}
    mapped = jax.vmap(lambda x: packed_convolution(kernel=kernel, **x, heads=2))
    np.testing.assert_array_equal(mapped(parts)[:, 0], whole)


@pytest.mark.parametrize("platform", ("cuda", "rocm"))
def test_kernels_are_lowered(platform):
    def loss(inputs, kernel, *places):
        x, y = (
            convolution.packed_convolution(inputs, kernel * n, *places, heads=8)
            for n in (1, 2)
        )
        return jnp.sum((x * y).astype("float32"))

    shapes = [
        jax.ShapeDtypeStruct((2, 128, 1024), "bfloat16"),
        jax.ShapeDtypeStruct((4, 1024), "bfloat16"),
        jax.ShapeDtypeStruct((2, 192), "int32"),
        jax.ShapeDtypeStruct((2, 128, 2), "int32"),
    ]
    chips = {"cuda": "NVIDIA H100", "rocm": "AMD Instinct MI300X"}
    device = jax.sharding.AbstractDevice(
        device_kind=chips[platform], num_cores=None, platform="gpu"
    )
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*shapes)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    for name in ("convolve", "sum_gradients", "input_gradients"):
        assert name in text
    # Each once for both calls.
    assert text.count("__gpu$xla.gpu.triton") == 3


def test_what_no_kernel_serves_is_named():
    arrays, _ = arrays_of(Case("", T=3))
    with pytest.raises(NotImplementedError, match="5 heads of 24"):
        packed_convolution(**arrays, heads=5)
    with pytest.raises(NotImplementedError, match="relu"):
        packed_convolution(**arrays, activation="relu")
    with pytest.raises(NotImplementedError, match="int32"):
        packed_convolution(**{**arrays, "inputs": arrays["source"][..., None]})
