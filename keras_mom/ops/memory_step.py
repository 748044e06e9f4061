"""One token into every memory that takes it: decoding without packing."""

import functools
from typing import Any

from keras import ops

from keras_mom import backend
from keras_mom.ops.constants import select
from keras_mom.ops.dispatch import dispatch, register
from keras_mom.ops.normalization import l2_normalize
from keras_mom.ops.short_convolution import short_convolution


def spread_routing(
    weights, indices, mask, *, num_memories, shared, implementation=None
):
    """A token's routing by memory.

    Args:
        weights: float32 `[B, k]`.
        indices: int32 `[B, k]`: the routed memories that take the token.
        mask: bool `[B]`: whether there is a token, or None.
        num_memories: of the routed ones.
        shared: whether there is one more memory, which takes every token with weight 1.
        implementation: as in `keras_mom.ops.memory_scan`.

    Returns:
        Weights, float32 `[B, M]`, and bool `[B, M]`: the memories that take the token;
        M counts the shared one, which is last.
    """
    return dispatch(
        "spread_routing",
        implementation,
        weights,
        indices,
        mask,
        num_memories=num_memories,
        shared=shared,
    )


def convolution_step(
    query,
    key,
    value,
    kernels,
    window,
    active,
    *,
    heads,
    set_of_memory,
    activations=("silu", "silu", "silu"),
    normalized=(False, False),
    in_place=False,
    implementation=None,
):
    """A token's query, key and value in every memory, behind the short convolution.

    Args:
        query: `[B, H * K]`, shared by the memories.
        key: `[B, P, H * K]`, by projection set.
        value: `[B, P, H * V]`.
        kernels: of query, key and value, `[W + 1, channels]` each, or None for no
            convolution.
        window: float32 `[B, M, W, H * (2 * K + V)]`: the last inputs that each memory
            took, of query, key and value side by side. None without `kernels`.
        active: bool `[B, M]`: the memories that take the token.
        heads: H.
        set_of_memory: tuple: the projection set of each of the M memories.
        activations: `"silu"` or None for query, key and value, behind a convolution.
        normalized: whether each head of query and key is L2-normalized behind that.
        in_place: whether `window` may be overwritten with the new one.
        implementation: as in `keras_mom.ops.memory_scan`.

    Returns:
        Query, key and value `[B, M, H, K or V]`, of the inputs' dtype or float32, and
        the window behind the token, or None. Memories that do not take the token keep
        their window; their rows may be anything.
    """
    return dispatch(
        "convolution_step",
        implementation,
        query,
        key,
        value,
        kernels,
        window,
        active,
        heads=heads,
        set_of_memory=tuple(set_of_memory),
        activations=activations,
        normalized=normalized,
        in_place=in_place,
        parts=implementation,
    )


def memory_step(
    query,
    key,
    value,
    *,
    log_decay,
    beta,
    weights,
    active,
    state,
    write="delta",
    erase_before_decay=False,
    read_before_update=False,
    scale=None,
    in_place=False,
    implementation=None,
):
    """Writes a token to the memories that take it, reads them, and mixes what they say.

    The recurrence is that of `keras_mom.ops.memory_scan`. A memory that does not take
    the token is neither read nor changed, whatever its inputs hold.

    Args:
        query, key: float `[B, M, H, K]`.
        value: `[B, M, H, V]`.
        log_decay: `[B, M, H]` or `[B, M, H, K]`; None for no decay.
        beta: write strength `[B, M, H]`, or None for 1.
        weights: float32 `[B, M]`.
        active: bool `[B, M]`: the memories that take the token.
        state: float32 `[B, M, H, K, V]`.
        write, erase_before_decay, scale: as in `keras_mom.ops.memory_scan`.
        read_before_update: whether the query reads the state before decay and write.
        in_place: whether `state` may be overwritten with the new one.
        implementation: as in `keras_mom.ops.memory_scan`.

    Returns:
        Mixed output, float32 `[B, H, V]`, and the state behind the token.
    """
    return dispatch(
        "memory_step",
        implementation,
        query,
        key,
        value,
        log_decay=log_decay,
        beta=beta,
        weights=weights,
        active=active,
        state=state,
        write=write,
        erase_before_decay=erase_before_decay,
        read_before_update=read_before_update,
        scale=scale,
        in_place=in_place,
        parts=implementation,
    )


@register("spread_routing", "portable")
def _portable_routing(weights, indices, mask, *, num_memories, shared):
    index = ops.arange(num_memories + shared, dtype="int32")
    chosen = indices[..., None] == index
    active = ops.any(chosen, axis=1)
    spread = ops.sum(select(chosen, weights[..., None], 0.0), axis=1)
    if shared:
        routed = index < num_memories
        active = ops.logical_or(active, ops.logical_not(routed))
        spread = select(routed, spread, 1.0)
    if mask is not None:
        active = ops.logical_and(active, mask[:, None])
    return spread, active


# `parts` names the implementation of the operations that a portable form is made of.


