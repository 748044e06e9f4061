"""One fact in a long text."""

import numpy as np

from keras_mom.tasks.draws import (
    check_enough,
    check_fraction,
    check_sizes,
    distinct,
    examples,
    generator,
)


def needle_in_a_haystack(
    num_examples,
    length,
    vocabulary_size=64,
    *,
    num_needles=1,
    value_length=1,
    depth=None,
    seed=0,
):
    """A needle in a haystack: a fact somewhere in a text, asked for at the end.

    A needle is a key and its value of `value_length` tokens. Around it stands hay, and
    behind all a question mark and a key:

        inputs   h h h k3 v1 v5 h h h h h ?  k3 v1
        targets                              v1 v5

    Token 0 is the question mark. Of the others the first third are keys, the second
    values, the rest hay.

    Args:
        num_examples: B.
        length: T.
        vocabulary_size: number of tokens.
        num_needles: number of needles, with different keys; one of them is asked for.
        value_length: number of tokens of a value.
        depth: how far the needle asked for lies behind the beginning, 0 to 1 of what
            is possible. None draws it.
        seed: seed, or a `numpy.random.Generator`.

    Returns:
        `keras_mom.tasks.Examples` with arrays `[B, T]`; the last `value_length` places
        are asked at.

    Raises:
        ValueError: if the needles do not fit; the message names the argument.
    """
    check_sizes(
        num_examples=num_examples,
        length=length,
        vocabulary_size=vocabulary_size,
        num_needles=num_needles,
        value_length=value_length,
    )
    third = (vocabulary_size - 1) // 3
    check_enough(
        "vocabulary_size",
        vocabulary_size,
        3 * num_needles + 1,
        "for a question mark, and keys, values and hay of a third each",
    )
    width = 1 + value_length
    check_enough(
        "length",
        length,
        num_needles * width + 1 + value_length,
        f"for needles of {width} tokens and the question",
    )
    if depth is not None:
        check_fraction("depth", depth)
    rng = generator(seed)
    rows = np.arange(num_examples)
    keys = 1 + distinct(rng, num_examples, num_needles, third)
    shape = (num_examples, num_needles, value_length)
    values = 1 + third + rng.integers(third, size=shape)
    needles = np.concatenate([keys[..., None], values], axis=-1)

    # Needles take one slot each, so that they never overlap, and grow afterwards.
    hay = length - 1 - value_length - num_needles * width
    slots = distinct(rng, num_examples, num_needles, hay + num_needles)
    if depth is not None:
        _move_first(slots, round(depth * (hay + num_needles - 1)))
    rank = np.argsort(np.argsort(slots, axis=1), axis=1)
    starts = slots + rank * (width - 1)
    tokens = rng.integers(1 + 2 * third, vocabulary_size, size=(num_examples, length))
    places = starts[..., None] + np.arange(width)
    tokens[rows[:, None, None], places] = needles

    # The needle asked for is the first that was drawn.
    tokens[:, -1 - value_length] = 0
    tokens[:, length - value_length :] = needles[:, 0, :-1]
    targets = np.zeros_like(tokens)
    targets[:, length - value_length :] = values[:, 0]
    asked = np.zeros(tokens.shape, bool)
    asked[:, length - value_length :] = True
    return examples(tokens, targets, asked)


def _move_first(slots, place):
    """Moves the first needle to a slot; one that lies there takes its slot."""
    there = slots == place
    slots[:] = np.where(there, slots[:, :1], slots)
    slots[:, 0] = place
