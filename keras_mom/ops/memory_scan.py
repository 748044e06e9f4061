"""The memory scan: one linear recurrence that serves every update rule."""

import math
import numbers
from typing import NamedTuple

from keras import ops

from keras_mom import backend
from keras_mom.ops.chunked_scan import ScanOptions, chunked_scan
from keras_mom.ops.cu_seqlens import checked_cu_seqlens, sequence_of
from keras_mom.ops.dispatch import dispatch, preferred, register
from keras_mom.ops.padding import pad
from keras_mom.ops.rows import gather_rows

# C, the rows of a chunk.
CHUNK_SIZE = 64
# Chunks a step of the loop: what it computes then stays in the processor's cache.
BLOCK_SIZE = 8


class AlignedSegments(NamedTuple):
    """Segments that begin at whole chunks, several in each batch row.

    The layer packs so; `cu_seqlens` packs without gaps. Rows that hold no token have
    a beta of 0 and a log decay of 0.

    Attributes:
        chunk_offsets: int32 `[B, S + 1]`, in the sense of `chunked_scan`.
        chunk_size: C.
        block_size: the number of chunks of a batch row is a multiple of this.
        resets: int32 `[B, T]`, 1 before rows where the state is emptied, or None.
    """

    chunk_offsets: object
    chunk_size: int
    block_size: int
    resets: object


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
    return_state=False,
    scale=None,
    implementation=None,
):
    """Writes a sequence into a matrix-valued memory and reads it back, row by row.

    Per head, with a state `S` of `[K, V]` in float32 and `g_t = log_decay[t]`:

        S'  = diag(exp(g_t)) S_{t-1}
        r_t = k_t^T S'                  (k_t^T S_{t-1} with `erase_before_decay`)
        S_t = S' + k_t (beta_t (v_t - r_t))^T      (`r_t = 0` for additive writes)
        o_t = scale * q_t^T S_t

    With `decay_axis="value"` the decay is one a value channel: `S' = S_{t-1}
    diag(exp(g_t))`.

    Time and the memory of a training step grow linearly with T.

    Source: the rules of Table 1 of arXiv 2502.13685; the chunkwise form of the delta
    rule is that of arXiv 2406.06484, of its decays that of arXiv 2412.06464.

    Args:
        query, key: float `[B, T, H, K]`.
        value: float `[B, T, H, V]`.
        log_decay: natural logarithm of the decay of a step, at or below zero: float
            `[B, T, H]`, one a head, or `[B, T, H, K]`, one a key channel
            (`[B, T, H, V]` with `decay_axis="value"`). None means no decay.
        beta: write strength, float `[B, T, H]`. None means 1.
        write: `"delta"` replaces what the key reads; `"additive"` adds to it.
        erase_before_decay: whether the delta rule reads the state before the step's
            decay rather than after it.
        decay_axis: `"key"`, or for additive writes `"value"`: which channels of the
            state the last axis of `log_decay` belongs to.
        cu_seqlens: int32 `[S + 1]`, with B == 1: row `cu_seqlens[s]` is the first of
            sequence s, and `cu_seqlens[s + 1]` the first behind it. Starts with 0
            and does not decrease. Rows behind the last sequence give zeros. None
            means B sequences of T rows.
        initial_state: float32 `[B, H, K, V]`, or `[S, H, K, V]` with `cu_seqlens`.
            None means zeros.
        return_state: whether to return the state behind each sequence too.
        scale: factor of the query, a number, `K ** -0.5` by default. What is learned is
            multiplied with the query instead.
        implementation: `None` for the fastest that works here, or one of
            `keras_mom.config.IMPLEMENTATIONS`, which is used or raises.

    Returns:
        Output `[B, T, H, V]`, of the dtype of `value`; with `return_state` also the
        final state, float32 `[B, H, K, V]` or `[S, H, K, V]`.

    Raises:
        ValueError: if a shape, a dtype, `write`, `decay_axis` or `cu_seqlens` does
            not fit.
        NotImplementedError: if a named implementation cannot serve the call.
    """
    query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
    log_decay, beta = _optional_tensor(log_decay), _optional_tensor(beta)
    initial_state = _optional_tensor(initial_state)
    if len(query.shape) != 4:
        raise ValueError(
            f"`query` must have shape [B, T, H, K]. Received: {tuple(query.shape)}"
        )
    if cu_seqlens is not None:
        cu_seqlens = checked_cu_seqlens(cu_seqlens, "query", query.shape[1])
    _check_decay_axis(decay_axis, write, log_decay)
    decayed = key if decay_axis == "key" else value
    _check(
        query, key, value, log_decay, decayed, beta, write, cu_seqlens, initial_state
    )
    if erase_before_decay and write != "delta":
        raise ValueError(
            "`erase_before_decay` needs `write='delta'`: additive writes erase "
            f"nothing. Received: write={write!r}"
        )
    output, state = dispatch(
        "memory_scan",
        implementation,
        query,
        key,
        value,
        log_decay=log_decay,
        beta=beta,
        write=write,
        erase_before_decay=bool(erase_before_decay),
        decay_axis=decay_axis,
        cu_seqlens=cu_seqlens,
        aligned=None,
        initial_state=initial_state,
        scale=query.shape[-1] ** -0.5 if scale is None else _number(scale),
    )
    return (output, state) if return_state else output


