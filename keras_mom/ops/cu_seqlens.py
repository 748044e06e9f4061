"""Sequences that are packed in one batch row, one after the other without gaps."""

import numpy as np
from keras import ops

from keras_mom import backend


def checked_cu_seqlens(cu_seqlens, name, rows):
    """Checks the borders of packed sequences.

    Args:
        cu_seqlens: integer `[S + 1]`: sequence s is the rows `cu_seqlens[s]` to
            `cu_seqlens[s + 1] - 1`. An array, a tensor or a list.
        name: the argument that holds the rows, for errors.
        rows: how many rows there are, or None.

    Returns:
        An int32 tensor `[S + 1]`.

    Raises:
        ValueError: if the shape or dtype is another, or, where the values can be read
            without a device sync, if they do not start with 0, decrease, or pass the
            rows.
    """
    if not hasattr(cu_seqlens, "shape"):
        cu_seqlens = np.asarray(cu_seqlens)
    known = isinstance(cu_seqlens, np.ndarray) or backend.is_concrete(cu_seqlens)
    if len(cu_seqlens.shape) != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "`cu_seqlens` must have shape [S + 1] with S at least 1. "
            f"Received: shape {tuple(cu_seqlens.shape)}"
        )
    if "int" not in str(cu_seqlens.dtype):
        raise ValueError(
            f"`cu_seqlens` must be of an integer dtype. Received: {cu_seqlens.dtype}"
        )
    if known:
        values = np.asarray(cu_seqlens)
        if values[0] != 0 or (np.diff(values) < 0).any():
            raise ValueError(
                "`cu_seqlens` must start with 0 and not decrease. "
                f"Received: {values.tolist()}"
            )
        if rows is not None and values[-1] > rows:
            raise ValueError(
                f"`cu_seqlens` must not pass the {rows} rows of `{name}`. "
                f"Received: {values.tolist()}"
            )
    return ops.cast(cu_seqlens, "int32")


def sequence_of(row, borders):
    """The sequence that holds each row; the last one for rows behind all.

    Args:
        row: int32, row numbers of any shape.
        borders: int32 `[S + 1]`.
    """
    sequence = ops.searchsorted(borders[1:], row, side="right")
    return ops.minimum(ops.cast(sequence, "int32"), borders.shape[0] - 2)
