"""Padding of one axis, in a form that every compiler takes whole."""

from keras import ops


def pad(x, axis, before=0, after=0, fill=0):
    """Adds entries of `fill` in front of and behind one axis.

    `keras.ops.pad` makes and names a Keras operation at every call, at which
    `torch.compile` gives up.

    Args:
        x: a tensor.
        axis: axis to pad.
        before, after: numbers of entries.
        fill: a number.

    Returns:
        A tensor of the dtype of `x`.
    """
    axis = axis % len(x.shape)

    def filler(size):
        shape = (*ops.shape(x)[:axis], size, *ops.shape(x)[axis + 1 :])
        if fill == 1:
            return [ops.ones(shape, x.dtype)]
        zeros = ops.zeros(shape, x.dtype)
        # Not `ops.full`, which reads its value back on torch.
        return [zeros + fill if fill else zeros]

    front = [] if isinstance(before, int) and before == 0 else filler(before)
    back = [] if isinstance(after, int) and after == 0 else filler(after)
    if not front and not back:
        return x
    return ops.concatenate([*front, x, *back], axis=axis)