def _number(scale):
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise ValueError(
            "`scale` must be a number: a tensor would get no gradient. "
            f"Received: {type(scale).__name__}"
        )
    return float(scale)


def chunk_size(length, implementation="portable"):
    """Rows a chunk for sequences of `length` rows, which may be unknown (None).

    Args:
        length: T.
        implementation: as in `memory_scan`. Pallas kernels have a smallest chunk.
    """
    if not isinstance(length, int):
        return CHUNK_SIZE
    least = 16 if preferred("memory_scan", implementation) == "pallas" else 1
    return min(CHUNK_SIZE, max(least, 1 << max(length - 1, 0).bit_length()))


def block_size(length, implementation="portable"):
    """Chunks a step of the loop for sequences of `length` rows (None: unknown).

    Args:
        length: T.
        implementation: as in `memory_scan`. Kernels have no use for several.
    """
    name = preferred("memory_scan", implementation)
    if name in ("triton", "pallas"):
        return 1
    if not isinstance(length, int):
        return BLOCK_SIZE
    chunks = -(-length // CHUNK_SIZE)
    return min(BLOCK_SIZE, 1 << max(chunks - 1, 0).bit_length())


@register("memory_scan", "portable")
def _portable(
    query,
    key,
    value,
    *,
    log_decay,
    beta,
    write,
    erase_before_decay,
    decay_axis,
    cu_seqlens,
    aligned,
    initial_state,
    scale,
):
    tensors = [
        None if x is None else ops.cast(x, "float32")
        for x in (query, key, value, log_decay, beta)
    ]
    size, block = chunk_size(query.shape[1]), block_size(query.shape[1])
    if aligned is not None:
        size, block = aligned.chunk_size, aligned.block_size
    options = ScanOptions(
        write, erase_before_decay, size, block, float(scale), decay_axis
    )
    if aligned is not None:
        output, state = chunked_scan(
            options,
            *tensors,
            resets=aligned.resets,
            chunk_offsets=aligned.chunk_offsets,
            initial_state=initial_state,
        )
    elif cu_seqlens is not None:
        output, state = _packed(options, tensors, cu_seqlens, initial_state)
    elif query.shape[1] == 1:
        output, state = _single_step(options, *tensors, state=initial_state)
    else:
        output, state = _padded(options, tensors, initial_state)
    return ops.cast(output, value.dtype), state


def _single_step(options, query, key, value, log_decay, beta, state):
    """T == 1: the recurrence itself."""
    query, key, value = query[:, 0], key[:, 0], value[:, 0]
    if state is None:
        batch, heads, key_dim = ops.shape(key)
        state = ops.zeros((batch, heads, key_dim, value.shape[-1]), "float32")
    decayed = state
    if log_decay is not None:
        decay = ops.exp(log_decay[:, 0])
        if options.decay_axis == "value":
            decay = decay[:, :, None]
        decay = ops.reshape(decay, (*ops.shape(decay), *[1] * (4 - len(decay.shape))))
        decayed = decay * state
    with backend.full_precision():
        if options.write == "delta":
            read_from = state if options.erase_before_decay else decayed
            value = value - ops.einsum("bhk,bhkv->bhv", key, read_from)
        if beta is not None:
            value = value * beta[:, 0, :, None]
        state = decayed + key[..., :, None] * value[..., None, :]
        output = ops.einsum("bhk,bhkv->bhv", query * options.scale, state)
    return output[:, None], state


def _padded(options, tensors, initial_state):
    """One sequence a batch row: rows are added up to a whole chunk."""
    length = ops.shape(tensors[0])[1]
    missing = -length % (options.chunk_size * options.block_size)

    if initial_state is not None:
        initial_state = initial_state[:, None]
    output, state = chunked_scan(
        options,
        *[x if x is None else pad(x, 1, after=missing) for x in tensors],
        initial_state=initial_state,
    )
    return output[:, :length], state[:, 0]


def _packed(options, tensors, cu_seqlens, initial_state):
    """Packed sequences: each is moved to a place that begins with a whole chunk."""
    size = options.chunk_size
    rows = ops.shape(tensors[0])[1]
    segments = cu_seqlens.shape[0] - 1
    chunks = (rows + segments * (size - 1)) // size
    chunks = -(-chunks // options.block_size) * options.block_size
    starts, lengths = cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1]
    offsets = ops.cumsum((lengths + (size - 1)) // size)
    offsets = pad(offsets, 0, before=1)

    # Where each packed row goes, and where each aligned row comes from.
    row = ops.arange(rows, dtype="int32")
    segment = sequence_of(row, cu_seqlens)
    target = ops.take(offsets[:-1], segment) * size + row - ops.take(starts, segment)
    target = ops.where(row < cu_seqlens[-1], target, -1)
    aligned = ops.arange(chunks * size, dtype="int32")
    segment = sequence_of(aligned, offsets * size)
    place = aligned - ops.take(offsets[:-1], segment) * size
    source = ops.where(
        place < ops.take(lengths, segment), ops.take(starts, segment) + place, -1
    )
    source, target = source[None], target[None, :, None]

    def move(x, source, target):
        if x is None:
            return None
        shape = ops.shape(x)
        flat = ops.reshape(x, (1, shape[1], math.prod(x.shape[2:])))
        moved = gather_rows(flat, source, target)
        return ops.reshape(moved, (1, ops.shape(moved)[1], *shape[2:]))

    # Chunks behind the last sequence count as the last one's; they hold nothing.
    offsets = ops.concatenate([offsets[:-1], ops.zeros((1,), "int32") + chunks])
    if initial_state is not None:
        initial_state = initial_state[None]
    output, state = chunked_scan(
        options,
        *[move(x, source, target) for x in tensors],
        chunk_offsets=offsets[None],
        initial_state=initial_state,
    )
    return move(output, target[..., 0], source[..., None]), state[0]


def _optional_tensor(x):
    return None if x is None else ops.convert_to_tensor(x)


def _check_decay_axis(decay_axis, write, log_decay):
    if decay_axis not in ("key", "value"):
        raise ValueError(
            "`decay_axis` must be 'key' or 'value'. "
            f"Received: decay_axis={decay_axis!r}"
        )
    if decay_axis == "key":
        return
    if write != "additive":
        raise ValueError(
            f"`decay_axis='value'` needs `write='additive'`. Received: write={write!r}"
        )
    if log_decay is not None and len(log_decay.shape) == 3:
        raise ValueError(
            "`log_decay` must have shape [B, T, H, V] with `decay_axis='value'`. "
            f"Received: {tuple(log_decay.shape)}"
        )


def _check(
    query, key, value, log_decay, decayed, beta, write, cu_seqlens, initial_state
):
    if write not in ("delta", "additive"):
        raise ValueError(
            f"`write` must be 'delta' or 'additive'. Received: write={write!r}"
        )
    batch, length, heads, key_dim = query.shape
    rows = (batch, length, heads)
    _check_shape("key", key, (*rows, key_dim))
    _check_shape("value", value, (*rows, None))
    if log_decay is not None and len(log_decay.shape) == 3:
        _check_shape("log_decay", log_decay, rows)
    elif log_decay is not None:
        _check_shape("log_decay", log_decay, (*rows, decayed.shape[-1]))
    if beta is not None:
        _check_shape("beta", beta, rows)
    sequences = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(
                "`cu_seqlens` packs sequences in one batch row. "
                f"Received: `query` of shape {tuple(query.shape)}"
            )
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        shape = (sequences, heads, key_dim, value.shape[-1])
        _check_shape("initial_state", initial_state, shape)
        if "float32" not in str(initial_state.dtype):
            raise ValueError(
                "`initial_state` must be float32. "
                f"Received: dtype {initial_state.dtype}"
            )
    named = {"query": query, "key": key, "value": value}
    named |= {"log_decay": log_decay, "beta": beta}
    for name, tensor in named.items():
        if tensor is not None and "float" not in str(tensor.dtype):
            raise ValueError(
                f"`{name}` must be of a float dtype. Received: {tensor.dtype}"
            )


def _check_shape(name, tensor, expected):
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        size is None or want is None or size == want
        for size, want in zip(shape, expected)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(
            f"`{name}` must have shape [{wanted}] to fit `query`. Received: {shape}"
        )
