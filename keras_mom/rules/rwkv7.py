"""RWKV-7: a decay a key channel, and a delta write that reads before the decay."""

import math

import keras
from keras import ops

from keras_mom.checks import check_positive
from keras_mom.initializers import Ramp
from keras_mom.rules.base import MemoryUpdateRule


@keras.saving.register_keras_serializable("keras_mom")
class RWKV7(MemoryUpdateRule):
    """RWKV-7: `S_t = diag(w_t) S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T`.

    `w_t = exp(-exp(-1/2) sigmoid(c + tanh(x_t W_1) W_2))`, one a key channel, through a
    projection of low rank, and the in-context learning rate `b_t = sigmoid(x_t W_b)`.
    This is the form of arXiv 2502.13685, Table 1: what is removed is what is written,
    and the learning rate is one a head, not one a channel. The key is L2-normalized.
    `c` is shared by the memories and float32; at first it rises evenly over all H * K
    channels from -5.5 to 0.5, as in the first layer of the authors' code, so that
    they forget at different speeds.

    Source: arXiv 2503.14456, section 4.

    Args:
        rank: columns of `W_1`.
    """

    write = "delta"
    erase_before_decay = True
    normalized = (False, True)

    def __init__(self, rank=64, **kwargs):
        super().__init__(**kwargs)
        check_positive("rank", rank)
        self.rank = rank

    def create_projections(self):
        self.decay_projection = self.per_memory_low_rank(
            self.rank, self.num_heads * self.key_dim, "decay", activation="tanh"
        )
        self.rate_projection = self.per_memory_dense(self.num_heads, "rate")

    def build(self, inputs_shape):
        self.decay_bias = self.add_float32_weight(
            "decay_bias", Ramp(-5.5, 0.5), (self.num_heads, self.key_dim)
        )
        super().build(inputs_shape)

    def project(self, inputs):
        return (
            self.decay_projection(inputs),
            self.split_memories(self.rate_projection(inputs)),
        )

    def gates(self, decay, rate):
        decay = ops.cast(decay, "float32")
        shape = (*ops.shape(decay)[:2], self.num_heads, self.key_dim)
        decay = ops.reshape(decay, shape)
        log_decay = -math.exp(-0.5) * ops.sigmoid(decay + self.decay_bias)
        beta = ops.sigmoid(ops.cast(rate, "float32"))
        return log_decay, beta

    def get_config(self):
        return {**super().get_config(), "rank": self.rank}
