"""Loops, hand-written gradients and device facts on TensorFlow."""

import contextlib
from typing import Any

import tensorflow as tf


def scan(step, carry, length, num_outputs, reverse=False):
    """See `keras_mom.backend`."""
    arrays = tuple(tf.TensorArray(carry.dtype, size=length) for _ in range(num_outputs))

    def body(index, carry, arrays):
        position = length - 1 - index if reverse else index
        carry, outputs = step(carry, position)
        arrays = tuple(a.write(position, o) for a, o in zip(arrays, outputs))
        return index + 1, carry, arrays

    _, carry, arrays = tf.while_loop(
        lambda index, *_: index < length,
        body,
        (tf.constant(0), carry, arrays),
        maximum_iterations=length,
    )
    return carry, tuple(_joined(array.stack()) for array in arrays)


def _joined(x):
    """`[length, B, n, ...]` to `[B, length * n, ...]`."""
    x = tf.transpose(x, (1, 0, *range(2, len(x.shape))))
    shape = tf.shape(x)
    joined = tf.reshape(
        x, tf.concat([shape[:1], shape[1:2] * shape[2:3], shape[3:]], 0)
    )
    batch, length, count, *rest = x.shape
    if length is not None and count is not None:
        count = length * count
    else:
        count = None
    joined.set_shape([batch, count, *rest])
    return joined


class Differentiable:
    """See `keras_mom.backend`."""

    def __init__(self, name, forward, backward, infer, make_options: Any = tuple):
        del infer, make_options  # TensorFlow traces `forward`.
        self.name = name
        self.forward = forward
        self.backward = backward

    def __call__(self, options, *tensors) -> Any:
        present = [i for i, tensor in enumerate(tensors) if tensor is not None]

        def restore(values):
            filled = [None] * len(tensors)
            for index, value in zip(present, values):
                filled[index] = value
            return filled

        @tf.custom_gradient
        def function(*values):
            outputs = tuple(self.forward(options, *restore(values)))

            def backward(*gradients):
                grads = self.backward(options, restore(values), outputs, gradients)
                return [grads[index] for index in present]

            return outputs, backward

        return function(*[tensors[index] for index in present])


def compiled(function):
    """See `keras_mom.backend`. Operations need no compilation here."""
    return function


def full_precision():
    """Context in which a float32 product is not rounded; TensorFlow has none."""
    return contextlib.nullcontext()


def accelerator():
    """`"gpu"` or `"tpu"`; None on a CPU."""
    for kind in ("GPU", "TPU"):
        if tf.config.list_logical_devices(kind):
            return kind.lower()
    return None


def is_concrete(tensor):
    """Whether the values of `tensor` can be read here without a device sync."""
    return isinstance(tensor, tf.__internal__.EagerTensor) and "CPU" in tensor.device


def overwrites_variables():
    """See `keras_mom.backend`. Compilers decide that here."""
    return False


def block_elements():
    """See `keras_mom.backend`. XLA makes one pass of what is written as several."""
    return None


# XLA's triangular solve is slow on a CPU, and slower to differentiate.
unit_lower_inverse = None
