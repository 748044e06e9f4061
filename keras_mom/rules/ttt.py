"""Test-time training of a linear memory, by a gradient step a token."""

import keras
from keras import ops

from keras_mom.rules.base import MemoryUpdateRule


@keras.saving.register_keras_serializable("keras_mom")
class TTT(MemoryUpdateRule):
    """Test-time training: `S_t = S_{t-1} - b_t grad l_t(S_{t-1})`.

    `l_t(S) = 1/2 |S^T k_t - v_t|^2`, and the learning rate
    `b_t = learning_rate * sigmoid(x_t W_b)`, one a head. This is the linear memory
    with one step a token of arXiv 2502.13685, Table 1; layer norm and residual of the
    paper's inner model are not part of it. Query and key are L2-normalized, so that a
    step at a rate of up to 2 does not diverge.

    Source: arXiv 2407.04620, equation 3 and section 2.7 (base learning rate 1).

    Args:
        learning_rate: the base learning rate, above 0 and at most 2.
    """

    write = "delta"
    normalized = (True, True)

    def __init__(self, learning_rate=1.0, **kwargs):
        super().__init__(**kwargs)
        if not 0 < learning_rate <= 2:
            raise ValueError(
                "`learning_rate` must be above 0 and at most 2. "
                f"Received: learning_rate={learning_rate}"
            )
        self.learning_rate = float(learning_rate)

    def create_projections(self):
        self.rate_projection = self.per_memory_dense(self.num_heads, "rate")

    def project(self, inputs):
        return (self.split_memories(self.rate_projection(inputs)),)

    def gates(self, rate):
        beta = self.learning_rate * ops.sigmoid(ops.cast(rate, "float32"))
        return None, beta

    def get_config(self):
        return {**super().get_config(), "learning_rate": self.learning_rate}
