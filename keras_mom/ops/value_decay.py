"""What a block of chunks contributes where the decay is one a value channel."""

from keras import ops

from keras_mom.ops.chunk_factors import ChunkFactors
from keras_mom.ops.chunk_math import (
    channel_pairs,
    channel_pairs_gradient,
    channel_sums,
    channel_sums_gradient,
    lower_mask,
    optional_product,
    transposed,
)


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
        self.whole = transposed(self.whole)

    def _set_products(self):
        self.reading_query = self.query * self.options.scale
        products = ops.matmul(self.reading_query, transposed(self.key))
        products = products * lower_mask(self.options.chunk_size)
        self.attention = optional_product(products, self.same)

    def written(self, write, chunk):
        ending = write * self.to_end[:, chunk]
        return ops.matmul(transposed(self.key[:, chunk]), ending)

    def write_gradient(self, next_grad, chunk):
        return ops.matmul(self.key[:, chunk], next_grad) * self.to_end[:, chunk]

    def output(self, states, writes):
        read = ops.matmul(self.reading_query, states) * self.into_query
        return read + channel_sums(self.attention, writes, self.decay)

    def output_gradients(self, out_grad):
        read = ops.matmul(transposed(self.reading_query), out_grad * self.into_query)
        return read, channel_sums_gradient(self.attention, out_grad, self.decay)

    def gradients(self, states, writes, missing, out_grad, write_grad, next_grad):
        scale = self.options.scale
        # Through the reads and writes of the state.
        read_grad = out_grad * self.into_query
        ending = writes * self.to_end
        query_grad = scale * ops.matmul(read_grad, transposed(states))
        key_grad = ops.matmul(ending, transposed(next_grad))

        # Through the products inside the chunk.
        pairs = channel_pairs(out_grad, writes, self.decay, self.decay, True)
        pairs = scale * optional_product(pairs, self.same)
        query_grad = query_grad + ops.matmul(pairs, self.key)
        key_grad = key_grad + ops.matmul(transposed(pairs), self.query)

        value_grad, beta_grad = self.additive_gradients(write_grad)
        log_decay_grad = channel_pairs_gradient(
            self.attention, out_grad, writes, self.decay, self.decay, True, False
        )[2]
        whole = ops.sum(states * next_grad, axis=-2)[..., None, :] * self.whole
        log_decay_grad = log_decay_grad + self.crossing_log_decay_gradient(
            whole,
            read_grad * ops.matmul(self.reading_query, states),
            ending * ops.matmul(self.key, next_grad),
        )
        return query_grad, key_grad, value_grad, log_decay_grad, beta_grad
