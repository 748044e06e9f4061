"""Loops, hand-written gradients and device facts on TensorFlow."""

from typing import Any

import keras
import tensorflow as tf

from keras_mom.backend import flat
from keras_mom_kernels.memory_scan import tensorflow_arrays

# One loop, one inverse, for Keras' array functions and TensorFlow's.
scan = tensorflow_arrays.scan
full_precision = tensorflow_arrays.full_precision
unit_lower_inverse = tensorflow_arrays.unit_lower_inverse
gather_batch, fill_batch = flat.gather_batch, flat.fill_batch


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

        # A variable is read first: TensorFlow would ask for its gradient by itself.
        return function(*(tf.convert_to_tensor(tensors[index]) for index in present))


def compiled(function):
    """See `keras_mom.backend`. Operations need no compilation here."""
    return function


def decoding_program(function, read, written, jit_compile=None):
    """See `keras_mom.backend`. TensorFlow reads variables where they are."""
    del read

    def call(carry, inputs):
        # Losses of symbolic tensors would stay in the layers.
        with keras.StatelessScope() as scope:
            carry, outputs = function(carry, inputs)
        for variable in written:
            value = scope.get_current_value(variable)
            if value is not None:
                variable.assign(value)
        return carry, outputs

    if jit_compile is False:
        return call
    return tf.function(call, jit_compile=True, autograph=False)


def add_product(total, left, right):
    """See `keras_mom.backend`."""
    return total + tf.cast(tf.matmul(left, right), total.dtype)


def sum_rows_by_index(rows, index, count):
    """See `keras_mom.backend`."""
    return tf.math.unsorted_segment_sum(rows, index, count)


@tf.custom_gradient
def softplus(x):
    """See `keras_mom.backend`. LiteRT has no log1p, and log(1 + y) forgets small y."""
    y = tf.exp(-tf.abs(x))
    # log(1 + y) = 2 artanh(z), by its series; z is 1/3 at most.
    z = y / (2 + y)
    square = z * z
    series = 1 / 13
    for power in (11, 9, 7, 5, 3, 1):
        series = series * square + 1 / power
    return tf.maximum(x, 0) + 2 * z * series, lambda grad: grad * tf.sigmoid(x)


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


def check_export(length):
    """See `keras_mom.backend`. Lengths stay unknown in an export here."""
    del length


def least_rows():
    """See `keras_mom.backend`."""
    return 1


def block_elements():
    """See `keras_mom.backend`. XLA makes one pass of what is written as several."""
    return None
