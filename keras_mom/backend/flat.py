"""Rows of a batch as one long list, for frameworks that are fastest so."""

from keras import ops


def gather_batch(inputs, index):
    """See `keras_mom.backend`."""
    batch, rows, width = ops.shape(inputs)
    row = ops.arange(batch, dtype="int32")[:, None]
    flat = ops.reshape(inputs, (batch * rows, width))
    return ops.take(flat, index + row * rows, axis=0)


def fill_batch(size, index, values):
    """See `keras_mom.backend`."""
    batch = ops.shape(index)[0]
    row = ops.arange(batch, dtype="int32")[:, None] * size
    outside = batch * size
    # Without the numbers of Python in `where`, which torch copies from the host.
    place = ops.where(index < size, index + row, ops.zeros_like(index) + outside)
    # Not `ops.full`, which reads its value back on torch.
    empty = ops.zeros((outside + 1,), "int32") - 1
    filled = ops.scatter_update(
        empty, ops.reshape(place, (-1, 1)), ops.reshape(values, (-1,))
    )
    return ops.reshape(filled[:-1], (batch, size))
