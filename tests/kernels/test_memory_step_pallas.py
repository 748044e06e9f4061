"""The operations of a token on JAX against the recurrence, without Keras.

The kernels of GPUs run in Pallas' interpreter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keras_mom_kernels.memory_step import reference
from keras_mom_kernels.memory_step.jax import convolution_step, memory_step
from keras_mom_kernels.memory_step.shapes import (
    CONVOLUTION_CASES,
    STEP_CASES,
    make_state,
    make_tokens,
)

TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}
ROWS = ("query", "key", "value", "log_decay", "beta")
KERNELS = ("gpu", "tpu")


def step_tensors(case, token):
    """A token's arguments of `memory_step`, rounded to the case's dtype."""
    return {
        name: jnp.asarray(x)
        if x.dtype == bool
        else jnp.asarray(x, case.dtype if name in ROWS else "float32")
        for name, x in token.items()
        if name != "projected"
    }


def exact(tensors):
    """As NumPy takes them, in float64."""
    return {
        name: np.asarray(x) if x.dtype == bool else np.asarray(x, "float64")
        for name, x in tensors.items()
    }


def error(actual, expected):
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-300)


def step_of(case, kernels):
    return functools.partial(memory_step, **case.rule, kernels=kernels, interpret=True)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case.name)
def test_steps_are_those_of_the_recurrence(case, kernels):
    expected = make_state(case)[0]
    actual = jnp.asarray(expected, "float32")
    expected = np.asarray(actual, "float64")
    step = jax.jit(step_of(case, kernels))
    for token in make_tokens(case):
        tensors = step_tensors(case, token)
        output, actual = step(**tensors, state=actual)
        mixed, expected = reference.memory_step(
            **exact(tensors), state=expected, **case.rule
        )
        assert output.dtype == actual.dtype == jnp.float32
        assert error(output, mixed) <= TOLERANCES[case.dtype]
        assert error(actual, expected) <= TOLERANCES[case.dtype]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", STEP_CASES[4:6], ids=lambda case: case.name)
def test_inactive_memories_are_left_alone(case, kernels):
    token = step_tensors(case, make_tokens(case)[0])
    state = jnp.asarray(make_state(case)[0], "float32")
    idle = ~np.asarray(token["active"])
    assert idle.any() and not idle.all()

    def poisoned(x):
        there = idle.reshape(*idle.shape, *[1] * (x.ndim - 2))
        return x if x.dtype == bool else jnp.where(there, jnp.nan, x)

    step = step_of(case, kernels)
    expected, after = step(**token, state=state)
    token = {name: poisoned(x) for name, x in token.items()}
    output, poisoned_after = step(**token, state=poisoned(state))
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_array_equal(poisoned_after[~idle], after[~idle])
    np.testing.assert_array_equal(after[idle], state[idle])


def test_the_kernel_has_the_gradient_of_the_products():
    case = STEP_CASES[4]
    token = step_tensors(case, make_tokens(case)[0])
    active = token.pop("active")
    token["state"] = jnp.asarray(make_state(case)[0], "float32")

    def gradients(kernels):
        def loss(floats):
            output, state = step_of(case, kernels)(**floats, active=active)
            return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(state))

        return jax.jit(jax.grad(loss))(token)

    for name, gradient in gradients("gpu").items():
        assert error(gradient, gradients("tpu")[name]) <= 1e-6, name
        assert np.linalg.norm(gradient) > 0


def convolution_of(case, platform):
    return functools.partial(
        convolution_step, **case.how, platform=platform, interpret=True
    )


def convolution_tensors(case, token):
    """Inputs of the token, and the convolution's kernels, of the case's dtype."""
    _, kernels, _ = make_state(case)
    inputs = [jnp.asarray(x, case.dtype) for x in token["projected"]]
    if kernels is not None:
        kernels = [jnp.asarray(x, case.dtype) for x in kernels]
    return inputs, kernels


@pytest.mark.parametrize("platform", KERNELS)
@pytest.mark.parametrize("case", CONVOLUTION_CASES, ids=lambda case: case.name)
def test_windows_and_rows_are_those_of_the_convolution(case, platform):
    window = make_state(case)[2]
    actual = None if window is None else jnp.asarray(window, "float32")
    expected = None if window is None else np.asarray(actual, "float64")
    step = jax.jit(convolution_of(case, platform))
    for token in make_tokens(case)[:3]:
        inputs, kernels = convolution_tensors(case, token)
        *rows, actual = step(*inputs, kernels, actual, jnp.asarray(token["active"]))
        *exact_rows, expected = reference.convolution_step(
            *(np.asarray(x, "float64") for x in inputs),
            None if kernels is None else [np.asarray(x, "float64") for x in kernels],
            expected,
            token["active"],
            **case.how,
        )
        for x, y in zip(rows, exact_rows, strict=True):
            assert x.dtype == jnp.float32
            assert error(x, y) <= 1e-5
        if window is None:
            assert actual is None
        else:
            # Nothing is computed on the way into a window.
            np.testing.assert_array_equal(actual, expected.astype("float32"))


@pytest.mark.parametrize("platform", KERNELS)
def test_windows_of_inactive_memories_are_left_alone(platform):
    case = CONVOLUTION_CASES[0]
    token = make_tokens(case)[0]
    inputs, kernels = convolution_tensors(case, token)
    window = jnp.asarray(make_state(case)[2], "float32")
    active = jnp.asarray(token["active"])
    idle = ~token["active"]
    assert idle.any() and not idle.all()
    step = convolution_of(case, platform)
    *rows, after = step(*inputs, kernels, window, active)
    poison = jnp.where(idle[..., None, None], jnp.nan, window)
    *poisoned_rows, poisoned = step(*inputs, kernels, poison, active)
    for x, y in zip(rows, poisoned_rows):
        np.testing.assert_array_equal(x, y)
        assert not np.any(np.asarray(x)[idle])
    np.testing.assert_array_equal(np.asarray(after)[idle], np.asarray(window)[idle])
    assert np.isnan(np.asarray(poisoned)[idle]).all()
    assert not np.isnan(np.asarray(poisoned)[~idle]).any()


def test_the_convolution_has_the_gradient_of_the_sums():
    case = CONVOLUTION_CASES[0]
    token = make_tokens(case)[0]
    inputs, kernels = convolution_tensors(case, token)
    tensors = (*inputs, kernels, jnp.asarray(make_state(case)[2], "float32"))

    def gradients(platform):
        def loss(tensors):
            results = convolution_of(case, platform)(*tensors, token["active"])
            return sum(jnp.sum(jnp.sin(x)) for x in results)

        return jax.tree.leaves(jax.jit(jax.grad(loss))(tensors))

    for ours, plain in zip(gradients("gpu"), gradients("tpu"), strict=True):
        assert error(ours, plain) <= 1e-6
        assert np.linalg.norm(ours) > 0


def test_a_window_comes_with_its_kernels():
    case = CONVOLUTION_CASES[0]
    token = make_tokens(case)[0]
    inputs, kernels = convolution_tensors(case, token)
    with pytest.raises(ValueError, match="`kernels` and `window`"):
        convolution_of(case, "gpu")(*inputs, kernels, None, token["active"])


@pytest.mark.parametrize("platform", ("cuda", "rocm"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_kernels_are_lowered(platform, dtype):
    case = CONVOLUTION_CASES[1]._replace(dtype=dtype)
    token = make_tokens(case)[0]
    inputs, kernels = convolution_tensors(case, token)
    window = jnp.asarray(make_state(case)[2], "float32")
    step = functools.partial(convolution_step, **case.how, platform="gpu")
    case = STEP_CASES[4]._replace(dtype=dtype)
    tensors = step_tensors(case, make_tokens(case)[0])
    state = jnp.asarray(make_state(case)[0], "float32")
    memories = functools.partial(memory_step, kernels="gpu", state=state)
    for traced in (
        jax.jit(step).trace(*inputs, kernels, window, jnp.asarray(token["active"])),
        jax.jit(memories).trace(**tensors),
    ):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("__gpu$xla.gpu.triton") == 1
