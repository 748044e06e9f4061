"""Trains a byte-level language model on the sources of Python's standard library.

    python examples/train_lm.py --parameters 1M --folder runs/1M

A run may be killed at any time, SIGKILL included: the same command takes it up at the
last whole epoch and ends with the same weights and the same curve. For that, three
things follow the optimizer's step, which `keras.callbacks.BackupAndRestore` restores
with the weights: the data, the learning rate, and the rows of the curve. It restores
the seeds of dropout too.

In the folder are left `curve.csv`, a row an epoch, and `lm.keras`, which every backend
loads. Nothing is downloaded.
"""

import argparse
import csv
import math
import os
import pathlib
import signal
import sysconfig
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import keras_mom

VOCABULARY = 256  # bytes
SEPARATOR = b"\0"  # ends each file
PROMPT = "class Reader:\n    def __init__(self, "

# The feed-forward network is three times as wide as the model, as in the paper.
SIZES: dict[str, Any] = {
    "100k": dict(num_layers=2, hidden_dim=64, num_heads=2, key_dim=16),
    "1M": dict(num_layers=3, hidden_dim=160, num_heads=2, key_dim=32),
    "10M": dict(num_layers=5, hidden_dim=384, num_heads=2, key_dim=64),
    "100M": dict(num_layers=12, hidden_dim=768, num_heads=4, key_dim=128),
}


def library_paths():
    """Paths of the library's modules, tests left out."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    return [
        path
        for path in sorted(folder.rglob("*.py"))
        if left_out.isdisjoint(path.relative_to(folder).parts)
    ]


def read_corpus():
    """The library's modules as (training, held-out) bytes, each twentieth held out."""
    parts = [[], []]
    for index, path in enumerate(library_paths()):
        parts[index % 20 == 7].append(path.read_bytes() + SEPARATOR)
    return [np.frombuffer(b"".join(part), dtype="uint8") for part in parts]


class Windows(keras.utils.PyDataset):
    """Windows at random places of a text, as a function of the training step alone.

    Args:
        text: uint8 `[N]`.
        batch, length: the shape of a batch of token ids.
        steps: batches in an epoch.
        seed: of the places.
        step: a function that returns the number of steps taken so far.
    """

    def __init__(self, text, batch, length, steps, seed, step):
        super().__init__()
        self.text, self.batch, self.length = text, batch, length
        self.steps, self.seed, self.step = steps, seed, step
        self.first = 0

    def __len__(self):
        return self.steps

    def on_epoch_begin(self):
        self.first = self.step()

    def __getitem__(self, index):
        random = np.random.default_rng((self.seed, self.first + index))
        starts = random.integers(len(self.text) - self.length, size=(self.batch, 1))
        return self.text[starts + np.arange(self.length)].astype("int32")


def held_out_windows(text, length, count):
    """Windows `[count, length]`, evenly spaced."""
    starts = np.linspace(0, len(text) - length, count).astype("int64")
    return text[starts[:, None] + np.arange(length)].astype("int32")


class Curve(keras.callbacks.Callback):
    """Writes a row of a CSV file an epoch.

    Args:
        path: of the file. Its rows that lie behind the step at which training begins
            are dropped.
    """

    FIELDS = ("step", "learning_rate", "loss", "bits_per_byte", "val_bits_per_byte")

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.rows: list | None = None

    def on_epoch_begin(self, epoch, logs=None):
        if self.rows is not None:
            return
        # Not at the beginning of training, where the backup may not be read yet.
        self.rows = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            self.rows = [
                row for row in rows if int(row["step"]) <= steps_of(self.model)
            ]

    def on_epoch_end(self, epoch, logs=None):
        logs = logs or {}
        assert self.rows is not None
        values = {
            "step": steps_of(self.model),
            "learning_rate": float(
                keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
            ),
            "loss": logs["loss"],
            "bits_per_byte": math.log2(logs["perplexity"]),
            "val_bits_per_byte": math.log2(logs["val_perplexity"]),
        }
        values = {
            name: value if isinstance(value, int) else f"{value:.7g}"
            for name, value in values.items()
        }
        self.rows.append(values)
        # Whole, and then in place of the old one, so that no kill leaves half a row.
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)
        part.replace(self.path)
        print(" ".join(f"{name} {value}" for name, value in values.items()), flush=True)


