"""Kimi Delta Attention: the gated delta rule with a decay a key channel."""

import keras
from keras import ops

from keras_mom.checks import check_positive
from keras_mom.initializers import InverseSoftplusLogUniform, LogUniform
from keras_mom.rules.base import MemoryUpdateRule


@keras.saving.register_keras_serializable("keras_mom")
class KDA(MemoryUpdateRule):
    """Kimi Delta Attention: a gated delta rule with a decay a channel.

    `S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T`;
    `a_t = exp(-A softplus(x_t W_1 W_2 + dt_bias))`, one a key channel, through a
    projection of low rank; `b_t = sigmoid(x_t W_b)`, one a head. Query and key are
    L2-normalized. `A`, one a head, and `dt_bias`, one a key channel, are shared by the
    memories and float32; at first `A` is uniform in (1, 16) and `softplus(dt_bias)`
    log-uniform in (0.001, 0.1).

    Source: arXiv 2510.26692, equation 1 and section 4.

    Args:
        rank: columns of `W_1`. Defaults to K.
    """

    write = "delta"
    normalized = (True, True)

    def __init__(self, rank=None, **kwargs):
        super().__init__(**kwargs)
        if rank is not None:
            check_positive("rank", rank)
        self.rank = rank

    def create_projections(self):
        rank = self.key_dim if self.rank is None else self.rank
        self.decay_projection = self.per_memory_low_rank(
            rank, self.num_heads * self.key_dim, "decay"
        )
        self.write_strength_projection = self.per_memory_dense(
            self.num_heads, "write_strength"
        )

    def build(self, inputs_shape):
        self.a_log = self.add_float32_weight("A_log", LogUniform(1.0, 16.0))
        self.dt_bias = self.add_float32_weight(
            "dt_bias",
            InverseSoftplusLogUniform(0.001, 0.1),
            (self.num_heads, self.key_dim),
        )
        super().build(inputs_shape)

    def project(self, inputs):
        return (
            self.decay_projection(inputs),
            self.split_memories(self.write_strength_projection(inputs)),
        )

    def gates(self, decay, write_strength):
        decay = ops.cast(decay, "float32")
        shape = (*ops.shape(decay)[:2], self.num_heads, self.key_dim)
        decay = ops.reshape(decay, shape)
        rate = ops.exp(self.a_log)[:, None]
        log_decay = -rate * ops.softplus(decay + self.dt_bias)
        beta = ops.sigmoid(ops.cast(write_strength, "float32"))
        return log_decay, beta

    def get_config(self):
        return {**super().get_config(), "rank": self.rank}
