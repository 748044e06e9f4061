"""What a block of chunks contributes where the decay is one a value channel."""

from keras_mom_kernels.memory_scan.chunk_factors import ChunkFactors


class ValueDecayFactors(ChunkFactors):
    """`ChunkFactors` of additive writes with a decay a value channel, `[B, T, H, V]`.

    The decay then belongs to what is written and read, not to query and key:

        O      = exp(G) (scale Q S) + sum_j P_tj exp(G_t - G_j) U_j
        S_next = S exp(G_C) + K^T (exp(G_C - G) U)

    Attributes:
        into_query: `[..., C, V]`, decay of the state on its way to each row.
        to_end: `[..., C, V]`, decay of each row's write until the end of the chunk.
        whole: `[..., 1, V]`.
        attention: `[..., C, C]`, query-key products times the scale, not decayed.
    """

    def _set_decays(self, log_decay):
        super()._set_decays(log_decay)
        self.whole = self.algebra.transposed(self.whole)

    def _set_products(self):
        self.reading_query = self.query * self.options.scale
        products = self.arrays.matmul(
            self.reading_query, self.algebra.transposed(self.key)
        )
        products = products * self.algebra.lower_mask(self.options.chunk_size)
        self.attention = self.algebra.optional_product(products, self.same)

    def written(self, write, chunk):
        ending = write * self.to_end[:, chunk]
        return self.arrays.matmul(self.algebra.transposed(self.key[:, chunk]), ending)

    def write_gradient(self, next_grad, chunk):
        return self.arrays.matmul(self.key[:, chunk], next_grad) * self.to_end[:, chunk]

    def output(self, states, writes):
        read = self.arrays.matmul(self.reading_query, states) * self.into_query
        return read + self.algebra.channel_sums(self.attention, writes, self.decay)

    def output_gradients(self, out_grad):
        read = self.arrays.matmul(
            self.algebra.transposed(self.reading_query), out_grad * self.into_query
        )
        return read, self.algebra.channel_sums_gradient(
            self.attention, out_grad, self.decay
        )

    def gradients(self, states, writes, missing, out_grad, write_grad, next_grad):
        scale = self.options.scale
        # Through the reads and writes of the state.
        read_grad = out_grad * self.into_query
        ending = writes * self.to_end
        query_grad = scale * self.arrays.matmul(
            read_grad, self.algebra.transposed(states)
        )
        key_grad = self.arrays.matmul(ending, self.algebra.transposed(next_grad))

        # Through the products inside the chunk.
        pairs = self.algebra.channel_pairs(
            out_grad, writes, self.decay, self.decay, True
        )
        pairs = scale * self.algebra.optional_product(pairs, self.same)
        query_grad = query_grad + self.arrays.matmul(pairs, self.key)
        key_grad = key_grad + self.arrays.matmul(
            self.algebra.transposed(pairs), self.query
        )

        value_grad, beta_grad = self.additive_gradients(write_grad)
        log_decay_grad = self.algebra.channel_pairs_gradient(
            self.attention, out_grad, writes, self.decay, self.decay, True, False
        )[2]
        whole = self.arrays.sum(states * next_grad, axis=-2)[..., None, :] * self.whole
        log_decay_grad = log_decay_grad + self.crossing_log_decay_gradient(
            whole,
            read_grad * self.arrays.matmul(self.reading_query, states),
            ending * self.arrays.matmul(self.key, next_grad),
        )
        return query_grad, key_grad, value_grad, log_decay_grad, beta_grad
