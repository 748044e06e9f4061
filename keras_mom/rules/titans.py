"""Titans: test-time training of a linear memory that also forgets."""

import keras
from keras import ops

from keras_mom.initializers import InverseSoftplusLogUniform
from keras_mom.rules.base import MemoryUpdateRule


@keras.saving.register_keras_serializable("keras_mom")
class Titans(MemoryUpdateRule):
    """Titans: `S_t = (1 - a_t) S_{t-1} - b_t grad l_t(S_{t-1})`.

    `l_t(S) = 1/2 |S^T k_t - v_t|^2`; what is forgotten, `a_t = sigmoid(x_t W_a + c)`,
    and the learning rate, `b_t = sigmoid(x_t W_b)`, are one a head. The gradient is
    taken before anything is forgotten. This is the linear memory without momentum of
    arXiv 2502.13685, Table 1. Query and key are L2-normalized. `c`, one a head, is
    shared by the memories and float32; the paper names no initial value, and here
    `softplus(c)` is log-uniform in (0.001, 0.1), as in the gated delta rule.

    Source: arXiv 2501.00663, equations 13 and 14.
    """

    write = "delta"
    erase_before_decay = True
    normalized = (True, True)

    def create_projections(self):
        self.forget_projection = self.per_memory_dense(self.num_heads, "forget")
        self.rate_projection = self.per_memory_dense(self.num_heads, "rate")

    def build(self, inputs_shape):
        self.forget_bias = self.add_float32_weight(
            "forget_bias", InverseSoftplusLogUniform(0.001, 0.1)
        )
        super().build(inputs_shape)

    def project(self, inputs):
        return (
            self.split_memories(self.forget_projection(inputs)),
            self.split_memories(self.rate_projection(inputs)),
        )

    def gates(self, forget, rate):
        # log(1 - sigmoid(z)) = -softplus(z).
        log_decay = -ops.softplus(ops.cast(forget, "float32") + self.forget_bias)
        beta = ops.sigmoid(ops.cast(rate, "float32"))
        return log_decay, beta
