"""Layers that respect masks where Keras' own do not."""

import keras
from keras import ops

from keras_mom.ops.constants import select

_MODES = ("mean", "max", "last")


@keras.saving.register_keras_serializable("keras_mom")
class MaskedPooling(keras.layers.Layer):
    """One vector a sequence, from its valid tokens alone.

    Args:
        mode: `"mean"` or `"max"` over the valid tokens, or the `"last"` of them.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: float `[B, T, D]`.
        mask: bool `[B, T]`, False at tokens that do not count, anywhere.

    Returns:
        `[B, D]` of the compute dtype; zeros for a row without a valid token.

    Raises:
        ValueError: if `mode` is none of these.
    """

    def __init__(self, mode="mean", **kwargs):
        super().__init__(**kwargs)
        self.mode = check_pooling("mode", mode)
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)

    def call(self, inputs, mask=None):
        if mask is None:
            if self.mode == "last":
                return inputs[:, -1]
            reduce = ops.mean if self.mode == "mean" else ops.max
            return reduce(inputs, axis=1)
        mask = ops.cast(mask, "bool")
        if self.mode == "last":
            index = select(mask, ops.arange(ops.shape(mask)[1], dtype="int32"), -1)
            mask = ops.logical_and(mask, index == ops.max(index, 1, keepdims=True))
        if self.mode == "max":
            valid = ops.any(mask, axis=1)
            values = select(mask[..., None], inputs, float("-inf"))
            highest = ops.max(values, axis=1)
            return select(valid[:, None], highest, 0)
        values = ops.cast(select(mask[..., None], inputs, 0), "float32")
        count = ops.sum(ops.cast(mask, "float32"), axis=1, keepdims=True)
        pooled = ops.sum(values, axis=1) / ops.maximum(count, 1.0)
        return ops.cast(pooled, self.compute_dtype)

    def compute_mask(self, inputs, mask=None):
        return None

    def compute_output_shape(self, inputs_shape):
        return inputs_shape[0], inputs_shape[-1]

    def get_config(self):
        return {**super().get_config(), "mode": self.mode}


@keras.saving.register_keras_serializable("keras_mom")
class MaskedOutput(keras.layers.Layer):
    """Zeros at tokens that do not count, which Keras' losses and metrics leave out.

    Call arguments:
        inputs: a pair: float `[B, T, D]`, and bool `[B, T]`, False at tokens that do
            not count. It becomes the output's mask.

    Returns:
        `[B, T, D]` of the compute dtype.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs):
        values, mask = inputs
        return select(ops.cast(mask, "bool")[..., None], values, 0)

    def compute_mask(self, inputs, mask=None):
        return ops.cast(inputs[1], "bool")

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape[0])

    def get_config(self):
        # Keras takes a dtype policy among the arguments for no config.
        return super().get_config()


def check_pooling(name, mode):
    """Returns the mode of a pooling, or raises an error that names the argument."""
    if mode not in _MODES:
        raise ValueError(f"`{name}` must be one of {_MODES}. Received: {mode!r}")
    return mode
