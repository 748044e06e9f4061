"""What a block of chunks contributes to the scan, forward and backward."""

from typing import Any

from keras_mom_kernels.memory_scan.chunk_algebra import CumulativeDecay


class ChunkFactors:
    """Decays and decayed products of a block of G chunks, from its rows.

    All attributes have the leading axes `[B, G, H]`; H or B is 1 where they do not
    matter. None stands for factors of 1.

    Args:
        algebra: `ChunkAlgebra`.
        options: `ScanOptions`.
        query, key, value, log_decay, beta, resets: as `chunked_scan` takes them, for
            `G * C` rows.

    Attributes:
        query, key: `[..., C, K]`.
        value: `[..., C, V]`.
        beta: `[..., C, 1]`.
        reading_query: `[..., C, K]`, the query that meets the state before the chunk.
        reading_key: `[..., C, K]`, the key that does.
        ending_key: `[..., C, K]`, the key that writes the state behind the chunk.
        whole: `[..., K or 1, 1]`, decay of the state over the chunk.
        attention: `[..., C, C]`, decayed query-key products times the scale.
        erase: `[..., C, C]`, decayed key-key products below the diagonal.
        inverse: `[..., C, C]`, of the identity plus `erase` times beta.
    """

    into_query: Any = None
    into_key: Any = None
    to_end: Any = None
    whole: Any = None

    def __init__(self, algebra, options, query, key, value, log_decay, beta, resets):
        size = options.chunk_size
        self.algebra, self.arrays = algebra, algebra.arrays
        self.options = options
        self.delta = options.write == "delta"
        self.per_channel = log_decay is not None and len(log_decay.shape) == 4
        self.query, self.key, self.value = (
            self.algebra.split_chunks(x, size) for x in (query, key, value)
        )
        self.beta = (
            None if beta is None else self.algebra.split_chunks(beta, size)[..., None]
        )
        self.same = None
        self._set_decays(log_decay)
        if resets is not None:
            self._set_resets(self.algebra.split_chunks(resets[:, :, None], size))
        self._set_products()

    def _set_decays(self, log_decay):
        self.decay = self.erase_decay = None
        size, shifted = self.options.chunk_size, self.options.erase_before_decay
        if log_decay is None:
            self.decay_matrix = self.algebra.lower_mask(size)
            self.erase_matrix = self.algebra.lower_mask(size, -1)
            return
        self.decay = CumulativeDecay.of(
            self.arrays, self.algebra.split_chunks(log_decay, size), axis=3
        )
        self.erase_decay = self.decay
        if shifted:
            self.erase_decay = self.decay.map(
                lambda x: self.algebra.shift_down(x, axis=3)
            )
        end = self.decay.map(lambda x: x[:, :, :, -1:])
        into_query, into_key, whole = (
            self.decay.exp(),
            self.erase_decay.exp(),
            end.exp(),
        )
        to_end = self.arrays.exp(end.minus(self.decay))
        if self.per_channel:
            self.decay_matrix = self.erase_matrix = None
            self.into_query, self.into_key, self.to_end = into_query, into_key, to_end
            self.whole = self.algebra.transposed(whole)
            return
        self.into_query, self.into_key = into_query[..., None], into_key[..., None]
        self.to_end, self.whole = to_end[..., None], whole[..., None]
        self.decay_matrix = self.algebra.head_decay_matrix(self.decay)
        if shifted:
            self.erase_matrix = self.algebra.shift_down(self.decay_matrix, axis=-2)
        else:
            self.erase_matrix = self.decay_matrix * self.algebra.lower_mask(size, -1)

    def _set_resets(self, resets):
        # Rows between which a reset lies do not see each other.
        count = self.arrays.cumsum(resets, axis=3)
        self.same = self.arrays.cast(
            count[..., :, None] == count[..., None, :], "float32"
        )
        from_start = self.arrays.cast(count == 0, "float32")[..., None]
        until_end = self.arrays.cast(count == count[..., -1:], "float32")[..., None]
        if not self.per_channel:
            self.decay_matrix = self.decay_matrix * self.same
            self.erase_matrix = self.erase_matrix * self.same
        self.into_query = self.algebra.optional_product(from_start, self.into_query)
        self.into_key = self.algebra.optional_product(from_start, self.into_key)
        self.to_end = self.algebra.optional_product(until_end, self.to_end)
        self.whole = self.algebra.optional_product(from_start[:, :, :, -1:], self.whole)

    def _set_products(self):
        query = self.query * self.options.scale
        self.reading_query = self.algebra.optional_product(query, self.into_query)
        self.ending_key = self.algebra.optional_product(self.key, self.to_end)
        self.attention = self._pairs(query, self.decay_matrix, self.decay, True)
        if self.delta:
            self.reading_key = self.algebra.optional_product(self.key, self.into_key)
            self.erase = self._pairs(
                self.key, self.erase_matrix, self.erase_decay, False
            )
            self.inverse = self.algebra.unit_lower_inverse(
                self.algebra.optional_product(self.erase, self.beta)
            )

    def _pairs(self, left, matrix, left_decay, inclusive):
        if not self.per_channel:
            return self.arrays.matmul(left, self.algebra.transposed(self.key)) * matrix
        pairs = self.algebra.channel_pairs(
            left, self.key, left_decay, self.decay, inclusive
        )
        return self.algebra.optional_product(pairs, self.same)

    def reading_weights(self):
        """What a state takes from the rows' writes: `U = U0 - weights S`."""
        return self.arrays.matmul(
            self.inverse, self.algebra.optional_product(self.reading_key, self.beta)
        )

    def written(self, write, chunk):
        """What the writes `[B, H, C, V]` of a chunk leave in the state behind it."""
        return self.arrays.matmul(
            self.algebra.transposed(self.ending_key[:, chunk]), write
        )

    def write_gradient(self, next_grad, chunk):
        """Gradient of a chunk's writes from that of the state behind it."""
        return self.arrays.matmul(self.ending_key[:, chunk], next_grad)

    def output(self, states, writes):
        """Outputs `[..., C, V]` from the states before each chunk and the writes."""
        return self.arrays.matmul(self.reading_query, states) + self.arrays.matmul(
            self.attention, writes
        )

    def output_gradients(self, out_grad):
        """Gradients of the states and of the writes that `output` takes."""
        return (
            self.arrays.matmul(self.algebra.transposed(self.reading_query), out_grad),
            self.arrays.matmul(self.algebra.transposed(self.attention), out_grad),
        )

    def decayed(self, state, chunk):
        """The state `[B, H, K, V]` after the decay of one of the block's chunks."""
        return state if self.whole is None else state * self.whole[:, chunk]

    def writes(self, states):
        """What the rows write, from the states before each chunk.

        Returns:
            U, and for the delta rule what the state was missing, `[..., C, V]` each.
        """
        if not self.delta:
            return self.algebra.optional_product(self.value, self.beta), None
        missing = self.value - self.arrays.matmul(self.reading_key, states)
        return self.arrays.matmul(
            self.inverse, self.algebra.optional_product(missing, self.beta)
        ), missing

    def gradients(self, states, writes, missing, out_grad, write_grad, next_grad):
        """Gradients of query, key, value, log decay and beta (None for absent ones).

        Args:
            states: `[..., K, V]`, before each chunk.
            writes, missing: what `writes` returned.
            out_grad: of the output, `[..., C, V]`.
            write_grad: of U, complete, `[..., C, V]`.
            next_grad: of the states behind each chunk, `[..., K, V]`.
        """
        scale = self.options.scale
        # Through the reads and writes of the state.
        reading_query = self.arrays.matmul(out_grad, self.algebra.transposed(states))
        ending_key = self.arrays.matmul(writes, self.algebra.transposed(next_grad))
        crossing_query = self.reading_query * reading_query
        crossing_key = self.ending_key * ending_key
        query_grad = scale * self.algebra.optional_product(
            reading_query, self.into_query
        )
        key_grad = self.algebra.optional_product(ending_key, self.to_end)

        # Through the products inside the chunk.
        attention = scale * self.arrays.matmul(
            out_grad, self.algebra.transposed(writes)
        )
        left, right, log_decay_grad = self._pairs_gradient(
            attention, self.query, self.decay_matrix, self.decay, True
        )
        query_grad, key_grad = query_grad + left, key_grad + right

        # Through the solve.
        beta_grad = reading = None
        if self.delta:
            solved = self.arrays.matmul(
                self.algebra.transposed(self.inverse), write_grad
            )
            strict = self.algebra.lower_mask(self.options.chunk_size, -1)
            erase = (
                -self.arrays.matmul(solved, self.algebra.transposed(writes)) * strict
            )
            if self.beta is not None:
                beta_grad = self.arrays.sum(solved * missing, axis=-1)
                beta_grad = beta_grad + self.arrays.sum(erase * self.erase, axis=-1)
            value_grad = self.algebra.optional_product(solved, self.beta)
            reading_key = -self.arrays.matmul(
                value_grad, self.algebra.transposed(states)
            )
            reading = self.reading_key * reading_key
            key_grad = key_grad + self.algebra.optional_product(
                reading_key, self.into_key
            )
            left, right, erase_log_decay = self._pairs_gradient(
                self.algebra.optional_product(erase, self.beta),
                self.key,
                self.erase_matrix,
                self.erase_decay,
                False,
            )
            key_grad = key_grad + left + right
            if log_decay_grad is not None:
                log_decay_grad = log_decay_grad + erase_log_decay
        else:
            value_grad, beta_grad = self.additive_gradients(write_grad)

        if self.decay is not None:
            whole = self.arrays.sum(states * next_grad, axis=-1)[..., None, :]
            log_decay_grad = log_decay_grad + self.crossing_log_decay_gradient(
                whole * self.algebra.transposed(self.whole),
                crossing_query,
                crossing_key,
                reading,
            )
        return query_grad, key_grad, value_grad, log_decay_grad, beta_grad

    def additive_gradients(self, write_grad):
        """Gradients of value and beta (or None) from those of additive writes."""
        value_grad = self.algebra.optional_product(write_grad, self.beta)
        if self.beta is None:
            return value_grad, None
        return value_grad, self.arrays.sum(write_grad * self.value, axis=-1)

    def _pairs_gradient(self, gradient, left, matrix, left_decay, inclusive):
        """Gradients of left, key and log decay from those of `_pairs`."""
        exclusive = self.options.erase_before_decay and not inclusive
        if self.per_channel:
            gradient = self.algebra.optional_product(gradient, self.same)
            return self.algebra.channel_pairs_gradient(
                gradient, left, self.key, left_decay, self.decay, inclusive, exclusive
            )
        weighted = gradient * matrix
        log_decay_grad = None
        if self.decay is not None:
            products = weighted * self.arrays.matmul(
                left, self.algebra.transposed(self.key)
            )
            log_decay_grad = self.algebra.head_pair_log_decay_gradient(
                products, exclusive
            )
        return (
            self.arrays.matmul(weighted, self.key),
            self.arrays.matmul(self.algebra.transposed(weighted), left),
            log_decay_grad,
        )

    def crossing_log_decay_gradient(self, whole, query, ending_key, reading_key=None):
        """Gradient of the log decays from all that crosses the chunk's borders.

        Each argument is a factor times its gradient, `[..., C or 1, channels]`; a log
        decay gets the sum over the factors that hold it.
        """
        size = self.options.chunk_size
        crossing = [whole, query, ending_key, reading_key]
        if not self.per_channel:
            crossing = [
                None if x is None else self.arrays.sum(x, axis=-1, keepdims=True)
                for x in crossing
            ]
        whole, query, ending_key, reading_key = crossing
        gradient = whole + self.arrays.matmul(
            self.algebra.transposed(self.algebra.lower_mask(size)), query
        )
        gradient = gradient + self.arrays.matmul(
            self.algebra.lower_mask(size, -1), ending_key
        )
        if reading_key is not None:
            exclusive = self.options.erase_before_decay
            later = self.algebra.transposed(
                self.algebra.lower_mask(size, -1 if exclusive else 0)
            )
            gradient = gradient + self.arrays.matmul(later, reading_key)
        return gradient if self.per_channel else gradient[..., 0]
