"""Layers of a forecaster: the window's scale, the steps to come, ordered quantiles."""

import keras
import numpy as np
from keras import ops

from keras_mom.checks import check_positive
from keras_mom.ops.constants import select


@keras.saving.register_keras_serializable("keras_mom")
class WindowNormalization(keras.layers.Layer):
    """Standardizes each series of each window by its own mean and deviation.

    `x = center + scale * normalized`, over the steps that count. A series that does not
    change within the window has a scale of 1. Source: arXiv 2106.13020 is another
    normalization over batches; this one is that of RevIN (ICLR 2022) without weights.

    Call arguments:
        inputs: float `[B, T, N]`, N series.
        mask: bool `[B, T]`, False at steps that do not count, or None.

    Returns:
        Normalized values `[B, T, N]`, zeros at steps that do not count, and their
        center and scale, `[B, 1, N]` each; of the compute dtype, which should be
        float32 or wider.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)

    def call(self, inputs, mask=None):
        if mask is None:
            center = ops.mean(inputs, axis=1, keepdims=True)
            rest = inputs - center
            square = ops.mean(rest * rest, axis=1, keepdims=True)
        else:
            mask = ops.cast(mask, "bool")[..., None]
            count = ops.sum(ops.cast(mask, inputs.dtype), axis=1, keepdims=True)
            count = ops.maximum(count, 1.0)
            values = select(mask, inputs, 0)
            center = ops.sum(values, axis=1, keepdims=True) / count
            rest = select(mask, values - center, 0)
            square = ops.sum(rest * rest, axis=1, keepdims=True) / count
        # What rounding leaves of a constant series is no scale.
        noise = 1e-6 * ops.absolute(center)
        changes = square > noise * noise
        scale = ops.sqrt(select(changes, square, 1))
        return rest / scale, center, scale

    def compute_mask(self, inputs, mask=None):
        return None, None, None

    def compute_output_shape(self, inputs_shape):
        batch, _, series = inputs_shape
        one = (batch, 1, series)
        return tuple(inputs_shape), one, one

    def get_config(self):
        # Keras takes a dtype policy among the arguments for no config.
        return super().get_config()


@keras.saving.register_keras_serializable("keras_mom")
class FutureSteps(keras.layers.Layer):
    """Appends a learned vector for each step to come.

    Args:
        horizon: number of steps to come.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `[B, T, D]`.

    Returns:
        `[B, T + horizon, D]` of the compute dtype.
    """

    def __init__(self, horizon, **kwargs):
        super().__init__(**kwargs)
        check_positive("horizon", horizon)
        self.horizon = horizon
        self.input_spec = keras.layers.InputSpec(ndim=3)

    def build(self, inputs_shape):
        self.vectors = self.add_weight(
            shape=(self.horizon, inputs_shape[-1]),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
            name="vectors",
        )
        self.built = True

    def call(self, inputs):
        vectors = ops.cast(ops.convert_to_tensor(self.vectors), self.compute_dtype)
        shape = (ops.shape(inputs)[0], *self.vectors.shape)
        return ops.concatenate([inputs, ops.broadcast_to(vectors, shape)], axis=1)

    def compute_output_shape(self, inputs_shape):
        batch, length, width = inputs_shape
        length = None if length is None else length + self.horizon
        return batch, length, width

    def get_config(self):
        return {**super().get_config(), "horizon": self.horizon}


@keras.saving.register_keras_serializable("keras_mom")
class FutureMask(keras.layers.Layer):
    """Appends to a mask that the steps to come count.

    Args:
        horizon: number of steps to come.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `[B, T]`, 0 or False at steps that do not count.

    Returns:
        bool `[B, T + horizon]`.
    """

    def __init__(self, horizon, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_positive("horizon", horizon)
        self.horizon = horizon
        self.input_spec = keras.layers.InputSpec(ndim=2)

    def call(self, inputs):
        mask = ops.cast(inputs, "bool")
        future = ops.ones((ops.shape(mask)[0], self.horizon), "bool")
        return ops.concatenate([mask, future], axis=1)

    def compute_output_spec(self, inputs):
        batch, length = inputs.shape
        length = None if length is None else length + self.horizon
        return keras.KerasTensor((batch, length), dtype="bool")

    def get_config(self):
        return {**super().get_config(), "horizon": self.horizon}


@keras.saving.register_keras_serializable("keras_mom")
class Forecast(keras.layers.Layer):
    """Forecasts from the hidden states of the steps to come.

    With quantiles, a Dense layer gives the middle one and the logarithms of the
    distances between neighbours (through softplus), so that no two ever cross.

    Args:
        num_series: N.
        horizon: number of steps to come.
        num_quantiles: Q, or None for one value a step.
        kernel_initializer: of the Dense layer.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: a tuple: hidden states `[B, T, D]`, of which the last `horizon` count,
            and center and scale, `[B, 1, N]` each; or the hidden states alone, for a
            center of 0 and a scale of 1.

    Returns:
        `[B, horizon, N, Q]`, or `[B, horizon, N]`, of the compute dtype.
    """

    def __init__(
        self,
        num_series,
        horizon,
        num_quantiles=None,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_series = num_series
        self.horizon = horizon
        self.num_quantiles = num_quantiles
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.dense = keras.layers.Dense(
            num_series * (num_quantiles or 1),
            kernel_initializer=self.kernel_initializer,
            dtype=self.dtype_policy,
            name="dense",
        )

    def build(self, inputs_shape):
        if isinstance(inputs_shape[0], (list, tuple)):
            inputs_shape = inputs_shape[0]
        self.dense.build(inputs_shape)
        self.built = True

    def call(self, inputs):
        given = isinstance(inputs, (list, tuple))
        hidden, *scales = inputs if given else (inputs,)
        values = self._values(self.dense(hidden[:, -self.horizon :]))
        if not scales:
            return values
        center, scale = scales
        if self.num_quantiles is None:
            return values * scale + center
        return values * scale[..., None] + center[..., None]

    def _values(self, raw):
        """Quantiles, if any, from the Dense layer's outputs."""
        if self.num_quantiles is None:
            return raw
        shape = (self.horizon, self.num_series, self.num_quantiles)
        raw = ops.reshape(raw, (ops.shape(raw)[0], *shape))
        # The middle one, and the sums of the distances from it, up and down.
        signs = ops.cast(_signs(self.num_quantiles), self.compute_dtype)
        return raw[..., :1] + ops.matmul(ops.softplus(raw[..., 1:]), signs)

    def compute_output_shape(self, inputs_shape):
        if isinstance(inputs_shape[0], (list, tuple)):
            inputs_shape = inputs_shape[0]
        shape = (inputs_shape[0], self.horizon, self.num_series)
        return shape if self.num_quantiles is None else (*shape, self.num_quantiles)

    def get_config(self):
        return {
            **super().get_config(),
            "num_series": self.num_series,
            "horizon": self.horizon,
            "num_quantiles": self.num_quantiles,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


def _signs(count):
    """`[Q - 1, Q]`: which distances lie between the middle and each quantile.

    1 for those above the middle, -1 for those below.
    """
    middle = count // 2
    quantile = np.arange(count)
    distance = np.arange(count - 1)[:, None]
    above = (distance >= middle) & (distance < quantile)
    below = (distance < middle) & (distance >= quantile)
    return ops.convert_to_tensor(above * 1.0 - below, "float32")
