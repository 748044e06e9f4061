"""A year of atmospheric CO2, forecast month by month with its uncertainty.

The series comes with statsmodels: CO2 above Mauna Loa from 1958 to 2001, here as
monthly means. A `mom_forecaster` reads five years and gives quantiles of the twelve
months to come; it knows the time of year. It is compared with two forecasts that repeat
the last year, as it was or moved by the change from the year before, with the quantiles
of the errors that they make on the training data.

    python examples/forecast.py                         # on JAX
    KERAS_BACKEND=torch python examples/forecast.py

Needs statsmodels; `--plot FILE` needs matplotlib.
"""

import argparse
import os
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
import statsmodels.api as sm

import keras_mom

QUANTILES = (0.1, 0.5, 0.9)
SEASON = 12  # months, and the horizon
WINDOW = 60
HELD_OUT = 120


def read_series():
    """The monthly means in parts per million, float32 `[T]`."""
    weekly = sm.datasets.co2.load_pandas().data["co2"]
    # A few weeks were not measured.
    return weekly.resample("MS").mean().interpolate().to_numpy("float32")


def phases(start, steps):
    """Where in the year each month lies, on a circle: `[steps, 2]`."""
    angle = 2 * np.pi * (start + np.arange(steps)) / SEASON
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).astype("float32")


def windows(series, starts):
    """Inputs and targets of the forecaster that begin at these steps."""
    whole = WINDOW + SEASON
    values = np.stack([series[start : start + whole] for start in starts])[..., None]
    inputs = {
        "values": values[:, :WINDOW],
        "known_covariates": np.stack([phases(s, whole) for s in starts]),
    }
    return inputs, values[:, WINDOW:]


def repeat_season(values, trend):
    """The last year of the windows `[B, T, 1]` again, moved by their trend or not."""
    forecast = values[:, -SEASON:]
    if trend:
        change = values[:, -SEASON:].mean(1) - values[:, -2 * SEASON : -SEASON].mean(1)
        forecast = forecast + change[:, None]
    return forecast


def with_error_quantiles(forecast, errors):
    """Adds to `[B, H, 1]` the quantiles of a step's errors: `[B, H, 1, Q]`."""
    return forecast[..., None] + np.moveaxis(np.quantile(errors, QUANTILES, 0), 0, -1)


def scores(targets, forecast):
    """Pinball loss and mean absolute error of the median."""
    loss = keras_mom.models.QuantileLoss(QUANTILES)(targets, forecast)
    middle = forecast[..., QUANTILES.index(0.5)]
    return float(loss), float(np.abs(targets - middle).mean())


def plot(path, inputs, targets, forecast):
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    past = inputs["values"][-1, :, 0]
    lower, upper = forecast[-1, :, 0, 0], forecast[-1, :, 0, -1]
    future = np.arange(len(past), len(past) + len(lower))
    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.plot(past, color="black", label="window")
    axes.plot(future, targets[-1, :, 0], color="black", linestyle=":", label="true")
    axes.plot(future, forecast[-1, :, 0, 1], label="median")
    axes.fill_between(future, lower, upper, alpha=0.3, label="10% to 90%")
    axes.legend()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(
        description="Forecast atmospheric CO2 a year ahead, with quantiles."
    )
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="draw the last forecast")
    arguments = parser.parse_args()
    started = time.perf_counter()
    keras.utils.set_random_seed(arguments.seed)
    print(f"Keras {keras.__version__} on {keras.config.backend()}")

    series = read_series()
    border = len(series) - HELD_OUT
    # Training ends before the held-out months; their windows reach back behind it.
    inputs, targets = windows(series, range(border - SEASON - WINDOW + 1))
    test_starts = range(border - WINDOW, len(series) - SEASON - WINDOW + 1)
    test_inputs, test_targets = windows(series, test_starts)
    print(
        f"{len(series)} months, the last {HELD_OUT} held out; {len(targets)} windows "
        f"of {WINDOW} months, {SEASON} to come"
    )
    model = keras_mom.models.mom_forecaster(
        1,
        SEASON,
        num_layers=arguments.layers,
        hidden_dim=arguments.width,
        num_heads=2,
        key_dim=arguments.width // 4,
        sequence_length=WINDOW,
        quantiles=QUANTILES,
        known_covariates=2,
        dropout=0.1,
    )
    print(f"{model.count_params():,} parameters")
    steps = arguments.epochs * -(-len(targets) // arguments.batch)
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(
                0.0, steps, warmup_target=4e-3, warmup_steps=steps // 10
            ),
            weight_decay=0.01,
            clipnorm=1.0,
        ),
        keras_mom.models.QuantileLoss(QUANTILES),
    )
    model.fit(
        inputs,
        targets,
        batch_size=arguments.batch,
        epochs=arguments.epochs,
        verbose=1 if sys.stdout.isatty() else 0,
    )

    print("\nHeld-out months               pinball      MAE")
    for name, trend in (("last year", False), ("last year, trend", True)):
        errors = targets - repeat_season(inputs["values"], trend)
        forecast = with_error_quantiles(
            repeat_season(test_inputs["values"], trend), errors
        )
        loss, error = scores(test_targets, forecast)
        print(f"  {name:26s}{loss:9.4f}{error:9.4f}")
    forecast = model.predict(test_inputs, verbose=0)
    loss, error = scores(test_targets, forecast)
    print(f"  {'Mixture of Memories':26s}{loss:9.4f}{error:9.4f}")
    inside = (test_targets >= forecast[..., 0]) & (test_targets <= forecast[..., -1])
    print(f"\n{inside.mean():.0%} of the values lie between the outer quantiles (80%)")
    if arguments.plot:
        plot(arguments.plot, test_inputs, test_targets, forecast)
        print(f"Drawn in {arguments.plot}")
    print(f"\nDone in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