class End(keras.callbacks.Callback):
    """Ends training at a step; with `kill`, by SIGKILL, as a lost machine would."""

    def __init__(self, step, kill=False):
        super().__init__()
        self.step, self.kill = step, kill

    def on_epoch_begin(self, epoch, logs=None):
        self.taken = steps_of(self.model)

    def on_train_batch_end(self, batch, logs=None):
        self.taken += 1
        if self.taken == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            self.model.stop_training = True


def steps_of(lm):
    """The number of training steps that a model has taken."""
    return int(keras.ops.convert_to_numpy(lm.optimizer.iterations))


def build(arguments):
    sizes = SIZES[arguments.parameters]
    backbone = keras_mom.models.MoMBackbone(
        VOCABULARY,
        **sizes,
        intermediate_dim=3 * sizes["hidden_dim"],
        tie_embeddings=True,
        dropout=arguments.dropout,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    lm = keras_mom.models.MoMCausalLM(backbone)
    total = arguments.epochs * arguments.steps
    warmup = min(arguments.warmup, total // 2)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else arguments.learning_rate,
        max(1, total - warmup),
        alpha=0.1,
        warmup_target=arguments.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    lm.compile(
        keras.optimizers.AdamW(
            schedule, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0
        )
    )
    return lm


def write(lm, prompt, length):
    """Goes on from a prompt, greedily."""
    ids = lm.generate([list(prompt.encode())], max_length=len(prompt.encode()) + length)
    return bytes(ids[0]).decode(errors="replace")


def parse(arguments=None):
    parser = argparse.ArgumentParser(description="Train a MoM language model.")
    add = parser.add_argument
    add("--parameters", choices=SIZES, default="1M")
    add("--folder", type=pathlib.Path, default=pathlib.Path("train_lm"))
    add("--epochs", type=int, default=20)
    add("--steps", type=int, default=50, help="steps in an epoch")
    add("--batch", type=int, default=8)
    add("--length", type=int, default=256, help="bytes in a window")
    add("--learning-rate", type=float, default=2e-3)
    add("--warmup", type=int, default=50, help="steps of growing learning rate")
    add("--dropout", type=float, default=0.0)
    add("--dtype", default="float32", help="or mixed_bfloat16")
    add("--seed", type=int, default=0)
    add("--held-out", type=int, default=32, help="held-out windows after each epoch")
    add("--final", type=int, default=256, help="held-out windows at the end")
    add("--kill-at", type=int, help="step at which the process kills itself")
    add("--write", type=int, default=200, help="bytes that are written at the end")
    return parser.parse_args(arguments)


def main(arguments=None):
    arguments = parse(arguments)
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(arguments.seed)
    text, held_out = read_corpus()
    lm = build(arguments)
    print(f"Keras {keras.__version__} on {keras.config.backend()}")
    print(f"{lm.count_params():,} parameters")
    print(f"{len(text):,} bytes to learn from, {len(held_out):,} held out", flush=True)

    data = Windows(
        text,
        arguments.batch,
        arguments.length,
        arguments.steps,
        arguments.seed,
        step=lambda: steps_of(lm),
    )
    # The backup comes last: what it says is done has its row in the curve.
    callbacks = [
        Curve(folder / "curve.csv"),
        End(arguments.epochs * arguments.steps),
        End(arguments.kill_at, kill=True),
        keras.callbacks.BackupAndRestore(
            str(folder / "backup"), double_checkpoint=True, delete_checkpoint=False
        ),
    ]
    lm.fit(
        data,
        epochs=arguments.epochs,
        validation_data=(
            held_out_windows(held_out, arguments.length, arguments.held_out),
        ),
        validation_batch_size=arguments.batch,
        callbacks=callbacks,
        shuffle=False,  # of the batches: their places are random already
        verbose=0,
    )
    windows = held_out_windows(held_out, arguments.length, arguments.final)
    results = lm.evaluate(
        windows, batch_size=arguments.batch, verbose=0, return_dict=True
    )
    print(
        f"{steps_of(lm)} steps, {math.log2(results['perplexity']):.4f} bits per byte "
        f"on {windows.size:,} held-out bytes"
    )
    lm.save(folder / "lm.keras")
    if arguments.write:
        print(write(lm, PROMPT, arguments.write))


if __name__ == "__main__":
    main()
