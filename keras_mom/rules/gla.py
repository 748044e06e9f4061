"""Gated linear attention: a decay a key channel, projected from the token."""

import keras
from keras import ops

from keras_mom.checks import check_positive
from keras_mom.rules.base import MemoryUpdateRule


@keras.saving.register_keras_serializable("keras_mom")
class GLA(MemoryUpdateRule):
    """Gated linear attention: `S_t = diag(a_t) S_{t-1} + k_t v_t^T`.

    `a_t = sigmoid(x_t W_1 W_2 + b)^(1 / temperature)`, one a key channel, through a
    projection of low rank.

    Source: arXiv 2312.06635, section 4.4, whose rank and temperature are 16.

    Args:
        rank: columns of `W_1`.
        temperature: root that is taken of the gate, positive.
    """

    write = "additive"

    def __init__(self, rank=16, temperature=16.0, **kwargs):
        super().__init__(**kwargs)
        check_positive("rank", rank)
        if not temperature > 0:
            raise ValueError(
                f"`temperature` must be positive. Received: temperature={temperature}"
            )
        self.rank = rank
        self.temperature = float(temperature)

    def create_projections(self):
        self.decay_projection = self.per_memory_low_rank(
            self.rank, self.num_heads * self.key_dim, "decay", use_bias=True
        )

    def project(self, inputs):
        return (self.decay_projection(inputs),)

    def prepare(self, query, key, value, decay):
        decay = ops.reshape(ops.cast(decay, "float32"), ops.shape(query))
        log_decay = ops.log_sigmoid(decay) / self.temperature
        return query, key, value, log_decay, None

    def get_config(self):
        return {
            **super().get_config(),
            "rank": self.rank,
            "temperature": self.temperature,
        }
