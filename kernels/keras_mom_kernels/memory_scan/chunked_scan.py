"""The memory scan chunkwise, with its gradient written by hand, for any framework.

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

`arrays` is the framework's namespace of array functions, which `chunk_algebra`
describes.
"""

from typing import Any, NamedTuple

from keras_mom_kernels.memory_scan.chunk_algebra import (
    LOWEST_LOG_DECAY,
    ChunkAlgebra,
)
from keras_mom_kernels.memory_scan.chunk_factors import ChunkFactors
from keras_mom_kernels.memory_scan.value_decay import ValueDecayFactors


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


class _Segments:
    """Which chunk begins and ends which segment, and the states handed in there."""

    def __init__(self, arrays, chunk_offsets, chunks, batch):
        self.arrays = arrays
        # With one segment a batch row, no border lies between two chunks.
        self.alone = chunk_offsets is None
        self.batch = batch
        if self.alone:
            return
        self.count = chunk_offsets.shape[1] - 1
        self.starts, self.ends = chunk_offsets[:, :-1], chunk_offsets[:, 1:]
        self.occupied = self.ends > self.starts
        index = self.arrays.arange(chunks, dtype="int32")
        later = index[None, :, None] >= self.starts[:, None, 1:]
        segment = self.arrays.sum(self.arrays.cast(later, "int32"), axis=-1)
        # [B, chunks]: the segment's place among all segments of the call.
        self.place = (
            segment + self.arrays.arange(batch, dtype="int32")[:, None] * self.count
        )
        starts = self.arrays.take(self.arrays.reshape(self.starts, (-1,)), self.place)
        ends = self.arrays.take(self.arrays.reshape(self.ends, (-1,)), self.place)
        self.first = index == starts
        self.last = index + 1 == ends

    def first_carry(self, states, shape):
        """What a loop begins with."""
        if self.alone and states is not None:
            return states[:, 0]
        return self.arrays.zeros(shape, "float32")

    def borders(self, at_border, states, start, count):
        """For `count` chunks from `start`: a function that hands states in.

        It takes a carry `[B, H, K, V]` and a chunk's number in the block, and returns
        the given (or empty) state in batch rows where a segment's border lies.
        """
        if self.alone:
            return lambda carry, chunk: carry
        flags = slice_rows(self.arrays, at_border, start, count)
        places = slice_rows(self.arrays, self.place, start, count)
        flat = None
        if states is not None:
            shape = self.arrays.shape(states)
            flat = self.arrays.reshape(states, (shape[0] * shape[1], *shape[2:]))

        def handed_in(carry, chunk):
            given = self.arrays.zeros_like(carry)
            if flat is not None:
                given = self.arrays.take(flat, places[:, chunk], axis=0)
            return self.arrays.where(flags[:, chunk, None, None, None], given, carry)

        return handed_in

    def pick(self, of_chunks, index, otherwise):
        """`[B, chunks, ...]` at `index` `[B, S]`; `otherwise` for empty segments."""
        shape = self.arrays.shape(of_chunks)
        index = self.arrays.clip(index, 0, shape[1] - 1)
        index = (
            index + self.arrays.arange(self.batch, dtype="int32")[:, None] * shape[1]
        )
        flat = self.arrays.reshape(of_chunks, (shape[0] * shape[1], *shape[2:]))
        picked = self.arrays.take(flat, self.arrays.reshape(index, (-1,)), axis=0)
        picked = self.arrays.reshape(picked, (self.batch, self.count, *shape[2:]))
        if otherwise is None:
            otherwise = self.arrays.zeros_like(picked)
        return self.arrays.where(
            self.occupied[..., None, None, None], picked, otherwise
        )


def slice_rows(arrays, x, start, count) -> Any:
    """`x[:, start : start + count]`, of static size, or None for None."""
    if x is None:
        return None
    shape = arrays.shape(x)
    begin = [0] * len(shape)
    begin[1] = start
    return arrays.slice(x, begin, (shape[0], count, *shape[2:]))


class _Scan:
    """Sizes, segments and the blocks' inputs, which both directions need."""

    def __init__(self, arrays, options, tensors):
        self.arrays, self.options = arrays, options
        self.algebra = ChunkAlgebra(arrays)
        *self.rows, offsets, self.initial = tensors
        query, _, value = self.rows[:3]
        batch, length, heads, key_dim = arrays.shape(query)
        chunks = length // options.chunk_size
        self.blocks = chunks // options.block_size
        self.state_shape = (batch, heads, key_dim, value.shape[-1])
        self.segments = _Segments(arrays, offsets, chunks, batch)
        self.delta = options.write == "delta"
        values_decay = options.decay_axis == "value" and self.rows[3] is not None
        self._factors = ValueDecayFactors if values_decay else ChunkFactors
        # How many outputs a step has forward: the states behind chunks come last.
        self.forward_count = 2 if self.segments.alone else 3
        # What one chunk writes: [B, 1, H, C, V].
        self.writes = (batch, 1, heads, options.chunk_size, value.shape[-1])

    def states(self, chunks):
        """Shape of the states of some chunks: `[B, chunks, H, K, V]`."""
        return (self.state_shape[0], chunks, *self.state_shape[1:])

    def block_rows(self, x):
        """Shape of the rows of a block: `[B, G * C, ...]` of `[B, T, ...]`."""
        rows = self.options.block_size * self.options.chunk_size
        return (self.state_shape[0], rows, *x.shape[2:])

    def block(self, index):
        """The factors of a block of chunks."""
        rows = self.options.block_size * self.options.chunk_size
        inputs = [slice_rows(self.arrays, x, index * rows, rows) for x in self.rows]
        return self._factors(self.algebra, self.options, *inputs)

    def chunk_rows(self, x, index):
        """The rows of a block of chunks: `[B, T, H, V]` to `[B, G, H, C, V]`."""
        rows = self.options.block_size * self.options.chunk_size
        return self.algebra.split_chunks(
            slice_rows(self.arrays, x, index * rows, rows), self.options.chunk_size
        )


