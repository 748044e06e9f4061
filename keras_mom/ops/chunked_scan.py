"""The portable memory scan: chunkwise, with its gradient written by hand.

Rows come in chunks of C. Inside a chunk everything is a batched product; between
chunks a state of `[K, V]` a head is handed on. The backward pass keeps the inputs
and one state a chunk, and computes the rest again.

With `G` the running sum of log decays in a chunk, `S` the state before it, and `L`
the decayed key products below the diagonal, times the write strength:

    (I + L) U = beta (V - (K exp(G)) S)           what each row writes (delta rule)
    O         = scale (Q exp(G)) S + P U          P: decayed query-key products
    S_next    = exp(G_C) S + (K exp(G_C - G))^T U

"Erase before decay" reads with the decay of the row before, `G_t - g_t`.
"""

from typing import NamedTuple

from keras import ops

from keras_mom import backend
from keras_mom.ops.chunk_math import (
    CumulativeDecay,
    channel_pairs,
    channel_pairs_gradient,
    head_decay_matrix,
    head_pair_log_decay_gradient,
    lower_mask,
    shift_down,
    transposed,
    unit_lower_inverse,
)


class ScanOptions(NamedTuple):
    """What does not change from call to call.

    Attributes:
        write: `"delta"` or `"additive"`.
        erase_before_decay: whether the delta rule reads the state before its decay.
        chunk_size: C, a power of two that divides the number of rows.
        scale: factor of the query.
    """

    write: str
    erase_before_decay: bool
    chunk_size: int
    scale: float


def chunked_scan(
    options,
    query,
    key,
    value,
    log_decay=None,
    beta=None,
    resets=None,
    chunk_offsets=None,
    initial_state=None,
):
    """Runs the recurrence over rows that are whole chunks of one segment each.

    Args:
        options: `ScanOptions`.
        query, key: float32 `[B, T, H, K]`, T a multiple of C.
        value: float32 `[B, T, H, V]`.
        log_decay: float32 `[B, T, H]` or `[B, T, H, K]`, or None for no decay.
        beta: float32 `[B, T, H]`, or None for 1.
        resets: int32 `[B, T]`, 1 at a row before which the state is emptied, or None.
        chunk_offsets: int32 `[B, S + 1]`: segment s of a batch row holds the chunks
            `chunk_offsets[s]` to `chunk_offsets[s + 1] - 1`. The first entry is 0,
            the last T / C. None for one segment a batch row.
        initial_state: float32 `[B, S, H, K, V]`, or None for zeros.

    Returns:
        Output `[B, T, H, V]` and final state `[B, S, H, K, V]`, float32.
    """
    output, final_state, _ = _SCAN(
        options,
        query,
        key,
        value,
        log_decay,
        beta,
        resets,
        chunk_offsets,
        initial_state,
    )
    return output, final_state


