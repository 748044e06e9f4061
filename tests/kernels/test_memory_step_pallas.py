"""The step of a token on JAX against the recurrence, without Keras.

The kernel of GPUs runs in Pallas' interpreter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keras_mom_kernels.memory_step import reference
from keras_mom_kernels.memory_step.jax import memory_step
from keras_mom_kernels.memory_step.shapes import STEP_CASES, make_state, make_tokens

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
