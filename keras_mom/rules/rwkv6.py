"""RWKV-6: a decay a key channel, and a bonus for the token that is being read."""

import keras
from keras import ops

from keras_mom.checks import check_positive
from keras_mom.initializers import Cycle, Ramp
from keras_mom.rules.base import MemoryUpdateRule


@keras.saving.register_keras_serializable("keras_mom")
class RWKV6(MemoryUpdateRule):
    """RWKV-6 ("Finch"): `S_t = diag(w_t) S_{t-1} + k_t v_t^T`.

    A token reads what the tokens before it left, and of itself what the bonus `u` lets
    through: `o_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t`. The decay is
    `w_t = exp(-exp(c + tanh(x_t W_1) W_2))`, one a key channel, through a projection of
    low rank. `u` and `c` are `[H, K]`, shared by the memories, and float32. They begin
    as in the first layer of the authors' code: `c` rises over all H * K channels from
    -6 to -1, as `-6 + 5 r^0.7` with r from 0 to 1, and `u` is 0, 0.1, -0.1, and so on.

    Source: arXiv 2404.05892, section 4.2 (decay, state and bonus).

    Args:
        rank: columns of `W_1`.
    """

    write = "additive"
    read_before_update = True

    def __init__(self, rank=64, **kwargs):
        super().__init__(**kwargs)
        check_positive("rank", rank)
        self.rank = rank

    def create_projections(self):
        self.decay_projection = self.per_memory_low_rank(
            self.rank, self.num_heads * self.key_dim, "decay", activation="tanh"
        )

    def build(self, inputs_shape):
        channels = (self.num_heads, self.key_dim)
        self.decay_bias = self.add_float32_weight(
            "decay_bias", Ramp(-6.0, -1.0, power=0.7), channels
        )
        self.bonus = self.add_float32_weight("bonus", Cycle((0.0, 0.1, -0.1)), channels)
        super().build(inputs_shape)

    def project(self, inputs):
        return (self.decay_projection(inputs),)

    def prepare(self, query, key, value, decay):
        decay = ops.reshape(ops.cast(decay, "float32"), ops.shape(query))
        return query, key, value, -ops.exp(decay + self.decay_bias), None

    def scan(self, scan, query, key, value, log_decay, beta, initial_state):
        outputs, state = super().scan(
            scan, query, key, value, log_decay, beta, initial_state
        )
        query, key = ops.cast(query, "float32"), ops.cast(key, "float32")
        own = ops.sum(query * self.bonus * key, axis=-1, keepdims=True)
        own = self.key_dim**-0.5 * own * ops.cast(value, "float32")
        return ops.cast(outputs, "float32") + own, state

    def get_config(self):
        return {**super().get_config(), "rank": self.rank}
