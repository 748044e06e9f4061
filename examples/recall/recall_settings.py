"""Presets: tasks, data and training of a comparison."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from keras_mom import tasks
from keras_mom.tasks import Examples


@dataclass(frozen=True)
class Task:
    """What is learned, and what is asked afterwards.

    Attributes:
        name: name in tables.
        make: a function of `keras_mom.tasks`.
        vocabulary_size: number of tokens.
        training: arguments of `make` for each part of the data to learn from.
        tests: the same for each test; its accuracy is a line of the table.
        encoder: whether the model is an auto-encoder.
    """

    name: str
    make: Callable[..., Examples]
    vocabulary_size: int
    training: tuple[dict[str, Any], ...]
    tests: tuple[dict[str, Any], ...]
    encoder: bool = False


@dataclass(frozen=True)
class Preset:
    """A comparison.

    Attributes:
        tasks: what is learned.
        models, rules: kinds of models, and update rules of those that have one.
        widths: D of the models, one after the other.
        layers, heads, memories, top_k, feed_forward, convolution, tied: of the models.
        key_dim, value_dim: of one memory and head; None for D over twice, and once,
            the number of heads.
        learning_rates, seeds: every model is trained with each of them.
        epochs, batch_size, weight_decay: of the training.
    """

    tasks: tuple[Task, ...]
    models: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    weight_decay: float
    widths: tuple[int, ...]
    rules: tuple[str, ...] = ("gated_delta_net",)
    layers: int = 2
    heads: int = 2
    key_dim: int | None = None
    value_dim: int | None = None
    memories: int = 4
    top_k: int = 2
    feed_forward: bool = False
    convolution: bool = True
    tied: bool = True

    def changed(self, **changes):
        """With what is given in `changes`, None standing for nothing."""
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(self, **given)


def _mqar(vocabulary_size, training, tests, **arguments):
    def parts(triples):
        return tuple(
            dict(
                length=length,
                num_pairs=pairs,
                num_examples=count,
                vocabulary_size=vocabulary_size,
                **arguments,
            )
            for length, pairs, count in triples
        )

    return Task(
        "mqar",
        tasks.multi_query_recall,
        vocabulary_size,
        parts(training),
        parts(tests),
    )


def _mad(name, make, vocabulary_size, length, count=12_800, learned=None, **arguments):
    """A task at MAD's first setting."""
    common = dict(length=length, vocabulary_size=vocabulary_size, **arguments)
    return Task(
        name,
        make,
        vocabulary_size,
        (dict(common, num_examples=count, **(learned or {})),),
        (dict(common, num_examples=1_280),),
        encoder=make is tasks.compression,
    )


_ALL = ("single", "expanded", "expanded_keys", "mom", "mom_unshared")
_ALL += ("hybrid", "attention", "lstm")
_AS_MAD_TRAINS = {"training": True}

# Fifteen keys, few pairs, and short sequences first: learned in hundreds of steps.
SMALL = Preset(
    tasks=(
        _mqar(
            32,
            training=[(16, 4, 9_600), (32, 8, 4_800)],
            tests=[(16, 4, 960), (32, 8, 960), (60, 15, 960)],
            random_fill=False,
        ),
    ),
    models=("single", "expanded", "mom"),
    learning_rates=(1.5e-2,),
    seeds=(0, 1),
    epochs=5,
    batch_size=96,
    weight_decay=0.1,
    widths=(64,),
    layers=1,
    key_dim=4,
    value_dim=32,
    top_k=1,
    tied=False,
)

MQAR = Preset(
    tasks=(
        _mqar(
            8192,
            training=[
                (64, 4, 100_000),
                (128, 8, 20_000),
                (256, 16, 20_000),
                (256, 32, 20_000),
                (256, 64, 20_000),
            ],
            tests=[
                (64, 4, 1_024),
                (128, 8, 1_024),
                (256, 16, 1_024),
                (256, 32, 1_024),
                (256, 64, 1_024),
                (512, 64, 1_024),
                (512, 128, 1_024),
                (1024, 128, 1_024),
                (1024, 256, 1_024),
            ],
        ),
    ),
    models=_ALL,
    learning_rates=tuple(float(f"{x:.3g}") for x in np.logspace(-3, -1.5, 4)),
    seeds=(0, 1, 2),
    epochs=32,
    batch_size=256,
    weight_decay=0.1,
    widths=(64, 128, 256),
)

MAD = Preset(
    tasks=(
        _mad(
            "in_context_recall",
            tasks.in_context_recall,
            16,
            128,
            learned=_AS_MAD_TRAINS,
        ),
        _mad(
            "fuzzy_in_context_recall",
            tasks.fuzzy_in_context_recall,
            16,
            128,
            learned=_AS_MAD_TRAINS,
        ),
        _mad(
            "noisy_in_context_recall",
            tasks.noisy_in_context_recall,
            32,
            128,
            learned=_AS_MAD_TRAINS,
        ),
        _mad("selective_copying", tasks.selective_copying, 16, 256),
        _mad("compression", tasks.compression, 16, 32),
        _mad("memorization", tasks.memorization, 256, 32, count=256),
    ),
    models=_ALL,
    learning_rates=(1e-4, 5e-4, 1e-3),
    seeds=(0, 1, 2),
    epochs=200,
    batch_size=128,
    weight_decay=0.1,
    widths=(128,),
    feed_forward=True,
)


def _needle(vocabulary_size, learned, asked):
    def parts(pairs):
        return tuple(
            dict(
                length=length,
                num_examples=count,
                vocabulary_size=vocabulary_size,
                num_needles=4,
                value_length=2,
            )
            for length, count in pairs
        )

    make = tasks.needle_in_a_haystack
    return Task("needle", make, vocabulary_size, parts(learned), parts(asked))


def _phone_book(learned, asked):
    names = dict(num_first_names=32, num_last_names=32)

    def parts(pairs):
        return tuple(
            dict(num_entries=entries, num_examples=count, **names)
            for entries, count in pairs
        )

    return Task("phone_book", tasks.phone_book, 12 + 64, parts(learned), parts(asked))


RETRIEVAL = Preset(
    tasks=(
        _needle(
            1024,
            [(128, 20_000), (256, 20_000), (512, 20_000)],
            [(length, 1_024) for length in (128, 256, 512, 1024, 2048, 4096)],
        ),
        _phone_book(
            [(10, 20_000), (20, 20_000), (40, 20_000)],
            [(entries, 1_024) for entries in (5, 10, 20, 40, 80, 160)],
        ),
    ),
    models=_ALL,
    learning_rates=(3e-4, 1e-3, 3e-3),
    seeds=(0, 1, 2),
    epochs=32,
    batch_size=256,
    weight_decay=0.1,
    widths=(128,),
    feed_forward=True,
)

PRESETS = {"small": SMALL, "mqar": MQAR, "mad": MAD, "retrieval": RETRIEVAL}
