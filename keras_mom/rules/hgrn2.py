"""HGRN2: a forget gate a key channel, and what it forgets is what it writes."""

import keras
from keras import ops

from keras_mom.rules.base import MemoryUpdateRule


@keras.saving.register_keras_serializable("keras_mom")
class HGRN2(MemoryUpdateRule):
    """HGRN2: `S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T`.

    The forget gate `f_t = b + (1 - b) sigmoid(z_t)`, one a key channel, is made of the
    layer's key `z_t`. Key and value pass the convolution without an activation.

    Source: arXiv 2404.07904, equations 5 to 7.

    Args:
        lower_bound: b, the least that is kept a step, at least 0 and below 1. The
            paper raises it from layer to layer, beginning with 0.
    """

    write = "additive"
    convolution_activations = ("silu", None, None)

    def __init__(self, lower_bound=0.0, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= lower_bound < 1:
            raise ValueError(
                "`lower_bound` must be at least 0 and below 1. "
                f"Received: lower_bound={lower_bound}"
            )
        self.lower_bound = float(lower_bound)

    def prepare(self, query, key, value):
        gate = ops.cast(key, "float32")
        written = (1 - self.lower_bound) * ops.sigmoid(-gate)
        if self.lower_bound:
            log_decay = ops.log1p(-written)
        else:
            # Exact where the gate is near 0.
            log_decay = ops.log_sigmoid(gate)
        return query, written, value, log_decay, None

    def get_config(self):
        return {**super().get_config(), "lower_bound": self.lower_bound}
