"""Loops, hand-written gradients and device facts on JAX."""

import jax


def scan(step, carry, length, reverse=False):
    """See `keras_mom.backend`."""
    carry, outputs = jax.lax.scan(
        step, carry, jax.numpy.arange(length, dtype="int32"), reverse=reverse
    )

    def joined(x):
        x = jax.numpy.swapaxes(x, 0, 1)
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])

    return carry, tuple(joined(x) for x in outputs)


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
        del infer  # JAX traces `forward`.
        self.name = name
        self.forward = forward
        self.backward = backward

    def __call__(self, options, *tensors):
        def primal(*tensors):
            return tuple(self.forward(options, *tensors))

        def forward(*tensors):
            outputs = primal(*tensors)
            return outputs, (tensors, outputs)

        def backward(residuals, gradients):
            tensors, outputs = residuals
            return tuple(self.backward(options, tensors, outputs, gradients))

        function = jax.custom_vjp(primal)
        function.defvjp(forward, backward)
        return function(*tensors)


def full_precision():
    """Context in which a float32 product is not rounded to TF32 or bfloat16."""
    return jax.default_matmul_precision("highest")


def accelerator():
    """`"gpu"`, `"tpu"` or another platform name; None on a CPU."""
    platform = jax.default_backend()
    return None if platform == "cpu" else platform


def is_concrete(tensor):
    """Whether the values of `tensor` can be read here without a device sync."""
    if isinstance(tensor, jax.core.Tracer):
        return False
    return all(device.platform == "cpu" for device in tensor.devices())