def forward(arrays, options, *tensors):
    """Output, final state, and the state before each chunk.

    Args:
        arrays: namespace of array functions.
        options: `ScanOptions`.
        *tensors: those of `chunked_scan`, in its order.
    """
    with arrays.full_precision():
        scan = _Scan(arrays, options, tensors)
        algebra = scan.algebra
        segments = scan.segments
        size = options.block_size

        def step(state, index):
            block = scan.block(index)
            hand_in = segments.borders(
                getattr(segments, "first", None), scan.initial, index * size, size
            )
            writes = algebra.optional_product(block.value, block.beta)
            weights = None
            if scan.delta:
                writes = arrays.matmul(block.inverse, writes)
                weights = block.reading_weights()

            def chunk_step(state, chunk):
                before = hand_in(state, chunk)
                write = writes[:, chunk]
                if weights is not None:
                    write = write - arrays.matmul(weights[:, chunk], before)
                after = block.decayed(before, chunk) + block.written(write, chunk)
                outputs = (before, write) if segments.alone else (before, write, after)
                return after, tuple(x[:, None] for x in outputs)

            states = scan.states(1)
            shapes = (states, scan.writes, states)[: scan.forward_count]
            state, (before, written, *after) = arrays.scan(
                chunk_step, state, size, shapes
            )
            output = algebra.merge_chunks(block.output(before, written))
            return state, (output, before, *after)

        carry = segments.first_carry(scan.initial, scan.state_shape)
        states = scan.states(size)
        shapes = (scan.block_rows(scan.rows[2]), states, states)[: scan.forward_count]
        last, (output, before, *after) = arrays.scan(step, carry, scan.blocks, shapes)
        if segments.alone:
            return output, last[:, None], before
        final = segments.pick(after[0], segments.ends - 1, scan.initial)
        return output, final, before


def backward(arrays, options, tensors, outputs, gradients):
    """The gradients of `tensors`, from what `forward` returned and its gradients."""
    before = outputs[2]
    output_gradient, final_gradient = gradients[:2]
    with arrays.full_precision():
        scan = _Scan(arrays, options, tensors)
        algebra = scan.algebra
        segments = scan.segments
        size = options.block_size
        wants_initial = scan.initial is not None and not segments.alone
        count = 3 if wants_initial else 2

        def step(state_grad, index):
            block = scan.block(index)
            hand_in = segments.borders(
                getattr(segments, "last", None), final_gradient, index * size, size
            )
            states = slice_rows(arrays, before, index * size, size)
            out_grad = scan.chunk_rows(output_gradient, index)
            writes, missing = block.writes(states)
            read_grad, local_grad = block.output_gradients(out_grad)
            weights = block.reading_weights() if scan.delta else None

            def chunk_step(state_grad, chunk):
                next_grad = hand_in(state_grad, chunk)
                grad = local_grad[:, chunk] + block.write_gradient(next_grad, chunk)
                state_grad = read_grad[:, chunk] + block.decayed(next_grad, chunk)
                if weights is not None:
                    state_grad = state_grad - arrays.matmul(
                        algebra.transposed(weights[:, chunk]), grad
                    )
                outputs = (next_grad, grad, state_grad)[:count]
                return state_grad, tuple(x[:, None] for x in outputs)

            one = scan.states(1)
            shapes = (one, scan.writes, one)[:count]
            state_grad, (next_grad, write_grad, *first_grad) = arrays.scan(
                chunk_step, state_grad, size, shapes, reverse=True
            )
            grads = block.gradients(
                states,
                writes,
                missing,
                out_grad,
                write_grad,
                next_grad,
            )
            grads = tuple(
                algebra.merge_chunks(grad) for grad in grads if grad is not None
            )
            return state_grad, (*grads, *first_grad)

        carry = segments.first_carry(final_gradient, scan.state_shape)
        log_decay, beta = tensors[3:5]
        shapes = [scan.block_rows(x) for x in scan.rows[:5] if x is not None]
        if wants_initial:
            shapes.append(scan.states(size))
        last, grads = arrays.scan(step, carry, scan.blocks, shapes, reverse=True)
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
            log_decay_grad = arrays.where(counts, grads.pop(), 0.0)
        return (*grads, log_decay_grad, beta_grad, None, None, initial_grad)


def infer(options, query, key, value, log_decay, beta, resets, offsets, initial):
    """Shapes and dtypes of what `forward` returns."""
    batch, rows, heads, key_dim = key.shape
    segments = 1 if offsets is None else offsets.shape[1] - 1
    state = (heads, key_dim, value.shape[-1])
    return (
        (tuple(value.shape), "float32"),
        ((batch, segments, *state), "float32"),
        ((batch, rows // options.chunk_size, *state), "float32"),
    )
