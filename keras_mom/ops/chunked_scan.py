"""The portable memory scan: chunkwise, with its gradient written by hand.

Rows come in chunks of C. Inside a chunk everything is a batched product; between
chunks a state of `[K, V]` a head is handed on. A loop takes a block of chunks at a
time, so that what is computed on the way stays small. The backward pass keeps the
inputs and one state a chunk, and computes the rest again.

With `G` the running sum of log decays in a chunk, `S` the state before it, and `L`
the decayed key products below the diagonal, times the write strength:

    (I + L) U = beta (V - (K exp(G)) S)           what each row writes (delta rule)
    O         = scale (Q exp(G)) S + P U          P: decayed query-key products
    S_next    = exp(G_C) S + (K exp(G_C - G))^T U

"Erase before decay" reads with the decay of the row before, `G_t - g_t`.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_mom import backend
from keras_mom.ops.chunk_factors import ChunkFactors
from keras_mom.ops.chunk_math import (
    LOWEST_LOG_DECAY,
    merge_chunks,
    optional_product,
    split_chunks,
    transposed,
)
from keras_mom.ops.value_decay import ValueDecayFactors


class ScanOptions(NamedTuple):
    """What does not change from call to call.

    Attributes:
        write: `"delta"` or `"additive"`.
        erase_before_decay: whether the delta rule reads the state before its decay.
        chunk_size: C, a power of two.
        block_size: chunks a step of the loop; `block_size * C` divides T.
        scale: factor of the query.
        decay_axis: `"key"` or `"value"`, the channels of a decay for each channel.
    """

    write: str
    erase_before_decay: bool
    chunk_size: int
    block_size: int
    scale: float
    decay_axis: str = "key"


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
        query, key: float32 `[B, T, H, K]`, T a multiple of the rows of a block.
        value: float32 `[B, T, H, V]`.
        log_decay: float32 `[B, T, H]` or `[B, T, H, K]`, or None for no decay;
            `[B, T, H, V]` for value channels.
        beta: float32 `[B, T, H]`, or None for 1.
        resets: int32 `[B, T]`, 1 at a row before which the state is emptied, or None.
        chunk_offsets: int32 `[B, S + 1]`: segment s of a batch row holds the chunks
            `chunk_offsets[s]` to `chunk_offsets[s + 1] - 1`. The first entry is 0,
            the last T / C. None for one segment a batch row.
        initial_state: float32 `[B, S, H, K, V]`, or None for zeros.

    Returns:
        Output `[B, T, H, V]` and final state `[B, S, H, K, V]`, float32.
    """
    return _SCAN(
        options,
        query,
        key,
        value,
        log_decay,
        beta,
        resets,
        chunk_offsets,
        initial_state,
    )[:2]


class _Segments:
    """Which chunk begins and ends which segment, and the states handed in there."""

    def __init__(self, chunk_offsets, chunks, batch):
        # With one segment a batch row, no border lies between two chunks.
        self.alone = chunk_offsets is None
        self.batch = batch
        if self.alone:
            return
        self.count = chunk_offsets.shape[1] - 1
        self.starts, self.ends = chunk_offsets[:, :-1], chunk_offsets[:, 1:]
        self.occupied = self.ends > self.starts
        index = ops.arange(chunks, dtype="int32")
        later = index[None, :, None] >= self.starts[:, None, 1:]
        segment = ops.sum(ops.cast(later, "int32"), axis=-1)
        # [B, chunks]: the segment's place among all segments of the call.
        self.place = segment + ops.arange(batch, dtype="int32")[:, None] * self.count
        starts = ops.take(ops.reshape(self.starts, (-1,)), self.place)
        ends = ops.take(ops.reshape(self.ends, (-1,)), self.place)
        self.first = index == starts
        self.last = index + 1 == ends

    def first_carry(self, states, shape):
        """What a loop begins with."""
        if self.alone and states is not None:
            return states[:, 0]
        return ops.zeros(shape, "float32")

    def borders(self, at_border, states, start, count):
        """For `count` chunks from `start`: a function that hands states in.

        It takes a carry `[B, H, K, V]` and a chunk's number in the block, and returns
        the given (or empty) state in batch rows where a segment's border lies.
        """
        if self.alone:
            return lambda carry, chunk: carry
        flags = slice_rows(at_border, start, count)
        places = slice_rows(self.place, start, count)
        flat = None
        if states is not None:
            shape = ops.shape(states)
            flat = ops.reshape(states, (shape[0] * shape[1], *shape[2:]))

        def handed_in(carry, chunk):
            given = ops.zeros_like(carry)
            if flat is not None:
                given = ops.take(flat, places[:, chunk], axis=0)
            return ops.where(flags[:, chunk, None, None, None], given, carry)

        return handed_in

    def pick(self, of_chunks, index, otherwise):
        """`[B, chunks, ...]` at `index` `[B, S]`; `otherwise` for empty segments."""
        shape = ops.shape(of_chunks)
        index = ops.clip(index, 0, shape[1] - 1)
        index = index + ops.arange(self.batch, dtype="int32")[:, None] * shape[1]
        flat = ops.reshape(of_chunks, (shape[0] * shape[1], *shape[2:]))
        picked = ops.take(flat, ops.reshape(index, (-1,)), axis=0)
        picked = ops.reshape(picked, (self.batch, self.count, *shape[2:]))
        if otherwise is None:
            otherwise = ops.zeros_like(picked)
        return ops.where(self.occupied[..., None, None, None], picked, otherwise)


def slice_rows(x, start, count) -> Any:
    """`x[:, start : start + count]`, of static size, or None for None."""
    if x is None:
        return None
    shape = ops.shape(x)
    begin = [0] * len(shape)
    begin[1] = start
    return ops.slice(x, begin, (shape[0], count, *shape[2:]))


