"""One token, memory by memory. In float64 it decides what is right.

Source: arXiv 2502.13685, equation 4, section 3.2 and Table 1.
"""

import numpy as np

from keras_mom_kernels.short_convolution.reference import short_convolution


def memory_step(
    query,
    key,
    value,
    *,
    log_decay=None,
    beta=None,
    weights,
    active,
    state,
    write="delta",
    erase_before_decay=False,
    read_before_update=False,
    scale=None,
):
    """Shapes and meaning are those of `keras_mom_kernels.memory_step.torch`.

    Returns:
        Mixed output `[B, H, V]` and new state `[B, M, H, K, V]`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output = np.zeros((state.shape[0], *value.shape[2:]))
    new_state = np.array(state)
    for place in zip(*np.nonzero(active)):
        # 1. Decay.
        old = decayed = state[place]
        if log_decay is not None:
            g = log_decay[place]
            decayed = np.exp(g if g.ndim == 2 else g[:, None])[..., None] * old
        # 2. Read what the key holds, and write.
        k, v = key[place], value[place]
        if write == "delta":
            v = v - np.einsum("hk,hkv->hv", k, old if erase_before_decay else decayed)
        if beta is not None:
            v = beta[place][:, None] * v
        new_state[place] = decayed + k[..., None] * v[:, None]
        # 3. Read what the query asks for, and mix.
        read_from = old if read_before_update else new_state[place]
        read = np.einsum("hk,hkv->hv", scale * query[place], read_from)
        output[place[0]] += weights[place] * read
    return output, new_state


def convolution_step(
    query,
    key,
    value,
    kernels,
    window,
    active,
    *,
    activations=("silu", "silu", "silu"),
    normalized=(False, False),
    heads,
    set_of_memory,
    epsilon=1e-6,
):
    """Shapes and meaning are those of `keras_mom_kernels.memory_step.torch`.

    Returns:
        Query, key and value rows `[B, M, H, K or V]`, and the new window, or None.
    """
    batch, memories = active.shape
    inputs = (
        query[:, None].repeat(memories, axis=1),
        *(x[:, list(set_of_memory)] for x in (key, value)),
    )
    new_window = np.array(window)
    rows, start = [], 0
    for i, x in enumerate(inputs):
        width = x.shape[-1]
        channels = slice(start, start + width)
        row = np.zeros(x.shape)
        for b, m in zip(*np.nonzero(active)):
            if kernels is None:
                y = x[b, m]
                y = y / (1 + np.exp(-y)) if activations[i] == "silu" else y
            else:
                # 1. A sequence of one row, behind the memory's last ones.
                y, last = short_convolution(
                    x[b, m][None, None],
                    kernels[i],
                    initial_state=window[b, m, :, channels][None],
                    activation=activations[i],
                )
                y, new_window[b, m, :, channels] = y[0, 0], last[0]
            # 2. L2 normalization of a head.
            y = y.reshape(heads, -1)
            if (*normalized, False)[i]:
                y = y / np.sqrt((y * y).sum(-1, keepdims=True) + epsilon)
            row[b, m] = y.reshape(-1)
        rows.append(row.reshape(batch, memories, heads, -1))
        start += width
    return *rows, None if window is None else new_window


def spread_routing(weights, indices, mask, *, num_memories, shared):
    """Shapes and meaning are those of `keras_mom_kernels.memory_step.torch`.

    Returns:
        Weights `[B, M]` and bool `[B, M]`: the memories that take the token.
    """
    batch = weights.shape[0]
    spread = np.full((batch, num_memories + shared), float(shared))
    spread[:, :num_memories] = 0
    active = spread > 0
    for place in np.ndindex(weights.shape):
        spread[place[0], indices[place]] = weights[place]
        active[place[0], indices[place]] = True
    if mask is not None:
        active &= mask[:, None]
    return spread, active
