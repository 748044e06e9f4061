"""Training of a language model that may be interrupted: optimizer and callbacks."""

import math
import time
from typing import Any

import keras
import numpy as np
from bookkeeping import PeakRate, read_rows, write_rows
from lm_evaluation import bits_of_bytes
from train_lm import steps_of


def compile_model(lm, learning_rate, steps, warmup, weight_decay):
    """AdamW; the learning rate grows, and falls to a tenth along a cosine."""
    warmup = min(warmup, steps // 2)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else 1.0,
        max(1, steps - warmup),
        alpha=0.1,
        warmup_target=1.0 if warmup else None,
        warmup_steps=warmup,
    )
    optimizer = PeakRate.adamw(
        learning_rate,
        schedule,
        weight_decay=weight_decay,
        beta_2=0.95,
        global_clipnorm=1.0,
    )
    # Scales, decays and time steps mean nothing at 0.
    optimizer.exclude_from_weight_decay(
        var_list=[x for x in lm.trainable_variables if len(x.shape) < 2]
    )
    lm.compile(optimizer)


class Curve(keras.callbacks.Callback):
    """Writes a line of a CSV file an epoch, and prints it.

    Ends training where the loss is no number.

    Args:
        path: of the file. Its lines behind the step at which training begins are
            dropped.
        windows: validation windows, int32 `[n, T]`.
        batch: how many of them are scored at once.
        step_bytes: bytes that a step learns from.
    """

    COLUMNS = (
        "step",
        "bytes",
        "loss",
        "bits_per_byte",
        "validation",
        "router_entropy",
        "largest_memory_share",
        "bytes_per_second",
    )
    model: Any

    def __init__(self, path, windows, batch, step_bytes):
        super().__init__()
        self.path = path
        self.windows, self.batch, self.step_bytes = windows, batch, step_bytes
        self.rows: list | None = None

    def on_epoch_begin(self, epoch, logs=None):
        self.first = steps_of(self.model)
        self._read()
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        logs = logs or {}
        seconds = time.perf_counter() - self.started
        assert self.rows is not None
        step = steps_of(self.model)
        bits = math.log2(logs["perplexity"])
        validation = bits_of_bytes(self.model, self.windows, self.batch)
        row = {
            "loss": logs["loss"],
            "bits_per_byte": bits,
            "validation": float(np.mean(validation, dtype="float64")),
            "router_entropy": logs.get("router_entropy"),
            "largest_memory_share": logs.get("largest_memory_share"),
        }
        row = {
            name: "" if value is None else f"{value:.6g}" for name, value in row.items()
        }
        row["step"], row["bytes"] = str(step), str(step * self.step_bytes)
        speed = (step - self.first) * self.step_bytes / seconds
        row["bytes_per_second"] = f"{speed:.0f}"
        self.rows.append(row)
        write_rows(self.path, self.COLUMNS, self.rows)
        line = " ".join(f"{name} {row[name]}" for name in self.COLUMNS if row[name])
        print(f"    {line}", flush=True)
        if not math.isfinite(bits):
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        self._read()  # where nothing was left to train

    def _read(self):
        # Not when training begins, where the backup may not be read yet.
        if self.rows is None:
            step = steps_of(self.model)
            rows = read_rows(self.path)
            self.rows = [row for row in rows if int(row["step"]) <= step]

    def validation(self):
        """The last value; infinite if it is no number."""
        value = float(self.last()["validation"])
        return value if math.isfinite(value) else math.inf

    def last(self):
        """The last line."""
        assert self.rows is not None
        return self.rows[-1]

    def bytes_per_second(self):
        """The median of the epochs; the first has the compilation in it."""
        assert self.rows is not None
        speeds = [float(row["bytes_per_second"]) for row in self.rows]
        return float(np.median(speeds[1:] or speeds))


class Deadline(keras.callbacks.Callback):
    """Ends training at the end of the epoch in which a time comes.

    Args:
        end: in seconds of `time.perf_counter()`, or None.
    """

    model: Any

    def __init__(self, end):
        super().__init__()
        self.end = end

    def on_epoch_end(self, epoch, logs=None):
        if self.passed():
            self.model.stop_training = True

    def passed(self):
        return self.end is not None and time.perf_counter() >= self.end
