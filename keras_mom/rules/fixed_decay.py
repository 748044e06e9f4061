"""Rules whose decay is a constant of the head: retention and Lightning Attention."""

import math

import keras
from keras import ops

from keras_mom.rules.base import MemoryUpdateRule


class FixedDecay(MemoryUpdateRule):
    """`S_t = a_h S_{t-1} + k_t v_t^T`, with a constant `a_h` a head."""

    write = "additive"

    def log_decays(self):
        """The logarithm of each head's decay, a list of H numbers."""
        raise NotImplementedError

    def prepare(self, query, key, value):
        constant = ops.convert_to_tensor(self.log_decays(), "float32")
        log_decay = ops.broadcast_to(constant, ops.shape(query)[:3])
        return query, key, value, log_decay, None


@keras.saving.register_keras_serializable("keras_mom")
class RetNet(FixedDecay):
    """Retention: `S_t = a_h S_{t-1} + k_t v_t^T`, `a_h = 1 - 2^(-5 - h)`.

    Heads are numbered from 0. Query and key are not rotated: a rotation needs a
    token's absolute place, which the memories do not have.

    Source: arXiv 2307.08621, equations 6 and 8.
    """

    def log_decays(self):
        return [math.log1p(-(2.0 ** (-5 - h))) for h in range(self.num_heads)]


@keras.saving.register_keras_serializable("keras_mom")
class Lightning(FixedDecay):
    """Lightning Attention: `S_t = exp(-s_h) S_{t-1} + k_t v_t^T`, `s_h = 2^(-8h / H)`.

    Heads are numbered from 1; the slopes are those of ALiBi (arXiv 2108.12409).

    Source: arXiv 2401.04658, section 3; slopes as in its authors' TransNormer
    (arXiv 2307.14995, section 3.1), whose factor for the depth of a layer is
    `slope_scale` here.

    Args:
        slope_scale: factor of all slopes, 0 or more. 0 forgets nothing.
    """

    def __init__(self, slope_scale=1.0, **kwargs):
        super().__init__(**kwargs)
        if not slope_scale >= 0:
            raise ValueError(
                f"`slope_scale` must be 0 or more. Received: slope_scale={slope_scale}"
            )
        self.slope_scale = float(slope_scale)

    def log_decays(self):
        heads = self.num_heads
        return [-self.slope_scale * 2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]

    def get_config(self):
        return {**super().get_config(), "slope_scale": self.slope_scale}