def _split(x, size):
    """Rows to chunks: `[B, T, H, ...]` to `[T / C, B, H, C, ...]`."""
    shape = ops.shape(x)
    x = ops.reshape(x, (shape[0], shape[1] // size, size, *shape[2:]))
    return ops.transpose(x, (1, 0, 3, 2, *range(4, len(x.shape))))


def _merge(x):
    """Chunks to rows: `[T / C, B, H, C, ...]` to `[B, T, H, ...]`."""
    x = ops.transpose(x, (1, 0, 3, 2, *range(4, len(x.shape))))
    shape = ops.shape(x)
    return ops.reshape(x, (shape[0], shape[1] * shape[2], *shape[3:]))


class _Segments:
    """Which chunk begins and ends which segment, and the states handed in there."""

    def __init__(self, chunk_offsets, chunks, batch):
        self.alone = chunk_offsets is None
        if chunk_offsets is None:
            chunk_offsets = ops.stack(
                [ops.zeros((batch,), "int32"), ops.full((batch,), chunks, "int32")], 1
            )
        self.count = chunk_offsets.shape[1] - 1
        self.batch = batch
        starts, ends = chunk_offsets[:, :-1], chunk_offsets[:, 1:]
        self.starts, self.ends, self.occupied = starts, ends, ends > starts
        index = ops.arange(chunks, dtype="int32")
        segment = ops.sum(
            ops.cast(index[:, None, None] >= starts[None, :, 1:], "int32"), axis=-1
        )
        row = ops.arange(batch, dtype="int32") * self.count
        # [chunks, B]: the segment's place among all segments of the call.
        self.place = segment + row
        self.first = index[:, None] == ops.take(ops.reshape(starts, (-1,)), self.place)
        self.last = index[:, None] + 1 == ops.take(ops.reshape(ends, (-1,)), self.place)

    def first_carry(self, states, empty):
        """What a loop begins with. With one segment a row, no border follows."""
        return empty if states is None or not self.alone else states[:, 0]

    def handed_in(self, carry, at_border, place, states):
        """The carry, or the given (or empty) state where a segment's border lies."""
        if self.alone:
            return carry
        if states is None:
            states = ops.zeros_like(carry)
        else:
            shape = ops.shape(states)
            states = ops.take(
                ops.reshape(states, (shape[0] * shape[1], *shape[2:])), place, axis=0
            )
        return ops.where(at_border[:, None, None, None], states, carry)

    def pick(self, chunk_values, chunk_index):
        """`[chunks, B, ...]` at `chunk_index` `[B, S]`: `[B, S, ...]`."""
        chunks = ops.shape(chunk_values)[0]
        index = ops.clip(chunk_index, 0, chunks - 1) * self.batch
        index = index + ops.arange(self.batch, dtype="int32")[:, None]
        shape = ops.shape(chunk_values)
        flat = ops.reshape(chunk_values, (shape[0] * shape[1], *shape[2:]))
        picked = ops.take(flat, ops.reshape(index, (-1,)), axis=0)
        return ops.reshape(picked, (self.batch, self.count, *shape[2:]))

    def or_empty(self, picked, states):
        """`picked` for segments that have chunks, `states` (or zeros) for the others."""
        if states is None:
            states = ops.zeros_like(picked)
        return ops.where(self.occupied[..., None, None, None], picked, states)


class _Chunks:
    """Everything about the chunks that both directions need, from the inputs."""

    def __init__(
        self, options, query, key, value, log_decay, beta, resets, chunk_offsets
    ):
        size = options.chunk_size
        self.options = options
        self.query, self.key = _split(query, size), _split(key, size)
        self.value = _split(value, size)
        self.beta = None if beta is None else _split(beta, size)[..., None]
        shape = ops.shape(self.key)
        self.count, self.batch = shape[0], shape[1]
        self.segments = _Segments(chunk_offsets, self.count, self.batch)
        self.delta = options.write == "delta"
        self.per_channel = log_decay is not None and len(log_decay.shape) == 4
        self._decays(log_decay)
        if resets is not None:
            self._resets(_split(resets[:, :, None], size))
        self._products()

    def _decays(self, log_decay):
        # Factors of the rows: decay into the query, into the key that reads, from a
        # row to the end of the chunk, and of the state over the whole chunk.
        # `None` stands for no decay.
        self.decay = self.decay_matrix = self.erase_matrix = None
        self.into_query = self.into_key = self.to_end = self.whole = None
        if log_decay is None:
            size = self.options.chunk_size
            self.decay_matrix = lower_mask(size)
            self.erase_matrix = lower_mask(size, -1)
            return
        chunks = _split(log_decay, self.options.chunk_size)
        self.decay = CumulativeDecay.of(chunks, axis=3)
        self.erase_decay = self.decay
        if self.options.erase_before_decay:
            self.erase_decay = self.decay.map(lambda x: shift_down(x, axis=3))
        end = self.decay.map(lambda x: x[:, :, :, -1:])
        factors = [
            self.decay.exp(),
            self.erase_decay.exp(),
            ops.exp(end.minus(self.decay)),
            end.exp(),
        ]
        if self.per_channel:
            factors[3] = transposed(factors[3])
        else:
            factors = [factor[..., None] for factor in factors]
            self.decay_matrix = head_decay_matrix(self.decay)
            if self.options.erase_before_decay:
                self.erase_matrix = shift_down(self.decay_matrix, axis=-2)
            else:
                strict = lower_mask(self.options.chunk_size, -1)
                self.erase_matrix = self.decay_matrix * strict
        self.into_query, self.into_key, self.to_end, self.whole = factors

    def _resets(self, resets):
        # Rows between which a reset lies do not see each other.
        count = ops.cumsum(resets, axis=3)
        same = ops.cast(count[..., :, None] == count[..., None, :], "float32")
        from_start = ops.cast(count == 0, "float32")[..., None]
        until_end = ops.cast(count == count[..., -1:], "float32")[..., None]
        untouched = from_start[:, :, :, -1:]
        self.same = same
        if self.decay_matrix is not None:
            self.decay_matrix = self.decay_matrix * same
            self.erase_matrix = self.erase_matrix * same
        self.into_query = _times(from_start, self.into_query)
        self.into_key = _times(from_start, self.into_key)
        self.to_end = _times(until_end, self.to_end)
        self.whole = _times(untouched, self.whole)

    same = None

    def _products(self):
        self.reading_query = _times(self.query * self.options.scale, self.into_query)
        self.ending_key = _times(self.key, self.to_end)
        self.attention = self.options.scale * self._pairs(
            self.query, self.decay_matrix, self.decay, inclusive=True
        )
        if self.delta:
            self.reading_key = _times(self.key, self.into_key)
            self.erase = self._pairs(
                self.key, self.erase_matrix, self._row_decay, inclusive=False
            )
            self.inverse = unit_lower_inverse(_times(self.erase, self.beta))

    @property
    def _row_decay(self):
        return self.erase_decay if self.per_channel else None

    def _pairs(self, left, matrix, left_decay, inclusive):
        if not self.per_channel:
            return ops.matmul(left, transposed(self.key)) * matrix
        pairs = channel_pairs(left, self.key, left_decay, self.decay, inclusive)
        return pairs if self.same is None else pairs * self.same

    def reading_weights(self):
        """What a state takes from the rows' writes: `U = U0 - weights S`."""
        return ops.matmul(self.inverse, _times(self.reading_key, self.beta))

    def pairs_gradient(self, gradient, left, matrix, left_decay, inclusive):
        """Gradients of left, key and log decay from those of `_pairs`."""
        exclusive = self.options.erase_before_decay and not inclusive
        if self.per_channel:
            if self.same is not None:
                gradient = gradient * self.same
            return channel_pairs_gradient(
                gradient, left, self.key, left_decay, self.decay, inclusive, exclusive
            )
        weighted = gradient * matrix
        log_decay_gradient = None
        if self.decay is not None:
            products = weighted * ops.matmul(left, transposed(self.key))
            log_decay_gradient = head_pair_log_decay_gradient(products, exclusive)
        return (
            ops.matmul(weighted, self.key),
            ops.matmul(transposed(weighted), left),
            log_decay_gradient,
        )


def _times(x, factor):
    return x if factor is None else x * factor


def _forward(options, query, key, value, log_decay, beta, resets, offsets, initial):
    with backend.full_precision():
        chunks = _Chunks(options, query, key, value, log_decay, beta, resets, offsets)
        segments = chunks.segments
        writes = _times(chunks.value, chunks.beta)
        if chunks.delta:
            writes = ops.matmul(chunks.inverse, writes)
            states, writes = _run_delta(chunks, writes, initial)
        else:
            states = _run_additive(chunks, writes, initial)
        output = ops.matmul(chunks.reading_query, states)
        output = output + ops.matmul(chunks.attention, writes)
        last = segments.ends - 1
        final = ops.matmul(
            transposed(segments.pick(chunks.ending_key, last)),
            segments.pick(writes, last),
        )
        whole = None if chunks.whole is None else segments.pick(chunks.whole, last)
        final = final + _times(segments.pick(states, last), whole)
        return _merge(output), segments.or_empty(final, initial), states


def _run_delta(chunks, writes, initial):
    """Hands states from chunk to chunk. Returns them, and what the rows write."""
    segments = chunks.segments

    def step(state, inputs):
        first, place, weights, write, ending_key, *whole = inputs
        state = segments.handed_in(state, first, place, initial)
        write = write - ops.matmul(weights, state)
        after = _times(state, *whole) if whole else state
        after = after + ops.matmul(transposed(ending_key), write)
        return after, (state, write)

    inputs = [
        segments.first,
        segments.place,
        chunks.reading_weights(),
        writes,
        chunks.ending_key,
    ]
    if chunks.whole is not None:
        inputs.append(chunks.whole)
    carry = segments.first_carry(initial, _empty_state(chunks))
    return backend.scan(step, carry, tuple(inputs))[1]


def _run_additive(chunks, writes, initial):
    segments = chunks.segments

    def step(state, inputs):
        first, place, written, *whole = inputs
        state = segments.handed_in(state, first, place, initial)
        after = _times(state, *whole) if whole else state
        return after + written, (state,)

    inputs = [
        segments.first,
        segments.place,
        ops.matmul(transposed(chunks.ending_key), writes),
    ]
    if chunks.whole is not None:
        inputs.append(chunks.whole)
    carry = segments.first_carry(initial, _empty_state(chunks))
    return backend.scan(step, carry, tuple(inputs))[1][0]


def _empty_state(chunks):
    batch, heads = ops.shape(chunks.key)[1:3]
    shape = (batch, heads, chunks.key.shape[-1], chunks.value.shape[-1])
    return ops.zeros(shape, "float32")


def _backward(options, tensors, outputs, gradients):
    query, key, value, log_decay, beta, resets, offsets, initial = tensors
    states = outputs[2]
    output_gradient, final_gradient = gradients[:2]
    with backend.full_precision():
        chunks = _Chunks(options, query, key, value, log_decay, beta, resets, offsets)
        segments = chunks.segments
        out_grad = _split(output_gradient, options.chunk_size)

        # What the rows write, once more, and its gradients.
        if chunks.delta:
            missing = chunks.value - ops.matmul(chunks.reading_key, states)
            writes = ops.matmul(chunks.inverse, _times(missing, chunks.beta))
        else:
            writes = _times(chunks.value, chunks.beta)
        write_grad = ops.matmul(transposed(chunks.attention), out_grad)
        read_grad = ops.matmul(transposed(chunks.reading_query), out_grad)
        first_grad, next_grad, write_grad = _run_backward(
            chunks, write_grad, read_grad, final_gradient
        )

        # Through the state's reads and writes.
        reading_query_grad = ops.matmul(out_grad, transposed(states))
        ending_key_grad = ops.matmul(writes, transposed(next_grad))
        query_grad = options.scale * _times(reading_query_grad, chunks.into_query)
        key_grad = _times(ending_key_grad, chunks.to_end)

        # Through the products inside the chunk.
        attention_grad = options.scale * ops.matmul(out_grad, transposed(writes))
        pair_grads = [
            chunks.pairs_gradient(
                attention_grad, chunks.query, chunks.decay_matrix, chunks.decay, True
            )
        ]
        query_grad = query_grad + pair_grads[0][0]
        key_grad = key_grad + pair_grads[0][1]

        reading_key_grad = beta_grad = None
        if chunks.delta:
            solved_grad = ops.matmul(transposed(chunks.inverse), write_grad)
            erase_grad = -ops.matmul(solved_grad, transposed(writes))
            erase_grad = erase_grad * lower_mask(options.chunk_size, -1)
            if chunks.beta is not None:
                beta_grad = ops.sum(solved_grad * missing, axis=-1)
                beta_grad = beta_grad + ops.sum(erase_grad * chunks.erase, axis=-1)
            value_grad = _times(solved_grad, chunks.beta)
            reading_key_grad = -ops.matmul(value_grad, transposed(states))
            key_grad = key_grad + _times(reading_key_grad, chunks.into_key)
            pair_grads.append(
                chunks.pairs_gradient(
                    _times(erase_grad, chunks.beta),
                    chunks.key,
                    chunks.erase_matrix,
                    chunks._row_decay,
                    False,
                )
            )
            key_grad = key_grad + pair_grads[1][0] + pair_grads[1][1]
        else:
            value_grad = _times(write_grad, chunks.beta)
            if chunks.beta is not None:
                beta_grad = ops.sum(write_grad * chunks.value, axis=-1)

        log_decay_grad = None
        if log_decay is not None:
            log_decay_grad = _log_decay_gradient(
                chunks,
                states * next_grad,
                chunks.reading_query * reading_query_grad,
                chunks.ending_key * ending_key_grad,
                None if not chunks.delta else chunks.reading_key * reading_key_grad,
            )
            for _, _, grad in pair_grads:
                log_decay_grad = log_decay_grad + grad
            log_decay_grad = _merge(log_decay_grad)
            # Below the lowest log decay the decay is 0 whatever its value.
            log_decay_grad = ops.where(log_decay < -1000.0, 0.0, log_decay_grad)

        initial_grad = None
        if initial is not None:
            initial_grad = segments.or_empty(
                segments.pick(first_grad, segments.starts), final_gradient
            )
        return (
            _merge(query_grad),
            _merge(key_grad),
            _merge(value_grad),
            log_decay_grad,
            None if beta is None else _merge(beta_grad),
            None,
            None,
            initial_grad,
        )


def _run_backward(chunks, write_grad, read_grad, final_gradient):
    """Hands gradients of the states back from chunk to chunk.

    Returns:
        Gradients of the states before and after each chunk, and of what rows write.
    """
    segments = chunks.segments

    def step(state_grad, inputs):
        last, place, write_grad, read_grad, ending_key, *rest = inputs
        next_grad = segments.handed_in(state_grad, last, place, final_gradient)
        write_grad = write_grad + ops.matmul(ending_key, next_grad)
        state_grad = read_grad
        if chunks.delta:
            weights, *rest = rest
            state_grad = state_grad - ops.matmul(transposed(weights), write_grad)
        state_grad = state_grad + (_times(next_grad, *rest) if rest else next_grad)
        return state_grad, (state_grad, next_grad, write_grad)

    inputs = [
        segments.last,
        segments.place,
        write_grad,
        read_grad,
        chunks.ending_key,
    ]
    if chunks.delta:
        inputs.append(chunks.reading_weights())
    if chunks.whole is not None:
        inputs.append(chunks.whole)
    carry = segments.first_carry(final_gradient, _empty_state(chunks))
    return backend.scan(step, carry, tuple(inputs), reverse=True)[1]


def _log_decay_gradient(chunks, whole, query, ending_key, reading_key):
    """Gradient of the log decays from everything that crosses the chunk's borders.

    Each argument is a factor's value times its gradient; a log decay gets the sum
    over the factors that hold it.
    """
    size = chunks.options.chunk_size
    whole = ops.sum(whole, axis=-1)[..., None, :] * transposed(chunks.whole)
    if not chunks.per_channel:
        whole = ops.sum(whole, axis=-1, keepdims=True)
        query = ops.sum(query, axis=-1, keepdims=True)
        ending_key = ops.sum(ending_key, axis=-1, keepdims=True)
        if reading_key is not None:
            reading_key = ops.sum(reading_key, axis=-1, keepdims=True)
    gradient = ops.matmul(transposed(lower_mask(size)), query)
    gradient = gradient + ops.matmul(lower_mask(size, -1), ending_key)
    if reading_key is not None:
        exclusive = chunks.options.erase_before_decay
        later = transposed(lower_mask(size, -1 if exclusive else 0))
        gradient = gradient + ops.matmul(later, reading_key)
    gradient = gradient + whole
    return gradient if chunks.per_channel else gradient[..., 0]


def _infer(options, query, key, value, log_decay, beta, resets, offsets, initial):
    batch, rows, heads, key_dim = key.shape
    segments = 1 if offsets is None else offsets.shape[1] - 1
    state = (heads, key_dim, value.shape[-1])
    return (
        (tuple(value.shape), "float32"),
        ((batch, segments, *state), "float32"),
        ((rows // options.chunk_size, batch, *state), "float32"),
    )


_SCAN = backend.Differentiable("memory_scan", _forward, _backward, _infer)
