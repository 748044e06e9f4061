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

    outputs = [[None] * length for _ in range(batch)]
    states = []
    empty = xp.zeros((heads, key_dim, value.shape[-1]), dtype=query.dtype)
    for sequence, (row, start, end) in enumerate(sequences):
        state = empty if initial_state is None else initial_state[sequence]
        for t in range(start, end):
            q, k, v = query[row, t], key[row, t], value[row, t]
            # 1. Decay.
            decayed = state
            if log_decay is not None:
                g = log_decay[row, t]
                g = g[:, None] if len(g.shape) == 1 else g
                decayed = xp.exp(g)[:, :, None] * state
            # 2. Read what the key holds.
            if write == "delta":
                read_from = state if erase_before_decay else decayed
                v = v - xp.einsum("hk,hkv->hv", k, read_from)
            # 3. Write.
            if beta is not None:
                v = beta[row, t][:, None] * v
            state = decayed + k[:, :, None] * v[:, None, :]
            # 4. Read what the query asks for.
            outputs[row][t] = scale * xp.einsum("hk,hkv->hv", q, state)
        states.append(state)
    zero = empty[:, 0]
    rows = [xp.stack([zero if o is None else o for o in row]) for row in outputs]
    return xp.stack(rows), xp.stack(states)
