"""Grouped projection: reference."""

import numpy as np


def grouped_projection(inputs, kernel, token, memory):
    """Packed rows of projected tokens, row by row.

    Args:
        inputs: `[B, T, D]`.
        kernel: `[D, M * E]`, the memories' matrices side by side.
        token: integers `[B, R]`, the token in each packed row, -1 for none.
        memory: integers `[B, R]`, the memory that a packed row belongs to.

    Returns:
        `[B, R, E]`; zeros in rows without a token.
    """
    batch, rows = token.shape
    width = kernel.shape[1] // (memory.max() + 1)
    output = np.zeros((batch, rows, width))
    for b in range(batch):
        for r in range(rows):
            if token[b, r] >= 0:
                first = memory[b, r] * width
                own = kernel[:, first : first + width]
                output[b, r] = inputs[b, token[b, r]] @ own
    return output
