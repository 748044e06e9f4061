"""From projected tokens to mixed outputs: packing, convolution, scan, mixing.

Names, beside B, T, H, K, V, M and k: P projection sets, J memories a token (k, and
the shared one), R packed rows a batch row, W convolution history.
"""

from typing import NamedTuple

from keras import ops

from keras_mom.layers.row_scan import RowScan
from keras_mom.ops.memory_scan import AlignedSegments, block_size, chunk_size
from keras_mom.ops.packing import Documents, Packing
from keras_mom.ops.padding import pad
from keras_mom.ops.rows import gather_rows, sum_rows
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
    sizes, rule, kernels, tokens, weights, indices, mask, segment_ids, state, options
):
    """Writes tokens to their memories and mixes what they read.

    Args:
        sizes: `Sizes`.
        rule: `MemoryUpdateRule`.
        kernels: convolution kernels of query, key and value, `[W + 1, channels]`
            each, or None.
        tokens: `Tokens`.
        weights: float32 `[B, T, k]`.
        indices: int32 `[B, T, k]`.
        mask: bool `[B, T]` or None.
        segment_ids: int32 `[B, T]` or None.
        state: (memories, windows), (memories,) without convolution, or None.
        options: dict: `implementation`, and whether to `return_state`.

    Returns:
        Mixed outputs, float32 `[B, T, H, V]`, and the new state, or None.
    """
    length = ops.shape(indices)[1]
    size, block = chunk_size(length), block_size(length)
    history = max(sizes.history, int(rule.read_before_update))
    packing = Packing(
        indices, sizes.num_memories, sizes.shared, mask, history, size, block
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
    rows = [
        _packed(packing, x, to, window)
        for x, to, window in zip(raw, [to_query, to_sets, to_sets], windows)
    ]
    convolved = rows
    if kernels is not None:
        convolved = [
            short_convolution(
                x,
                kernel,
                segment_ids=None if documents is None else documents.of_rows,
                activation=activation,
                implementation=options["implementation"],
            )
            for x, kernel, activation in zip(
                rows, kernels, rule.convolution_activations
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
    mixed = _mix(sizes, packing, outputs, weights)
    if not options["return_state"]:
        return mixed, None
    if documents is not None:
        stale = documents.stale[..., None, None, None]
        memories = ops.where(stale, 0.0, memories)
    if kernels is None:
        return mixed, (memories,)
    return mixed, (memories, _last_windows(sizes, packing, documents, rows))


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


def _packed(packing, inputs, moves, window):
    """Rows `[B, R, E]` of `[B, T * P, E]`, with the window in the history rows."""
    source, targets = moves
    if window is None:
        return gather_rows(inputs, source, targets)
    batch, memories, history, width = ops.shape(window)
    window = ops.cast(window, inputs.dtype)
    window = ops.reshape(window, (batch, memories * history, width))
    offset = ops.shape(inputs)[1]
    history_source, history_targets = packing.history_source(offset)
    missing = targets.shape[-1] - 1
    history_targets = pad(history_targets, 2, after=missing, fill=-1)
    return gather_rows(
        ops.concatenate([inputs, window], axis=1),
        ops.maximum(source, history_source),
        ops.concatenate([targets, history_targets], axis=1),
    )


def _packed_feature(x, moves):
    """Rows `[B, R, ...]` of a rule's projection `[B, T, P, ...]`."""
    batch, length, sets, *rest = ops.shape(x)
    width = 1
    for size in rest:
        width = width * size
    rows = gather_rows(ops.reshape(x, (batch, length * sets, width)), *moves)
    return _reshape_last(rows, rest)


def _mix(sizes, packing, outputs, weights):
    """Weighted sum of each token's rows: `[B, R, H, V]` to `[B, T, H, V]`."""
    batch, length, _ = ops.shape(weights)
    if sizes.shared:
        weights = pad(weights, 2, after=1, fill=1)
    slots = weights.shape[2]
    row_weights = gather_rows(
        ops.reshape(weights, (batch, length * slots, 1)),
        packing.slot,
        ops.reshape(packing.targets, (batch, length * slots, 1)),
    )
    rows = ops.shape(outputs)[1]
    width = sizes.num_heads * sizes.value_dim
    outputs = ops.reshape(ops.cast(outputs, "float32"), (batch, rows, width))
    mixed = sum_rows(outputs * row_weights, packing.token, packing.targets)
    return _reshape_last(mixed, (sizes.num_heads, sizes.value_dim))


def _last_windows(sizes, packing, documents, rows):
    """The convolution windows behind the last token: float32 `[B, M, W, channels]`."""
    last = packing.window_rows(sizes.history)
    windows = [ops.take_along_axis(x, last[..., None], axis=1) for x in rows]
    windows = ops.cast(ops.concatenate(windows, axis=-1), "float32")
    if documents is not None:
        number = ops.take_along_axis(documents.of_rows, last, axis=1)
        fresh = number == documents.last[:, None]
        windows = ops.where(fresh[..., None], windows, 0.0)
    batch, _, width = ops.shape(windows)
    shape = (batch, sizes.memories, sizes.history, width)
    return ops.reshape(windows, shape)
