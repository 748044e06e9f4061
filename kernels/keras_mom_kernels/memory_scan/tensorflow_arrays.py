"""TensorFlow's array functions under the names that `chunk_algebra` asks for."""

import contextlib
import math
from typing import Any

import tensorflow as tf

concatenate = tf.concat
convert_to_tensor = tf.convert_to_tensor
cumsum = tf.cumsum
exp = tf.exp
floor = tf.floor
matmul = tf.matmul
maximum = tf.maximum
ones_like = tf.ones_like
slice = tf.slice
stack = tf.stack
where = tf.where
zeros = tf.zeros
zeros_like = tf.zeros_like
# XLA's triangular solve is slow on a CPU, and slower to differentiate.
unit_lower_inverse = None


def arange(count, dtype):
    return tf.range(count, dtype=dtype)


def cast(x, dtype):
    return tf.cast(x, dtype)


def clip(x, lowest, highest):
    return tf.clip_by_value(x, lowest, highest)


def diagonal(x, axis1, axis2):
    """The diagonals of `[..., C, C]`."""
    if (axis1, axis2) != (-2, -1):
        raise ValueError(f"the last two axes have diagonals, not {axis1} and {axis2}")
    # LiteRT has no operation of its own for it.
    own = tf.eye(x.shape[-1], dtype=tf.bool)
    return tf.reduce_sum(tf.where(own, x, tf.zeros((), x.dtype)), axis=-1)


def reshape(x, shape):
    return tf.reshape(x, shape)


def shape(x) -> Any:
    """Sizes, as numbers where they are known and else as tensors."""
    known = x.shape.as_list()
    if None not in known:
        return tuple(known)
    found = tf.shape(x)
    return tuple(found[i] if size is None else size for i, size in enumerate(known))


def sum(x, axis, keepdims=False):
    return tf.reduce_sum(x, axis=axis, keepdims=keepdims)


def swapaxes(x, first, second):
    order = list(range(len(x.shape)))
    order[first], order[second] = order[second], order[first]
    return tf.transpose(x, order)


def take(x, index, axis=0):
    return tf.gather(x, index, axis=axis)


def full_precision():
    """Float32 products are not rounded here."""
    return contextlib.nullcontext()


def scan(step, carry, length, shapes, reverse=False):
    """The loop that `chunk_algebra` asks for. It has no gradient under XLA."""
    # LiteRT asks for elements of a known shape, and slices no more than 5 axes.
    sizes = [(shape[1], math.prod(shape[2:])) for shape in shapes]
    batch = carry.shape[0]
    arrays = tuple(
        tf.TensorArray(carry.dtype, size=length, element_shape=(batch, *size))
        for size in sizes
    )

    def body(index, carry, arrays):
        position = length - 1 - index if reverse else index
        carry, outputs = step(carry, position)
        flat = [tf.reshape(x, (-1, *size)) for x, size in zip(outputs, sizes)]
        arrays = tuple(a.write(position, x) for a, x in zip(arrays, flat))
        return index + 1, carry, arrays

    _, carry, arrays = tf.while_loop(
        lambda index, *_: index < length,
        body,
        (tf.constant(0), carry, arrays),
        maximum_iterations=length,
    )

    def joined(array, shape):
        stacked = swapaxes(array.stack(), 0, 1)
        return tf.reshape(stacked, (shape[0], length * shape[1], *shape[2:]))

    return carry, tuple(joined(*item) for item in zip(arrays, shapes))
