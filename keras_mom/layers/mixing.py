"""From projected tokens to mixed outputs: packing, convolution, scan, mixing.

Names, beside B, T, H, K, V, M and k: P projection sets, J memories a token (k, and
the shared one), R packed rows a batch row, W convolution history.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_mom.layers.row_scan import RowScan
from keras_mom.ops.memory_mixing import memory_mixing
from keras_mom.ops.memory_scan import AlignedSegments, block_size, chunk_size
from keras_mom.ops.normalization import l2_normalize
from keras_mom.ops.packed_convolution import (
    behind_windows,
    last_windows,
    packed_convolution,
)
from keras_mom.ops.packing import Documents, Packing
from keras_mom.ops.padding import pad
from keras_mom.ops.rows import gather_rows
from keras_mom.ops.short_convolution import short_convolution


class Sizes(NamedTuple):
    """Sizes of a layer: M routed memories, the shared one, heads, K, V, history W."""

    num_memories: int
    shared: bool
    per_memory_projections: bool
    num_heads: int
    key_dim: int
    value_dim: int
    history: int

    @property
    def memories(self):
        """All memories, the shared one included."""
        return self.num_memories + self.shared

    @property
    def projections(self):
        """P."""
        routed = self.num_memories if self.per_memory_projections else 1
        return routed + self.shared

    @property
    def projection_of_memory(self):
        """The projection set of each memory."""
        if self.per_memory_projections:
            return list(range(self.memories))
        return [0] * self.num_memories + [1] * self.shared

    @property
    def channels(self):
        """Widths of query, key and value."""
        keys = self.num_heads * self.key_dim
        return keys, keys, self.num_heads * self.value_dim


class Tokens(NamedTuple):
    """Projected tokens.

    Attributes:
        query: `[B, T, H * K]`.
        key: `[B, T, P * H * K]`.
        value: `[B, T, P * H * V]`.
        features: the rule's projections, each `[B, T, P, ...]`.
    """

    query: object
    key: object
    value: object
    features: tuple


def mix_sequence(
    sizes,
    rule,
    kernels,
    norm,
    tokens,
    weights,
    indices,
    mask,
    segment_ids,
    state,
    options,
):
    """Writes tokens to their memories; mixes, normalizes and gates what they read.

    Args:
        sizes: `Sizes`.
        rule: `MemoryUpdateRule`.
        kernels: convolution kernels of query, key and value, `[W + 1, channels]`
            each, or None.
        norm: `OutputNorm`.
        tokens: `Tokens`.
        weights: float32 `[B, T, k]`.
        indices: int32 `[B, T, k]`.
        mask: bool `[B, T]` or None.
        segment_ids: int32 `[B, T]` or None.
        state: (memories, windows), (memories,) without convolution, or None.
        options: dict: `implementation`, and whether to `return_state`.

    Returns:
        Mixed outputs, `[B, T, H * V]` of the dtype of `norm`, and the new state, or
        None.
    """
    length = ops.shape(indices)[1]
    size, block = chunk_size(length), block_size(length)
    history = max(sizes.history, int(rule.read_before_update))
    packing = Packing(
        indices,
        sizes.num_memories,
        sizes.shared,
        mask,
        history,
        size,
        block,
        implementation=options["implementation"],
    )
    documents = None
    if segment_ids is not None:
        documents = Documents(packing, segment_ids, mask)

    shapes = [(sizes.num_heads, width) for width in _head_widths(sizes)]
    to_query = packing.source(1, None)
    to_sets = packing.source(sizes.projections, sizes.projection_of_memory)
    raw = [
        _by_set(tokens.query, 1),
        _by_set(tokens.key, sizes.projections),
        _by_set(tokens.value, sizes.projections),
    ]
    windows = [None] * 3
    if state is not None and sizes.history:
        windows = _split_channels(sizes, state[1])
    taken = [
        behind_windows(packing, x, to, window)
        for x, to, window in zip(raw, [to_query, to_sets, to_sets], windows)
    ]
    convolved = [
        packed_convolution(
            x,
            kernel,
            source,
            targets,
            documents=None if documents is None else documents.of_rows,
            activation=activation,
            heads=sizes.num_heads if normalized else None,
            implementation=options["implementation"],
        )
        for (x, source, targets), kernel, activation, normalized in zip(
            taken,
            [None] * 3 if kernels is None else kernels,
            rule.convolution_activations,
            (*rule.normalized, False),
        )
    ]
    heads = [_reshape_last(x, shape) for x, shape in zip(convolved, shapes)]
    features = [_packed_feature(x, to_sets) for x in tokens.features]
    query, key, value, log_decay, beta = rule.prepare(*heads, *features)

    # Rows without a token change nothing, whatever the convolution left in them.
    filled = (packing.token >= 0)[..., None]
    if log_decay is not None:
        log_decay = ops.where(_like(filled, log_decay), log_decay, 0.0)
    if beta is None:
        beta = ops.cast(ops.broadcast_to(filled, ops.shape(query)[:3]), "float32")
    else:
        beta = ops.where(filled, beta, 0.0)

    segments = AlignedSegments(
        packing.chunk_offsets,
        size,
        block,
        None if documents is None else documents.resets,
    )
    outputs, memories = rule.scan(
        RowScan(options["implementation"], segments),
        query,
        key,
        value,
        log_decay,
        beta,
        None if state is None else state[0],
    )
    mixed = memory_mixing(
        outputs, weights, packing, norm, implementation=options["implementation"]
    )
    if not options["return_state"]:
        return mixed, None
    if documents is not None:
        stale = documents.stale[..., None, None, None]
        memories = ops.where(stale, 0.0, memories)
    if kernels is None:
        return mixed, (memories,)
    windows = last_windows(packing, documents, taken, sizes.history)
    return mixed, (memories, windows)


def mix_token(
    sizes, rule, kernels, norm, tokens, weights, indices, mask, state, options
):
    """`mix_sequence` for T == 1 without packing: every memory takes or skips the token.

    `state` is never None here.
    """
    batch = ops.shape(indices)[0]
    sets = ops.convert_to_tensor(sizes.projection_of_memory, "int32")

    def of_memories(x):
        return ops.take(x, sets, axis=1)

    index = ops.arange(sizes.num_memories, dtype="int32")
    chosen = indices[:, 0, :, None] == index
    active = ops.any(chosen, axis=1)
    weight = ops.sum(ops.where(chosen, weights[:, 0, :, None], 0.0), axis=1)
    if sizes.shared:
        active = pad(active, 1, after=1, fill=1)
        weight = pad(weight, 1, after=1, fill=1)
    if mask is not None:
        active = ops.logical_and(active, mask)

    query = ops.repeat(tokens.query, sizes.memories, axis=1)
    key = of_memories(_by_set(tokens.key, sizes.projections))
    value = of_memories(_by_set(tokens.value, sizes.projections))
    new_state = []
    if kernels is not None:
        flat = batch * sizes.memories
        window = ops.reshape(state[1], (flat, sizes.history, sum(sizes.channels)))
        convolved, moved = [], []
        for x, kernel, before, activation in zip(
            (query, key, value),
            kernels,
            _split_channels(sizes, window),
            rule.convolution_activations,
        ):
            output, after = short_convolution(
                ops.reshape(x, (flat, 1, x.shape[-1])),
                kernel,
                initial_state=before,
                return_state=True,
                activation=activation,
                implementation=options["implementation"],
            )
            convolved.append(ops.reshape(output, (batch, sizes.memories, x.shape[-1])))
            moved.append(ops.cast(after, "float32"))
        query, key, value = convolved
        moved = ops.reshape(ops.concatenate(moved, axis=-1), ops.shape(state[1]))
        new_state.append(ops.where(active[..., None, None], moved, state[1]))
    heads = [
        _reshape_last(x, (sizes.num_heads, width))
        for x, width in zip((query, key, value), _head_widths(sizes))
    ]
    for i, normalized in enumerate(rule.normalized):
        heads[i] = l2_normalize(heads[i]) if normalized else heads[i]
    features = [of_memories(x[:, 0]) for x in tokens.features]
    query, key, value, log_decay, beta = rule.prepare(*heads, *features)
    if log_decay is not None:
        log_decay = ops.where(_like(active[..., None], log_decay), log_decay, 0.0)
    if beta is None:
        beta = ops.ones(ops.shape(query)[:3], "float32")
    beta = ops.where(active[..., None], beta, 0.0)

    def one_step(x) -> Any:
        if x is None:
            return None
        shape = ops.shape(x)
        return ops.reshape(x, (batch * sizes.memories, 1, *shape[2:]))

    outputs, memories = rule.scan(
        RowScan(options["implementation"]),
        *[one_step(x) for x in (query, key, value, log_decay, beta)],
        one_step(state[0])[:, 0],
    )
    shape = (batch, sizes.memories, sizes.num_heads, sizes.value_dim)
    outputs = ops.cast(ops.reshape(outputs, shape), "float32")
    weight = ops.where(active, weight, 0.0)[..., None, None]
    # Memories that do not take the token are not read, not even times zero.
    outputs = ops.where(active[..., None, None], outputs * weight, 0.0)
    memories = ops.reshape(memories, ops.shape(state[0]))
    memories = ops.where(active[..., None, None, None], memories, state[0])
    return norm(ops.sum(outputs, axis=1)[:, None]), (memories, *new_state)


def _head_widths(sizes):
    return sizes.key_dim, sizes.key_dim, sizes.value_dim


def _by_set(x, sets):
    """`[B, T, sets * E]` to `[B, T * sets, E]`."""
    batch, length, width = ops.shape(x)
    return ops.reshape(x, (batch, length * sets, width // sets))


def _reshape_last(x, shape):
    return ops.reshape(x, (*ops.shape(x)[:-1], *shape))


def _like(mask, x):
    """`[B, R, 1]` with as many axes as `x`."""
    return ops.reshape(mask, (*ops.shape(mask), *[1] * (len(x.shape) - 3)))


def _split_channels(sizes, x):
    """Last axis to the channels of query, key and value."""
    query, key, _ = sizes.channels
    return x[..., :query], x[..., query : query + key], x[..., query + key :]


def _packed_feature(x, moves):
    """Rows `[B, R, ...]` of a rule's projection `[B, T, P, ...]`."""
    batch, length, sets, *rest = ops.shape(x)
    width = 1
    for size in rest:
        width = width * size
    rows = gather_rows(ops.reshape(x, (batch, length * sets, width)), *moves)
    return _reshape_last(rows, rest)


