"""Mamba-2: a decay a head, and a step size that scales both decay and write."""

import keras
from keras import ops

from keras_mom import backend
from keras_mom.initializers import InverseSoftplusLogUniform, LogUniform
from keras_mom.rules.base import MemoryUpdateRule


@keras.saving.register_keras_serializable("keras_mom")
class Mamba2(MemoryUpdateRule):
    """Mamba-2: `S_t = exp(-A dt_t) S_{t-1} + dt_t k_t v_t^T`.

    `dt_t = softplus(x_t W_dt + dt_bias)`, one a head. Query, key and value are C, B and
    x of the paper. `A` and `dt_bias`, one a head, are shared by the memories and
    float32; at first `A` is uniform in (1, 16) and `softplus(dt_bias)` log-uniform in
    (0.001, 0.1). The skip connection `D x` is left to the layer around the memories.

    Source: arXiv 2405.21060, sections 2.1 and 7, and its code's initial values.
    """

    write = "additive"

    def create_projections(self):
        self.step_projection = self.per_memory_dense(self.num_heads, "step")

    def build(self, inputs_shape):
        self.a_log = self.add_float32_weight("A_log", LogUniform(1.0, 16.0))
        self.dt_bias = self.add_float32_weight(
            "dt_bias", InverseSoftplusLogUniform(0.001, 0.1)
        )
        super().build(inputs_shape)

    def project(self, inputs):
        return (self.split_memories(self.step_projection(inputs)),)

    def prepare(self, query, key, value, step):
        step = backend.softplus(ops.cast(step, "float32") + self.dt_bias)
        return query, key, value, -ops.exp(self.a_log) * step, step
