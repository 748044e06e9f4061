"""Numbers among tensors, made on the tensors' device.

On torch, Keras copies a number that an operation takes from the host to the device,
at every call, and no CUDA graph captures that.
"""

from keras import ops


def constant(value, dtype):
    """A scalar tensor."""
    zero = ops.zeros((), dtype)
    # A symbolic number has no truth value.
    return zero if isinstance(value, (int, float)) and value == 0 else zero + value


def select(condition, x, value):
    """`x` where the condition holds, else the number `value`; of the dtype of `x`."""
    return ops.where(condition, x, constant(value, x.dtype))


def at_least(x, value):
    """The larger of `x` and the number `value`, of the dtype of `x`."""
    return ops.maximum(x, constant(value, x.dtype))
