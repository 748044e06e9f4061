"""Rows of a table of embeddings, with a gradient that keeps its digits."""

import keras
from keras import ops

from keras_mom import backend


def embed(table, ids):
    """Looks up rows of a table.

    The gradient of a row is summed over all tokens in float32 (float64 for a table of
    that), whatever the dtype of the table. Frameworks sum in the table's own: in
    bfloat16, a sum over a few hundred tokens stops growing.

    Args:
        table: float `[V, D]`.
        ids: int32 `[...]`, from 0 to V - 1.

    Returns:
        `[..., D]`, of the dtype of `table`.
    """
    return _EMBED((), table, ids)[0]


def _backward(_, tensors, outputs, gradients):
    table, ids = tensors
    dtype = keras.backend.standardize_dtype(table.dtype)
    exact = "float64" if dtype == "float64" else "float32"
    rows = ops.reshape(ops.cast(gradients[0], exact), (-1, table.shape[1]))
    sums = backend.sum_rows_by_index(rows, ops.reshape(ids, (-1,)), table.shape[0])
    return ops.cast(sums, table.dtype), None


def _infer(_, table, ids):
    dtype = keras.backend.standardize_dtype(table.dtype)
    return (((*ids.shape, table.shape[1]), dtype),)


_EMBED = backend.Differentiable(
    "embed",
    lambda _, table, ids: (ops.take(table, ids, axis=0),),
    _backward,
    _infer,
)
