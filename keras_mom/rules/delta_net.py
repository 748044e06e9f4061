"""The delta rule: a write replaces what its key had stored."""

import keras
from keras import ops

from keras_mom.rules.base import MemoryUpdateRule


@keras.saving.register_keras_serializable("keras_mom")
class DeltaNet(MemoryUpdateRule):
    """DeltaNet: `S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T`.

    `b_t = sigmoid(x_t W_b)`, one a head. Query and key are L2-normalized.

    Source: arXiv 2406.06484, section 2.2 and equation 4; L2 norms as in its section
    3.3. Negative eigenvalues: arXiv 2411.12537.

    Args:
        allow_negative_eigenvalues: doubles `b_t`, to (0, 2), so that a write can turn
            what is stored into its opposite.
    """

    write = "delta"
    normalized = (True, True)

    def __init__(self, allow_negative_eigenvalues=False, **kwargs):
        super().__init__(**kwargs)
        self.allow_negative_eigenvalues = bool(allow_negative_eigenvalues)

    def create_projections(self):
        self.write_strength_projection = self.per_memory_dense(
            self.num_heads, "write_strength"
        )

    def project(self, inputs):
        return (self.split_memories(self.write_strength_projection(inputs)),)

    def gates(self, write_strength):
        beta = ops.sigmoid(ops.cast(write_strength, "float32"))
        if self.allow_negative_eigenvalues:
            beta = 2 * beta
        return None, beta

    def get_config(self):
        return {
            **super().get_config(),
            "allow_negative_eigenvalues": self.allow_negative_eigenvalues,
        }
