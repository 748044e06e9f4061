"""Products of one row with a matrix, where a framework takes several rows faster."""

import keras
from keras import ops

from keras_mom import backend


def project(function, inputs):
    """`function(inputs)`, which treats all rows alike: Dense layers, say.

    A single row, as in decoding, is taken `backend.least_rows()` times where that is
    faster: the matrix, which is what has to be read, is read once all the same.

    Args:
        function: from `[..., D]` to a nested structure of tensors with the same first
            axis, each row of which depends on that row alone.
        inputs: `[..., D]`.

    Returns:
        What `function` returns.
    """
    rows = backend.least_rows()
    if rows == 1 or any(size != 1 for size in inputs.shape[:-1]):
        return function(inputs)
    several = ops.broadcast_to(inputs, (rows, *inputs.shape[1:]))
    return keras.tree.map_structure(lambda x: x[:1], function(several))