@register("convolution_step", "portable")
def _portable_convolution(
    query,
    key,
    value,
    kernels,
    window,
    active,
    *,
    heads,
    set_of_memory,
    activations,
    normalized,
    in_place,
    parts,
):
    del in_place
    batch, memories = ops.shape(query)[0], len(set_of_memory)
    rows = [
        ops.repeat(query[:, None], memories, axis=1),
        of_memories(key, set_of_memory),
        of_memories(value, set_of_memory),
    ]
    if kernels is not None:
        flat, history = batch * memories, window.shape[2]
        widths = [x.shape[-1] for x in rows]
        flat_window = ops.reshape(window, (flat, history, sum(widths)))
        convolved, moved, start = [], [], 0
        for x, width, kernel, activation in zip(rows, widths, kernels, activations):
            output, after = short_convolution(
                ops.reshape(x, (flat, 1, width)),
                kernel,
                initial_state=flat_window[..., start : start + width],
                return_state=True,
                activation=activation,
                implementation=parts,
            )
            start += width
            convolved.append(ops.reshape(output, (batch, memories, width)))
            moved.append(ops.cast(after, "float32"))
        rows = convolved
        moved = ops.reshape(ops.concatenate(moved, axis=-1), ops.shape(window))
        window = ops.where(active[..., None, None], moved, window)
    shape = (batch, memories, heads)
    rows = [ops.reshape(x, (*shape, x.shape[-1] // heads)) for x in rows]
    normalized = (*normalized, False)
    rows = [l2_normalize(x) if needed else x for x, needed in zip(rows, normalized)]
    return *rows, window


@register("memory_step", "portable")
def _portable_step(
    query,
    key,
    value,
    *,
    log_decay,
    beta,
    weights,
    active,
    state,
    write,
    erase_before_decay,
    read_before_update,
    scale,
    in_place,
    parts,
):
    del in_place

    def scan(query, key, value, log_decay, beta, initial_state):
        return TokenScan(parts)(
            query,
            key,
            value,
            log_decay=log_decay,
            beta=beta,
            initial_state=initial_state,
            write=write,
            erase_before_decay=erase_before_decay,
            read_before_update=read_before_update,
            scale=scale,
        )

    return scan_and_mix(
        scan, query, key, value, log_decay, beta, weights, active, state
    )


def of_memories(x, set_of_memory):
    """`[B, P, ...]` by projection set to `[B, M, ...]` by memory."""
    if tuple(set_of_memory) == tuple(range(x.shape[1])):
        return x
    return ops.stack([x[:, s] for s in set_of_memory], axis=1)


def scan_and_mix(scan, query, key, value, log_decay, beta, weights, active, state):
    """A step through any scan of a row in each memory.

    Args:
        scan: takes query, key, value, log decay, beta and state, whose first axes are
            `[B * M, 1, H]`, `[B * M, H]` of the state, and returns outputs and states.
        query, key, value, log_decay, beta, weights, active, state: as in
            `memory_step`; a rule of its own gives them other sizes behind `[B, M, H]`.

    Returns:
        As `memory_step`.
    """
    batch, memories, num_heads, value_dim = ops.shape(value)
    if log_decay is not None:
        takes = ops.reshape(
            active, (batch, memories, *[1] * (len(log_decay.shape) - 2))
        )
        log_decay = select(takes, log_decay, 0.0)
    if beta is None:
        beta = ops.ones(ops.shape(query)[:3], "float32")
    beta = select(active[..., None], beta, 0.0)

    def one_step(x) -> Any:
        if x is None:
            return None
        return ops.reshape(x, (batch * memories, 1, *ops.shape(x)[2:]))

    outputs, states = scan(
        *[one_step(x) for x in (query, key, value, log_decay, beta)],
        one_step(state)[:, 0],
    )
    shape = (batch, memories, num_heads, value_dim)
    outputs = ops.cast(ops.reshape(outputs, shape), "float32")
    weights = select(active, weights, 0.0)[..., None, None]
    # Memories that do not take the token are not read, not even times zero.
    outputs = select(active[..., None, None], outputs * weights, 0.0)
    states = ops.reshape(states, ops.shape(state))
    states = ops.where(active[..., None, None, None], states, state)
    return ops.sum(outputs, axis=1), states


class TokenScan:
    """The memory scan of a row in each of N memories, as an update rule calls it.

    Rows are `[N, 1, H, ...]` and states `[N, H, K, V]`.

    Args:
        implementation: in the sense of `keras_mom.ops.memory_scan`.
    """

    def __init__(self, implementation):
        self._scan = functools.partial(dispatch, "memory_scan", implementation)

    def __call__(
        self,
        query,
        key,
        value,
        *,
        log_decay,
        beta,
        initial_state,
        write="additive",
        erase_before_decay=False,
        read_before_update=False,
        decay_axis="key",
        scale=None,
    ):
        """Arguments and results are those of `keras_mom.layers.row_scan.RowScan`."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        outputs, memories = self._scan(
            query,
            key,
            value,
            log_decay=log_decay,
            beta=beta,
            write=write,
            erase_before_decay=erase_before_decay,
            decay_axis=decay_axis,
            cu_seqlens=None,
            aligned=None,
            initial_state=initial_state,
            scale=scale,
        )
        if read_before_update:
            query = scale * ops.cast(query, "float32")
            with backend.full_precision():
                outputs = ops.einsum("nthk,nhkv->nthv", query, initial_state)
            outputs = ops.cast(outputs, value.dtype)
        return outputs, memories
