"""Recall of keys and values of several tokens: MAD's fuzzy recall."""

import numpy as np

from keras_mom.tasks.draws import (
    check_enough,
    check_sizes,
    distinct,
    first_places,
    generator,
    next_tokens,
)


def fuzzy_in_context_recall(
    num_examples,
    length=128,
    vocabulary_size=16,
    *,
    key_length=3,
    value_length=3,
    training=False,
    seed=0,
):
    """Recall where keys and values are of several tokens, and not of how many.

    A key of `key_length` different tokens, or in training of up to so many, has the
    same value of 1 to `value_length` different tokens all along. Where a key repeats,
    the tokens of its value are asked for, and the last key always does. Shorter
    sequences begin with padding.

        inputs   pad k1 k3 v7  k2 k1 v5 v9  k1 k3 v7
        targets                                v7

    The last token of the vocabulary is the padding; of the others the first half is
    keys and the second values.

    Source: arXiv 2403.17844. There the last key need not have come before.

    Args:
        num_examples: B.
        length: T, at least `2 * (key_length + value_length)`.
        vocabulary_size: number of tokens.
        key_length: tokens of a key, at most.
        value_length: tokens of a value, at most.
        training: whether keys are of 1 to `key_length` tokens, and every next token
            behind the padding is asked for, as MAD trains.
        seed: seed, or a `numpy.random.Generator`.

    Returns:
        `keras_mom.tasks.Examples` with arrays `[B, T]`.

    Raises:
        ValueError: if an argument does not fit; the message names it.
    """
    check_sizes(
        num_examples=num_examples,
        length=length,
        vocabulary_size=vocabulary_size,
        key_length=key_length,
        value_length=value_length,
    )
    longest = key_length + value_length
    check_enough("length", length, 2 * longest, "for a pair and its repetition")
    symbols = vocabulary_size - 1
    half = symbols // 2
    check_enough(
        "vocabulary_size",
        vocabulary_size,
        max(1 + 2 * key_length, 2 * value_length),
        "for keys and values of different tokens",
    )
    rng = generator(seed)
    # More pairs than fit, but for one pair of the longest.
    count = -(-(length - longest) // 2)
    key_sizes = np.full((num_examples, count), key_length)
    if training:
        key_sizes = rng.integers(1, key_length + 1, size=key_sizes.shape)
    keys = _motifs(rng, key_sizes, half, key_length)
    value_sizes = rng.integers(1, value_length + 1, size=key_sizes.shape)
    values = half + _motifs(rng, value_sizes, symbols - half, value_length)
    # A key's value is the first that was drawn for it.
    digits = np.where(np.arange(key_length) < key_sizes[..., None], keys + 1, 0)
    names = digits @ (half + 1) ** np.arange(key_length)
    first = first_places(names)
    value_sizes = np.take_along_axis(value_sizes, first, axis=1)
    values = np.take_along_axis(values, first[..., None], axis=1)

    # As many pairs as leave room for the last.
    ends = np.cumsum(key_sizes + value_sizes, axis=1)
    kept = np.sum(ends <= length - longest, axis=1)
    asked_for = rng.integers(kept)[:, None]
    index = np.arange(count + 1)
    source = np.where(index == kept[:, None], asked_for, np.minimum(index, count - 1))
    repeated = np.take_along_axis(first, source, axis=1) != index
    present = index <= kept[:, None]
    key_sizes, value_sizes = (
        np.where(present, np.take_along_axis(sizes, source, axis=1), 0)
        for sizes in (key_sizes, value_sizes)
    )
    keys, values = (
        np.take_along_axis(x, source[..., None], axis=1) for x in (keys, values)
    )

    sizes = key_sizes + value_sizes
    ends = np.cumsum(sizes, axis=1)
    starts = length - ends[:, -1:] + ends - sizes
    tokens = np.full((num_examples, length + 1), vocabulary_size - 1)
    asked = np.zeros(tokens.shape, bool)
    for parts, at, lengths in (
        (keys, starts, key_sizes),
        (values, starts + key_sizes, value_sizes),
    ):
        offsets = np.arange(parts.shape[-1])
        # What is beyond a part's size goes behind the end.
        places = np.where(offsets < lengths[..., None], at[..., None] + offsets, length)
        places = places.reshape(num_examples, -1)
        np.put_along_axis(tokens, places, parts.reshape(num_examples, -1), axis=1)
        if parts is values:
            here = np.repeat(repeated, parts.shape[-1], axis=1)
            np.put_along_axis(asked, places, here, axis=1)
    tokens, asked = tokens[:, :length], asked[:, :length]
    if training:
        asked = (tokens != vocabulary_size - 1) & (np.arange(length) > 0)
    return next_tokens(tokens, asked)


def _motifs(rng, sizes, choices, longest):
    """Different tokens below `choices` for each part: `[B, N, longest]`."""
    drawn = distinct(rng, sizes.size, longest, choices)
    return drawn.reshape(*sizes.shape, longest)
