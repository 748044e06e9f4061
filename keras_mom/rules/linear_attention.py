"""Linear attention: writes are added, and nothing is forgotten."""

import keras

from keras_mom.rules.base import MemoryUpdateRule


@keras.saving.register_keras_serializable("keras_mom")
class LinearAttention(MemoryUpdateRule):
    """Linear attention: `S_t = S_{t-1} + k_t v_t^T`.

    Source: arXiv 2006.16236, in the form without feature map and normalizer of
    arXiv 2502.13685, Table 1.
    """

    write = "additive"

    def prepare(self, query, key, value):
        return query, key, value, None, None
