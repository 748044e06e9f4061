"""From projected tokens to mixed outputs: packing, convolution, scan, mixing.

Names, beside B, T, H, K, V, M and k: P projection sets, J memories a token (k, and
the shared one), R packed rows a batch row, W convolution history.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_mom.layers.row_scan import RowScan
from keras_mom.ops.constants import select
from keras_mom.ops.memory_mixing import memory_mixing
from keras_mom.ops.memory_projection import memory_projection
from keras_mom.ops.memory_scan import AlignedSegments, block_size, chunk_size
from keras_mom.ops.packed_convolution import (
    behind_windows,
    last_windows,
    packed_convolution,
)
from keras_mom.ops.packing import Documents, Packing


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
    """Tokens, and what is projected from them.

    Attributes:
        inputs: `[B, T, D]`.
        query: `[B, T, H * K]`.
        key_projection: from `inputs` to `[B, T, P * H * K]`.
        value_projection: from `inputs` to `[B, T, P * H * V]`.
        features: the rule's projections, each `[B, T, P, ...]`.
    """

    inputs: Any
    query: Any
    key_projection: Any
    value_projection: Any
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
        options: dict: `implementation`, and whether to `return_state`. For a single
            token, whether the state may be overwritten (`in_place`).

    Returns:
        Mixed outputs, `[B, T, H * V]` of the dtype of `norm`, and the new state, or
        None.
    """
    length = ops.shape(indices)[1]
    size = chunk_size(length, options["implementation"])
    block = block_size(length, options["implementation"])
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
    projected = [
        (tokens.query, *packing.source(1)),
        *memory_projection(
            tokens.inputs,
            (tokens.key_projection, tokens.value_projection),
            packing,
            sizes.projections,
            implementation=options["implementation"],
        ),
    ]
    windows = [None] * 3
    if state is not None and sizes.history:
        windows = _split_channels(sizes, state[1])
    taken = [
        behind_windows(packing, x, moves, window)
        for (x, *moves), window in zip(projected, windows)
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
    to_sets = packing.source(sizes.projections)
    features = [
        _packed_feature(x, to_sets, options["implementation"]) for x in tokens.features
    ]
    query, key, value, log_decay, beta = rule.prepare(*heads, *features)

    # Rows without a token change nothing, whatever the convolution left in them.
    filled = (packing.token >= 0)[..., None]
    if log_decay is not None:
        log_decay = select(_like(filled, log_decay), log_decay, 0.0)
    if beta is None:
        beta = ops.cast(ops.broadcast_to(filled, ops.shape(query)[:3]), "float32")
    else:
        beta = select(filled, beta, 0.0)

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
        memories = select(ops.logical_not(stale), memories, 0.0)
    if kernels is None:
        return mixed, (memories,)
    windows = last_windows(packing, documents, taken, sizes.history)
    return mixed, (memories, windows)


def _head_widths(sizes):
    return sizes.key_dim, sizes.key_dim, sizes.value_dim


def _reshape_last(x, shape):
    return ops.reshape(x, (*ops.shape(x)[:-1], *shape))


def _like(mask, x):
    """`[B, R, 1]` with as many axes as `x`."""
    return ops.reshape(mask, (*ops.shape(mask), *[1] * (len(x.shape) - 3)))


def _split_channels(sizes, x):
    """Last axis to the channels of query, key and value."""
    query, key, _ = sizes.channels
    return x[..., :query], x[..., query : query + key], x[..., query + key :]


def _packed_feature(x, moves, implementation):
    """Rows `[B, R, ...]` of a rule's projection `[B, T, P, ...]`."""
    batch, length, sets, *rest = ops.shape(x)
    width = 1
    for size in rest:
        width = width * size
    x = ops.reshape(x, (batch, length * sets, width))
    rows = packed_convolution(
        x, None, *moves, activation=None, implementation=implementation
    )
    return _reshape_last(rows, rest)
