"""The portable memory scan: the chunkwise form through `keras.ops`."""

import functools

from keras_mom import backend
from keras_mom.ops.arrays import ARRAYS
from keras_mom_kernels.memory_scan.chunked_scan import (
    ScanOptions,
    backward,
    forward,
    infer,
)


def chunked_scan(
    options,
    query,
    key,
    value,
    log_decay=None,
    beta=None,
    resets=None,
    chunk_offsets=None,
    initial_state=None,
):
    """Runs the recurrence over rows that are whole chunks of one segment each.

    Args:
        options: `ScanOptions`.
        query, key: float32 `[B, T, H, K]`, T a multiple of the rows of a block.
        value: float32 `[B, T, H, V]`.
        log_decay: float32 `[B, T, H]` or `[B, T, H, K]`, or None for no decay;
            `[B, T, H, V]` for value channels.
        beta: float32 `[B, T, H]`, or None for 1.
        resets: int32 `[B, T]`, 1 at a row before which the state is emptied, or None.
        chunk_offsets: int32 `[B, S + 1]`: segment s of a batch row holds the chunks
            `chunk_offsets[s]` to `chunk_offsets[s + 1] - 1`. The first entry is 0,
            the last T / C. None for one segment a batch row.
        initial_state: float32 `[B, S, H, K, V]`, or None for zeros.

    Returns:
        Output `[B, T, H, V]` and final state `[B, S, H, K, V]`, float32.
    """
    return _SCAN(
        options,
        query,
        key,
        value,
        log_decay,
        beta,
        resets,
        chunk_offsets,
        initial_state,
    )[:2]


_SCAN = backend.Differentiable(
    "memory_scan",
    functools.partial(forward, ARRAYS),
    functools.partial(backward, ARRAYS),
    infer,
    ScanOptions._make,
)
