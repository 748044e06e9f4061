"""Loops, hand-written gradients and device facts on JAX."""

from typing import Any

import jax
import keras
from jax.core import Tracer

softplus = keras.ops.softplus


def scan(step, carry, length, shapes, reverse=False):
    """See `keras_mom.backend`."""
    del shapes  # JAX traces `step`.
    # Of JAX' integers, as the Python numbers beside it are: 64 bits where asked for.
    carry, outputs = jax.lax.scan(
        step, carry, jax.numpy.arange(length), reverse=reverse
    )

    def joined(x):
        x = jax.numpy.swapaxes(x, 0, 1)
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])

    return carry, tuple(joined(x) for x in outputs)


class Differentiable:
    """See `keras_mom.backend`."""

    def __init__(self, name, forward, backward, infer, make_options: Any = tuple):
        del infer, make_options  # JAX traces `forward`.
        self.name = name
        self.forward = forward
        self.backward = backward
        self._functions = {}

    def __call__(self, options, *tensors) -> Any:
        if options not in self._functions:
            self._functions[options] = self._make_function(options)
        return self._functions[options](*tensors)

    def _make_function(self, options):
        def primal(*tensors):
            return tuple(self.forward(options, *tensors))

        def forward(*tensors):
            outputs = primal(*tensors)
            return outputs, (tensors, outputs)

        # Compiled here too, so that a call outside `jax.jit` is one program.
        @jax.jit
        def compiled_backward(residuals, gradients):
            tensors, outputs = residuals
            return tuple(self.backward(options, tensors, outputs, gradients))

        function = jax.custom_vjp(jax.jit(primal))
        function.defvjp(jax.jit(forward), compiled_backward)
        return function


def compiled(function):
    """See `keras_mom.backend`. Else JAX compiles operation by operation."""
    return jax.jit(function, static_argnums=0)


def decoding_program(function, read, written, jit_compile=None):
    """See `keras_mom.backend`. The carry's buffers are donated."""

    def run(carry, values, states, inputs):
        mapping = [*zip(read, values), *zip(written, states)]
        with keras.StatelessScope(mapping) as scope:
            carry, outputs = function(carry, inputs)
        return carry, outputs, [scope.get_current_value(v) for v in written]

    compiled_run = run if jit_compile is False else jax.jit(run, donate_argnums=0)

    def call(carry, inputs):
        values = [variable.value for variable in read]
        states = [variable.value for variable in written]
        carry, outputs, states = compiled_run(carry, values, states, inputs)
        for variable, value in zip(written, states):
            variable.assign(value)
        return carry, outputs

    return call


def gather_batch(inputs, index):
    """See `keras_mom.backend`. Batch rows stay on the device that they are on."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(inputs, index)


def fill_batch(size, index, values):
    """See `keras_mom.backend`. Batch rows stay on the device that they are on."""
    empty = jax.numpy.full((size,), -1, "int32")
    return jax.vmap(lambda i, x: empty.at[i].set(x, mode="drop"))(index, values)


def add_product(total, left, right):
    """See `keras_mom.backend`."""
    return total + jax.numpy.matmul(left, right).astype(total.dtype)


def sum_rows_by_index(rows, index, count):
    """See `keras_mom.backend`."""
    return jax.ops.segment_sum(rows, index, num_segments=count)


def full_precision():
    """Context in which a float32 product is not rounded to TF32 or bfloat16."""
    return jax.default_matmul_precision("highest")


def accelerator():
    """`"gpu"`, `"tpu"` or another platform name; None on a CPU."""
    platform = jax.default_backend()
    return None if platform == "cpu" else platform


def is_concrete(tensor):
    """Whether the values of `tensor` can be read here without a device sync."""
    if isinstance(tensor, Tracer):
        return False
    return all(device.platform == "cpu" for device in tensor.devices())


def overwrites_variables():
    """See `keras_mom.backend`. Compilers decide that here."""
    return False


def check_export(length):
    """See `keras_mom.backend`. Lengths stay unknown in an export here."""
    del length


def block_elements():
    """See `keras_mom.backend`. XLA makes one pass of what is written as several."""
    return None


def least_rows():
    """See `keras_mom.backend`. On a GPU, XLA makes a product of one row a sum."""
    return 8 if accelerator() == "gpu" else 1


# XLA's triangular solve is slow on a CPU, and slower to differentiate.
unit_lower_inverse = None