class _Scan:
    """Sizes, segments and the blocks' inputs, which both directions need."""

    def __init__(self, options, tensors):
        self.options = options
        *self.rows, offsets, self.initial = tensors
        query, _, value = self.rows[:3]
        batch, length, heads, key_dim = ops.shape(query)
        chunks = length // options.chunk_size
        self.blocks = chunks // options.block_size
        self.state_shape = (batch, heads, key_dim, value.shape[-1])
        self.segments = _Segments(offsets, chunks, batch)
        self.delta = options.write == "delta"
        values_decay = options.decay_axis == "value" and self.rows[3] is not None
        self._factors = ValueDecayFactors if values_decay else ChunkFactors

    def block(self, index):
        """The factors of a block of chunks."""
        rows = self.options.block_size * self.options.chunk_size
        inputs = [slice_rows(x, index * rows, rows) for x in self.rows]
        return self._factors(self.options, *inputs)

    def chunk_rows(self, x, index):
        """The rows of a block of chunks: `[B, T, H, V]` to `[B, G, H, C, V]`."""
        rows = self.options.block_size * self.options.chunk_size
        return split_chunks(slice_rows(x, index * rows, rows), self.options.chunk_size)


def _forward(options, *tensors):
    with backend.full_precision():
        scan = _Scan(options, tensors)
        segments = scan.segments
        size = options.block_size

        def step(state, index):
            block = scan.block(index)
            hand_in = segments.borders(
                getattr(segments, "first", None), scan.initial, index * size, size
            )
            writes = optional_product(block.value, block.beta)
            weights = None
            if scan.delta:
                writes = ops.matmul(block.inverse, writes)
                weights = block.reading_weights()

            def chunk_step(state, chunk):
                before = hand_in(state, chunk)
                write = writes[:, chunk]
                if weights is not None:
                    write = write - ops.matmul(weights[:, chunk], before)
                after = block.decayed(before, chunk) + block.written(write, chunk)
                outputs = (before, write) if segments.alone else (before, write, after)
                return after, tuple(x[:, None] for x in outputs)

            count = 2 if segments.alone else 3
            state, (before, written, *after) = backend.scan(
                chunk_step, state, size, count
            )
            output = merge_chunks(block.output(before, written))
            return state, (output, before, *after)

        carry = segments.first_carry(scan.initial, scan.state_shape)
        last, (output, before, *after) = backend.scan(
            step, carry, scan.blocks, 2 if segments.alone else 3
        )
        if segments.alone:
            return output, last[:, None], before
        final = segments.pick(after[0], segments.ends - 1, scan.initial)
        return output, final, before


def _backward(options, tensors, outputs, gradients):
    before = outputs[2]
    output_gradient, final_gradient = gradients[:2]
    with backend.full_precision():
        scan = _Scan(options, tensors)
        segments = scan.segments
        size = options.block_size
        wants_initial = scan.initial is not None and not segments.alone

        def step(state_grad, index):
            block = scan.block(index)
            hand_in = segments.borders(
                getattr(segments, "last", None), final_gradient, index * size, size
            )
            states = slice_rows(before, index * size, size)
            out_grad = scan.chunk_rows(output_gradient, index)
            writes, missing = block.writes(states)
            read_grad, local_grad = block.output_gradients(out_grad)
            weights = block.reading_weights() if scan.delta else None

            def chunk_step(state_grad, chunk):
                next_grad = hand_in(state_grad, chunk)
                grad = local_grad[:, chunk] + block.write_gradient(next_grad, chunk)
                state_grad = read_grad[:, chunk] + block.decayed(next_grad, chunk)
                if weights is not None:
                    state_grad = state_grad - ops.matmul(
                        transposed(weights[:, chunk]), grad
                    )
                outputs = (next_grad, grad, state_grad)[: 3 if wants_initial else 2]
                return state_grad, tuple(x[:, None] for x in outputs)

            state_grad, (next_grad, write_grad, *first_grad) = backend.scan(
                chunk_step,
                state_grad,
                size,
                3 if wants_initial else 2,
                reverse=True,
            )
            grads = block.gradients(
                states,
                writes,
                missing,
                out_grad,
                write_grad,
                next_grad,
            )
            grads = tuple(merge_chunks(grad) for grad in grads if grad is not None)
            return state_grad, (*grads, *first_grad)

        carry = segments.first_carry(final_gradient, scan.state_shape)
        log_decay, beta = tensors[3:5]
        count = 3 + (log_decay is not None) + (beta is not None) + wants_initial
        last, grads = backend.scan(step, carry, scan.blocks, count, reverse=True)
        grads = list(grads)
        initial_grad = None
        if wants_initial:
            initial_grad = segments.pick(grads.pop(), segments.starts, final_gradient)
        elif scan.initial is not None:
            initial_grad = last[:, None]
        beta_grad = grads.pop() if beta is not None else None
        log_decay_grad = None
        if log_decay is not None:
            # Below the lowest log decay the decay is 0 whatever its value.
            counts = log_decay >= LOWEST_LOG_DECAY
            log_decay_grad = ops.where(counts, grads.pop(), 0.0)
        return (*grads, log_decay_grad, beta_grad, None, None, initial_grad)


def _infer(options, query, key, value, log_decay, beta, resets, offsets, initial):
    batch, rows, heads, key_dim = key.shape
    segments = 1 if offsets is None else offsets.shape[1] - 1
    state = (heads, key_dim, value.shape[-1])
    return (
        (tuple(value.shape), "float32"),
        ((batch, segments, *state), "float32"),
        ((batch, rows // options.chunk_size, *state), "float32"),
    )


_SCAN = backend.Differentiable(
    "memory_scan", _forward, _backward, _infer, ScanOptions._make
)
