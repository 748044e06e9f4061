"""The memory scan on TensorFlow, compiled by XLA.

    from keras_mom_kernels.memory_scan.tensorflow import memory_scan

Called eagerly, each direction is one compiled program, traced once for all lengths
and compiled for a few of them: rows are added up to the next. In a `tf.function` it
is part of that function's graph, which compiles with `jit_compile=True`, and which
can be saved and served. The backward pass keeps the inputs and one state a chunk.
"""

import functools
from typing import Any

import tensorflow as tf

from keras_mom_kernels.memory_scan import chunked_scan, tensorflow_arrays

# C, the rows of a chunk, and chunks a step of the loop.
CHUNK_SIZE = 64
_BLOCK_SIZE = 8


@tf.autograph.experimental.do_not_convert
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
    chunk_offsets=None,
    chunk_size=CHUNK_SIZE,
    resets=None,
    initial_state=None,
    scale=None,
):
    """Writes sequences into matrix-valued memories and reads them back, row by row.

    Per head, with a state `S` of `[K, V]` in float32 and `g_t = log_decay[t]`:

        S'  = diag(exp(g_t)) S_{t-1}
        r_t = k_t^T S'                  (k_t^T S_{t-1} with `erase_before_decay`)
        S_t = S' + k_t (beta_t (v_t - r_t))^T      (`r_t = 0` for additive writes)
        o_t = scale * q_t^T S_t

    Differentiable in query, key, value, log_decay, beta and initial_state. B and T may
    be unknown in a graph.

    Args:
        query, key: floating `[B, T, H, K]`.
        value: `[B, T, H, V]`.
        log_decay: at or below zero, `[B, T, H]` or `[B, T, H, K]`, or `[B, T, H, V]`
            with `decay_axis="value"`; None for no decay.
        beta: write strength `[B, T, H]`, or None for 1.
        write: `"delta"` or `"additive"`.
        erase_before_decay: whether the delta rule reads the state before its decay.
        decay_axis: `"key"`, or for additive writes `"value"`: the channels of a decay
            a channel, `S' = S_{t-1} diag(exp(g_t))`.
        cu_seqlens: int32 `[S + 1]` with B == 1: sequence s holds the rows
            `cu_seqlens[s]` to `cu_seqlens[s + 1] - 1`; rows behind the last give
            zeros. Its values are not checked.
        chunk_offsets: int32 `[B, S + 1]`: segment s of a batch row holds its chunks
            `chunk_offsets[s]` to `chunk_offsets[s + 1] - 1` of `chunk_size` rows; T is
            a multiple of it, and every chunk belongs to a segment.
        chunk_size: with `chunk_offsets`, a power of two.
        resets: int32 `[B, T]`, 1 at a row before which the state is emptied, or None;
            not with `cu_seqlens`.
        initial_state: float32 `[B, H, K, V]`; `[S, H, K, V]` with `cu_seqlens`,
            `[B, S, H, K, V]` with `chunk_offsets`. None for zeros.
        scale: factor of the query, `K ** -0.5` by default.

    Returns:
        Output `[B, T, H, V]`, of the dtype of `value`, and the final state, float32,
        shaped as `initial_state`.
    """
    dtype = value.dtype
    rows = [
        None if x is None else tf.cast(x, tf.float32)
        for x in (query, key, value, log_decay, beta)
    ]
    length = tensorflow_arrays.shape(query)[1]
    known = isinstance(length, int)
    if chunk_offsets is None and cu_seqlens is None and known:
        # Short sequences are one short chunk.
        chunk_size = min(CHUNK_SIZE, 1 << max(length - 1, 0).bit_length())
    block = _BLOCK_SIZE
    if known and cu_seqlens is None:
        chunks = -(-length // chunk_size)
        block = min(block, 1 << max(chunks - 1, 0).bit_length())
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    options = chunked_scan.ScanOptions(
        write, bool(erase_before_decay), chunk_size, block, scale, decay_axis
    )
    if cu_seqlens is not None:
        output, state = _packed(options, rows, cu_seqlens, initial_state)
    else:
        output, state = _padded(options, rows, resets, chunk_offsets, initial_state)
    return tf.cast(output, dtype), state


def _padded(options, rows, resets, chunk_offsets, initial_state):
    """Rows are added, which hold nothing, up to whole blocks of chunks."""
    length = tensorflow_arrays.shape(rows[0])[1]
    step = options.chunk_size * options.block_size
    blocks = _bucket(-(-length // step))
    missing = blocks * step - length
    alone = chunk_offsets is None
    if alone and initial_state is not None:
        initial_state = initial_state[:, None]
    if not alone:
        # Chunks behind all segments count as the last one's.
        last = tf.zeros_like(chunk_offsets[:, :1]) + blocks * options.block_size
        chunk_offsets = tf.concat([chunk_offsets[:, :-1], last], axis=1)
    rows, resets = [_with_rows(x, missing) for x in rows], _with_rows(resets, missing)
    output, state = _scan(options, *rows, resets, chunk_offsets, initial_state)
    return output[:, :length], state[:, 0] if alone else state


def _bucket(blocks):
    """The least number, at most a quarter above `blocks`, that is compiled for.

    In a graph of known lengths, `blocks` itself.
    """
    if isinstance(blocks, int):
        if not tf.executing_eagerly():
            return blocks
        unit = 1 << max(blocks.bit_length() - 3, 0)
        return -(-blocks // unit) * unit
    powers = tf.constant([1 << i for i in range(28)])
    unit = tf.reduce_max(tf.where(4 * powers <= blocks, powers, 1))
    return -(-blocks // unit) * unit


def _with_rows(x, missing):
    """`[B, T, ...]` with rows of zeros behind."""
    if x is None or (isinstance(missing, int) and missing == 0):
        return x
    return tf.pad(x, [[0, 0], [0, missing], *[[0, 0]] * (len(x.shape) - 2)])


def _packed(options, rows, cu_seqlens, initial_state):
    """Packed sequences: each is moved to a place that begins with a whole chunk."""
    size = options.chunk_size
    cu_seqlens = tf.cast(cu_seqlens, tf.int32)
    length = tensorflow_arrays.shape(rows[0])[1]
    segments = tensorflow_arrays.shape(cu_seqlens)[0] - 1
    blocks = -(-(length + segments * (size - 1)) // (size * options.block_size))
    chunks = _bucket(blocks) * options.block_size
    starts, lengths = cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1]
    offsets = tf.pad(tf.cumsum(-(-lengths // size)), [[1, 0]])

    def sequence(row, borders):
        found = tf.searchsorted(borders[1:], row, side="right")
        return tf.minimum(found, segments - 1)

    # Where each packed row goes, and where each aligned row comes from.
    row = tf.range(length)
    own = sequence(row, cu_seqlens)
    target = tf.gather(offsets, own) * size + row - tf.gather(starts, own)
    target = tf.where(row < cu_seqlens[-1], target, -1)
    aligned = tf.range(chunks * size)
    own = sequence(aligned, offsets * size)
    place = aligned - tf.gather(offsets, own) * size
    source = tf.gather(starts, own) + place
    source = tf.where(place < tf.gather(lengths, own), source, -1)

    offsets = tf.concat([offsets[:-1], tf.zeros_like(offsets[:1]) + chunks], axis=0)
    if initial_state is not None:
        initial_state = initial_state[None]
    moved = [None if x is None else _move(x, source, target) for x in rows]
    output, state = _scan(options, *moved, None, offsets[None], initial_state)
    return _move(output, target, source), state[0]


def _move(x, source, target) -> Any:
    """Rows `source` of `x`, `[1, T, ...]`, zeros for -1; `target` is its inverse."""

    @tf.custom_gradient
    def moved(x):
        return _taken(x, source), lambda grad: _taken(grad, target)

    return moved(x)


def _taken(x, index):
    taken = tf.gather(x, tf.maximum(index, 0), axis=1)
    there = tf.reshape(index >= 0, (1, -1, *[1] * (len(x.shape) - 2)))
    return tf.where(there, taken, tf.zeros((), x.dtype))


def _scan(options, *tensors) -> Any:
    """`chunked_scan.forward` with its gradient; output and final state."""
    present = tuple(x is not None for x in tensors)
    values = [x for x in tensors if x is not None]

    @tf.custom_gradient
    def function(*values):
        forward, backward = _directions(options, present)
        if tf.executing_eagerly():
            shapes = _open_shapes(values, present)
            forward, backward = _compiled(options, present, shapes)
        # What is compiled has no gradient of its own: it need not be recorded.
        constants = tuple(tf.stop_gradient(x) for x in values)
        outputs = forward(constants)

        # Of `values` too, so that a second gradient comes to what refuses it.
        @tf.custom_gradient
        def first_gradient(output_grad, final_grad, *_):
            grads = (tf.stop_gradient(output_grad), tf.stop_gradient(final_grad))
            return tuple(backward(constants, outputs, grads)), _no_second_gradient

        def gradient(*of_outputs):
            grads = iter(first_gradient(*of_outputs, *values))
            return [next(grads) if x.dtype.is_floating else None for x in values]

        return outputs[:2], gradient

    return function(*values)


def _no_second_gradient(*_):
    raise NotImplementedError(
        "The memory scan on TensorFlow has no second gradient, as of a gradient "
        'penalty. Expected: `implementation="portable"`.'
    )


def _directions(options, present):
    """Functions of the tensors that are present, as tuples."""

    def forward(values):
        tensors = _restored(values, present)
        return chunked_scan.forward(tensorflow_arrays, options, *tensors)

    def backward(values, outputs, gradients):
        tensors = _restored(values, present)
        grads = chunked_scan.backward(
            tensorflow_arrays, options, tensors, outputs, gradients
        )
        return tuple(
            grad
            for grad, tensor in zip(grads, tensors)
            if tensor is not None and tensor.dtype.is_floating
        )

    return forward, backward


@functools.cache
def _compiled(options, present, shapes):
    """The two directions, one program each, for batches and times of any size.

    Args:
        options: `ScanOptions`.
        present: which of the tensors there are.
        shapes: their names of dtypes and sizes, all but those of batch and time.
    """
    forward, backward = _directions(options, present)
    inputs = tuple(tf.TensorSpec(shape, dtype) for dtype, shape in shapes)
    query, _, value, *_ = inputs
    *_, offsets, initial = _restored(inputs, present)
    segments = 1
    if offsets is not None:
        segments = offsets.shape[1] - 1
    elif initial is not None:
        segments = initial.shape[1]
    state = (query.shape[2], query.shape[3], value.shape[3])
    output = tf.TensorSpec(value.shape)
    final = tf.TensorSpec((None, segments, *state))
    before = tf.TensorSpec((None, None, *state))
    # Python has no loop here that depends on a tensor: AutoGraph would rewrite all of
    # it for nothing, which takes seconds.
    program = functools.partial(tf.function, jit_compile=True, autograph=False)
    gradients = (inputs, (output, final, before), (output, final))
    return (
        program(forward, input_signature=(inputs,)),
        program(backward, input_signature=gradients),
    )


def _open_shapes(values, present):
    """Dtype and shape of each tensor, with None for sizes of batch and time."""
    places = [i for i, there in enumerate(present) if there]
    # Rows, [B, T, ...], come first; chunk_offsets and initial_state are [B, S, ...].
    return tuple(
        (x.dtype.name, (None, None if place < 6 else x.shape[1], *x.shape[2:]))
        for place, x in zip(places, values)
    )


def _restored(values, present):
    """`values` with None where there are none."""
    values = iter(values)
    return [next(values) if there else None for there in present]
