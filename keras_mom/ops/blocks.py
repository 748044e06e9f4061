"""Rows a block at a time, where the framework does not fuse what is computed."""

from keras import ops

from keras_mom import backend


def row_blocks(shape):
    """(start, stop) of each block of rows of a `[B, R, ...]` tensor.

    One block of all rows where a compiler makes one pass of several operations.
    """
    batch, rows, *rest = shape
    size = backend.block_elements()
    if size is None:
        return [(0, rows)]
    for width in (batch, *rest):
        size = size // max(1, width)
    size = max(64, size)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def join_blocks(blocks):
    """Blocks of rows, one behind the other."""
    return blocks[0] if len(blocks) == 1 else ops.concatenate(blocks, axis=1)
