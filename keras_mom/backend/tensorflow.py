"""Loops, hand-written gradients and device facts on TensorFlow."""

import contextlib

import tensorflow as tf


def scan(step, carry, length, reverse=False):
    """See `keras_mom.backend`."""
    # One step is traced for the types of its outputs.
    probe = tf.function(lambda carry, index: step(carry, index)[1])
    probe = probe.get_concrete_function(
        tf.TensorSpec(carry.shape, carry.dtype), tf.TensorSpec((), "int32")
    )
    arrays = tuple(
        tf.TensorArray(output.dtype, size=length, element_shape=output.shape)
        for output in probe.outputs
    )

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

    def joined(array, output):
        x = array.stack()
        x = tf.transpose(x, (1, 0, *range(2, len(x.shape))))
        shape = tf.shape(x)
        shape = tf.concat([shape[:1], shape[1:2] * shape[2:3], shape[3:]], 0)
        total = None
        if isinstance(length, int) and output.shape[1] is not None:
            total = length * output.shape[1]
        x = tf.reshape(x, shape)
        x.set_shape([output.shape[0], total, *output.shape[2:]])
        return x

    return carry, tuple(joined(a, o) for a, o in zip(arrays, probe.outputs))


class Differentiable:
    """A function of tensors whose gradient is written by hand.

    Args:
        name: identifier of the function, unique in the library.
        forward: `forward(options, *tensors) -> tuple of tensors`. Tensors may be
            None where the function allows it.
        backward: `backward(options, tensors, outputs, gradients) -> tuple`, a
            gradient (or None) for each of `tensors`. `gradients` holds one tensor
            for each of `outputs`.
        infer: `infer(options, *tensors) -> tuple of (shape, dtype)`, what
            `forward` returns, for tracers that do not run it.

    Outputs that a caller drops may serve as residuals of the backward pass.
    """

    def __init__(self, name, forward, backward, infer):
        del infer  # TensorFlow traces `forward`.
        self.name = name
        self.forward = forward
        self.backward = backward

    def __call__(self, options, *tensors):
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
