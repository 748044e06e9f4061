"""The short causal convolution, token by token.

Runs on NumPy, and on torch (`xp=torch`) for gradients; in float64 it decides what is
right. Source: arXiv 2502.13685, section 3.2, and its implementation's width of 4.
"""

import numpy as np


def short_convolution(
    inputs,
    kernel,
    *,
    segment_ids=None,
    initial_state=None,
    activation="silu",
    xp=np,
):
    """Shapes and meaning are those of `keras_mom.ops.short_convolution`.

    Returns:
        Output `[B, T, channels]` and final state `[B, width - 1, channels]`.
    """
    batch, length, channels = inputs.shape
    history = kernel.shape[0] - 1
    zero = xp.zeros((channels,), dtype=inputs.dtype)

    outputs, states = [], []
    for b in range(batch):
        # 1. The inputs before the first one belong to the first one's segment.
        before = [
            zero if initial_state is None else initial_state[b, i]
            for i in range(history)
        ]
        rows = [*before, *(inputs[b, t] for t in range(length))]
        ids = [0] * length if segment_ids is None else [int(s) for s in segment_ids[b]]
        ids = [*ids[:1] * history, *ids]

        output = []
        for t in range(length):
            # 2. Each channel meets its own last rows, those of its segment only.
            y = zero
            for i in range(history + 1):
                if ids[t + i] == ids[t + history]:
                    y = y + kernel[i] * rows[t + i]
            # 3. SiLU.
            output.append(y / (1 + xp.exp(-y)) if activation == "silu" else y)
        outputs.append(xp.stack(output))

        # 4. The state: the last inputs, those of the last row's segment only.
        last = zip(rows[length:], ids[length:])
        kept = [row if segment == ids[-1] else zero for row, segment in last]
        states.append(xp.stack(kept) if kept else xp.zeros((0, channels)))
    return xp.stack(outputs), xp.stack(states)
