"""What the tasks share: the arrays they return, their draws and their checks."""

from typing import NamedTuple

import numpy as np

from keras_mom.checks import check_positive


class Examples(NamedTuple):
    """Sequences, and what is asked about them.

    Attributes:
        inputs: int32 `[B, T]`, tokens.
        targets: int32 `[B, T]`, the token to be named at each place; 0 where none is
            asked for.
        weights: float32 `[B, T]`, 1 where a target counts, else 0.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def examples(inputs, targets, asked):
    """`Examples` of integer arrays and of the places asked at, bool `[B, T]`."""
    return Examples(
        np.ascontiguousarray(inputs, "int32"),
        np.where(asked, targets, 0).astype("int32"),
        asked.astype("float32"),
    )


def next_tokens(tokens, asked):
    """`Examples` that ask for the next token.

    Args:
        tokens: integers `[B, T]`.
        asked: bool `[B, T]`, the tokens that are to be foretold; never the first.
    """
    following = np.zeros_like(tokens)
    following[:, :-1] = tokens[:, 1:]
    before = np.zeros_like(asked)
    before[:, :-1] = asked[:, 1:]
    return examples(tokens, following, before)


def distinct(rng, rows, count, choices):
    """Draws of `count` different numbers below `choices`, in random order.

    Returns:
        Integers `[rows, count]`.
    """
    if 2 * count > choices:
        return np.argsort(rng.random((rows, choices)), axis=1)[:, :count]
    # What repeats an earlier number of its row is drawn anew. No number is preferred,
    # so that every choice is as likely as any other.
    drawn = rng.integers(choices, size=(rows, count))
    left = np.arange(rows)
    while left.size:
        part = drawn[left]
        repeated = first_places(part) != np.arange(count)
        drawn[left] = np.where(repeated, rng.integers(choices, size=part.shape), part)
        left = left[repeated.any(axis=1)]
    return drawn


def first_places(values):
    """Where each number stands first in its row: integers `[B, N]`."""
    rows, count = values.shape
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    new = np.ones((rows, count), bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    start = np.maximum.accumulate(np.where(new, np.arange(count), 0), axis=1)
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.take_along_axis(order, start, axis=1), axis=1)
    return places


def generator(seed):
    """NumPy's generator of a seed, or the one given."""
    return np.random.default_rng(seed)


def check_sizes(**sizes):
    """Raises unless all of them are positive integers."""
    for name, size in sizes.items():
        check_positive(name, size)


def check_fraction(name, value, most=1.0):
    """Raises unless `value` is from 0 to `most`."""
    if not 0 <= value <= most:
        raise ValueError(f"`{name}` must be from 0 to {most}. Received: {value!r}")


def check_enough(name, value, least, reason):
    """Raises if `value` is less than `least`."""
    if value < least:
        raise ValueError(
            f"`{name}` must be at least {least}, {reason}. Received: {value}"
        )
