"""The recurrence of the memory scan, token by token.

Runs on NumPy, and on torch (`xp=torch`) for gradients; in float64 it decides what is
right. Source: arXiv 2502.13685, equation 4 and Table 1.
"""

import numpy as np


def memory_scan(
    query,
    key,
    value,
    *,
    log_decay=None,
    beta=None,
    write="delta",
    erase_before_decay=False,
    decay_axis="key",
    cu_seqlens=None,
    initial_state=None,
    scale=None,
    xp=np,
):
    """Shapes and meaning are those of `keras_mom.ops.memory_scan`.

    Returns:
        Output `[B, T, H, V]` and final state `[B or S, H, K, V]`.
    """
    batch, length, heads, key_dim = query.shape
    scale = key_dim**-0.5 if scale is None else scale
    if cu_seqlens is None:
        sequences = [(row, 0, length) for row in range(batch)]
    else:
        borders = [int(border) for border in cu_seqlens]
        sequences = [(0, *borders[i : i + 2]) for i in range(len(borders) - 1)]

    empty = xp.zeros((heads, key_dim, value.shape[-1]), dtype=query.dtype)
    outputs = [[empty[:, 0]] * length for _ in range(batch)]
    states = []
    for sequence, (row, start, end) in enumerate(sequences):
        state = empty if initial_state is None else initial_state[sequence]

        def tokens(x, row=row, start=start, end=end):
            # Iterating, not indexing: on torch the gradient of an index is as large
            # as what is indexed.
            return [None] * (end - start) if x is None else list(x[row, start:end])

        steps = zip(*map(tokens, (query, key, value, log_decay, beta)))
        for t, (q, k, v, g, b) in enumerate(steps, start):
            # 1. Decay.
            decayed = state
            if g is not None:
                g = g[:, None] if len(g.shape) == 1 else g
                decay = xp.exp(g)
                decay = decay[:, None] if decay_axis == "value" else decay[:, :, None]
                decayed = decay * state
            # 2. Read what the key holds.
            if write == "delta":
                read_from = state if erase_before_decay else decayed
                v = v - xp.einsum("hk,hkv->hv", k, read_from)
            # 3. Write.
            if b is not None:
                v = b[:, None] * v
            state = decayed + k[:, :, None] * v[:, None, :]
            # 4. Read what the query asks for.
            outputs[row][t] = scale * xp.einsum("hk,hkv->hv", q, state)
        states.append(state)
    return xp.stack([xp.stack(row) for row in outputs]), xp.stack(states)
