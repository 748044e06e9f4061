"""The gated delta rule: a decay a head, and writes that replace."""

import keras
from keras import ops

from keras_mom.initializers import InverseSoftplusLogUniform, LogUniform
from keras_mom.ops.gates import decay_and_write_strength
from keras_mom.rules.base import MemoryUpdateRule


@keras.saving.register_keras_serializable("keras_mom")
class GatedDeltaNet(MemoryUpdateRule):
    """Gated DeltaNet: `S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T`.

    `a_t = exp(-A softplus(x_t W_a + dt_bias))` and `b_t = sigmoid(x_t W_b)`, one a
    head. Query and key are L2-normalized. `A` and `dt_bias`, one a head, are shared by
    the memories and float32; at first `A` is uniform in (0, 16) and `softplus(dt_bias)`
    log-uniform in (0.001, 0.1).

    Source: arXiv 2412.06464, equation 10; initial values of arXiv 2405.21060.
    """

    write = "delta"
    normalized = (True, True)

    def create_projections(self):
        self.decay_projection = self.per_memory_dense(self.num_heads, "decay")
        self.write_strength_projection = self.per_memory_dense(
            self.num_heads, "write_strength"
        )

    def build(self, inputs_shape):
        self.a_log = self.add_float32_weight("A_log", LogUniform(0.0, 16.0))
        self.dt_bias = self.add_float32_weight(
            "dt_bias", InverseSoftplusLogUniform(0.001, 0.1)
        )
        super().build(inputs_shape)

    def project(self, inputs):
        return (
            self.split_memories(self.decay_projection(inputs)),
            self.split_memories(self.write_strength_projection(inputs)),
        )

    def prepare(self, query, key, value, decay, write_strength):
        log_decay, beta = decay_and_write_strength(
            decay,
            write_strength,
            ops.convert_to_tensor(self.dt_bias),
            ops.convert_to_tensor(self.a_log),
            implementation=self.implementation,
        )
        return query, key, value, log_decay, beta
