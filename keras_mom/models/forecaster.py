"""A forecaster of time series."""

import keras

from keras_mom.checks import check_positive
from keras_mom.models.exporting import ForecastModel
from keras_mom.models.quantile_loss import check_quantiles
from keras_mom.models.sequence_blocks import Blocks, padding_mask_input
from keras_mom.models.window_layers import (
    Forecast,
    FutureMask,
    FutureSteps,
    WindowNormalization,
)


def mom_forecaster(
    num_series,
    horizon,
    num_layers,
    hidden_dim,
    num_heads,
    key_dim,
    value_dim=None,
    *,
    sequence_length=None,
    quantiles=(0.1, 0.5, 0.9),
    known_covariates=0,
    normalize=True,
    bidirectional=False,
    intermediate_dim=None,
    dropout=0.0,
    padding_mask=False,
    remat=False,
    seed=None,
    dtype=None,
    name="mom_forecaster",
    **mom_arguments,
):
    """Builds a model that forecasts time series from a window of their past.

    Each series of a window is standardized by its own mean and deviation, and the
    forecast is scaled back, so that the model takes and gives the data's own units.
    The window is followed by one learned token for each step to come, whose hidden
    states become the forecasts of all steps at once. The blocks are those of
    `keras_mom.models.mom_classifier`.

    Args:
        num_series: number of series N, forecast together.
        horizon: number of steps to forecast.
        num_layers: number of blocks.
        hidden_dim: width, D.
        num_heads, key_dim, value_dim: of `keras_mom.MoMLayer`.
        sequence_length: T, steps in a window, or None for any number.
        quantiles: quantiles Q to forecast, rising between 0 and 1; they never cross.
            `keras_mom.models.QuantileLoss` trains them. None for one value a step.
        known_covariates: number of covariates C that are known for the window and for
            the steps to come, such as the time of year.
        normalize: whether windows are standardized.
        bidirectional: whether each block reads the sequence in both directions.
        intermediate_dim, dropout, remat, seed, dtype, name, **mom_arguments: as in
            `keras_mom.models.mom_encoder`. Scales and forecasts are float32 or wider.
        padding_mask: whether the model takes a mask too.

    Returns:
        A functional `keras.Model`, not compiled. It takes the values of the window,
        float `[B, T, N]`; with covariates or a mask a dict of them as `values`, of
        `known_covariates`, float `[B, T + horizon, C]`, and of `padding_mask`, int32
        or bool `[B, T]`, 0 at steps that do not count, anywhere in a row. It returns
        `[B, horizon, N, Q]`, or `[B, horizon, N]` without quantiles.

    Raises:
        ValueError: if an argument does not fit; the message names it.

    Example:

    >>> model = keras_mom.models.mom_forecaster(
    ...     3, horizon=12, num_layers=2, hidden_dim=64, num_heads=2, key_dim=32
    ... )
    >>> model.compile("adam", keras_mom.models.QuantileLoss((0.1, 0.5, 0.9)))
    >>> model(np.random.normal(size=(2, 48, 3))).shape
    (2, 12, 3, 3)
    """
    check_positive("num_series", num_series)
    check_positive("horizon", horizon)
    if sequence_length is not None:
        check_positive("sequence_length", sequence_length)
    if known_covariates != 0:
        check_positive("known_covariates", known_covariates)
    count = None if quantiles is None else len(check_quantiles(quantiles))
    blocks = Blocks(
        num_layers,
        hidden_dim,
        num_heads,
        key_dim,
        value_dim,
        bidirectional=bidirectional,
        intermediate_dim=intermediate_dim,
        dropout=dropout,
        remat=remat,
        seed=seed,
        dtype=dtype,
        mom_arguments=mom_arguments,
    )
    values = keras.Input((sequence_length, num_series), name="values")
    inputs, mask, whole_mask = {"values": values}, None, None
    if padding_mask:
        inputs["padding_mask"] = mask = padding_mask_input(sequence_length)
        whole_mask = FutureMask(horizon, name="whole_mask")(mask)

    x, scales = values, ()
    if normalize:
        normalization = WindowNormalization(dtype=blocks.output_dtype, name="window")
        x, *scales = normalization(values, mask=mask)
    x = keras.layers.Dense(hidden_dim, dtype=blocks.dtype, name="embedding")(x)
    x = FutureSteps(horizon, dtype=blocks.dtype, name="future")(x)
    if known_covariates:
        whole = None if sequence_length is None else sequence_length + horizon
        covariates = keras.Input((whole, known_covariates), name="known_covariates")
        inputs["known_covariates"] = covariates
        embedded = keras.layers.Dense(
            hidden_dim, use_bias=False, dtype=blocks.dtype, name="covariate_embedding"
        )(covariates)
        x = keras.layers.Add(dtype=blocks.dtype, name="with_covariates")([x, embedded])
    x = blocks(x, whole_mask)
    head = Forecast(
        num_series, horizon, count, dtype=blocks.output_dtype, name="forecast"
    )
    outputs = head((x, *scales)) if scales else head(x)
    return ForecastModel(values if len(inputs) == 1 else inputs, outputs, name=name)
