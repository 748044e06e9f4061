"""The pinball loss."""

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable("keras_mom")
class QuantileLoss(keras.losses.Loss):
    """The pinball loss of several quantiles, averaged over them.

    `q (y - p)` where the true value y lies above the prediction p of quantile q, and
    `(1 - q) (p - y)` below. Its expectation is least where p is that quantile. Source:
    Koenker and Bassett, Econometrica 46 (1978).

    Args:
        quantiles: the quantiles, between 0 and 1, in the order of the last axis of the
            predictions.
        name, reduction, dtype: as in `keras.losses.Loss`.

    Call arguments:
        y_true: float `[..., ]`, such as `[B, horizon, N]`.
        y_pred: float `[..., Q]`.
        sample_weight: as in `keras.losses.Loss`, such as `[B, horizon, N]`.

    Raises:
        ValueError: if quantiles do not rise between 0 and 1, or shapes do not fit.
    """

    def __init__(
        self,
        quantiles=(0.1, 0.5, 0.9),
        name="quantile_loss",
        reduction="sum_over_batch_size",
        dtype=None,
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.quantiles = check_quantiles(quantiles)

    def call(self, y_true, y_pred):
        y_pred = ops.convert_to_tensor(y_pred)
        y_true = ops.cast(ops.convert_to_tensor(y_true), y_pred.dtype)
        if len(y_pred.shape) != len(y_true.shape) + 1 or y_pred.shape[-1] != len(
            self.quantiles
        ):
            raise ValueError(
                "`y_pred` must have one axis more than `y_true`, with the "
                f"{len(self.quantiles)} quantiles. Received: y_true of shape "
                f"{tuple(y_true.shape)}, y_pred of shape {tuple(y_pred.shape)}"
            )
        quantiles = ops.convert_to_tensor(np.array(self.quantiles, "float32"))
        quantiles = ops.cast(quantiles, y_pred.dtype)
        error = y_true[..., None] - y_pred
        return ops.mean(ops.maximum(quantiles * error, (quantiles - 1) * error), -1)

    def get_config(self):
        return {**super().get_config(), "quantiles": list(self.quantiles)}


def check_quantiles(quantiles):
    """Returns a tuple of quantiles, or raises."""
    values = tuple(float(q) for q in np.atleast_1d(quantiles))
    rises = all(a < b for a, b in zip(values, values[1:]))
    if not values or not rises or not 0 < values[0] or not values[-1] < 1:
        raise ValueError(
            "`quantiles` must rise, and lie between 0 and 1, both excluded. "
            f"Received: quantiles={quantiles!r}"
        )
    return values
