"""The short convolution of packed rows, row by row.

Runs on NumPy, and on torch (`xp=torch`) for gradients; in float64 it decides what is
right. Source: arXiv 2502.13685, section 3.2; L2 norms as in arXiv 2406.06484, section
3.3.
"""

import numpy as np


def packed_convolution(
    inputs,
    kernel,
    source,
    *,
    documents=None,
    activation="silu",
    heads=None,
    epsilon=1e-6,
    xp=np,
):
    """Meaning and shapes are those of `packed_convolution.torch`; empty rows are zeros.

    Returns:
        `[B, R, E]`.
    """
    batch, rows = source.shape
    width = inputs.shape[-1]
    taps = 1 if kernel is None else kernel.shape[0]
    zero = xp.zeros((width,), dtype=inputs.dtype)

    outputs = []
    for b in range(batch):
        for r in range(rows):
            if source[b, r] < 0:
                outputs.append(zero)
                continue
            # 1. Each channel meets its own last rows, those of its document only.
            y = zero
            for i in range(taps):
                t = r - (taps - 1) + i
                if t < 0 or source[b, t] < 0:
                    continue
                if documents is None or documents[b, t] == documents[b, r]:
                    x = inputs[b, int(source[b, t])]
                    y = y + (x if kernel is None else kernel[i] * x)
            # 2. SiLU.
            if activation == "silu":
                y = y / (1 + xp.exp(-y))
            # 3. Each head's vector to length 1.
            if heads is not None:
                y = y.reshape(heads, width // heads)
                squares = (y * y).sum(-1)[:, None]
                y = (y / (squares + epsilon) ** 0.5).reshape(width)
            outputs.append(y)
    return xp.stack(outputs).reshape(batch, rows, width)
