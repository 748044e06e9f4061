"""The six tasks of MAD (mechanistic architecture design, arXiv 2403.17844).

In MAD's own settings each has 12,800 examples to learn from, and memorization 256.
Tokens are numbered as there. Where MAD leaves the last token of a sequence out, it is
kept here, and nothing is asked behind it.
"""

import numpy as np

from keras_mom.tasks.draws import (
    check_enough,
    check_fraction,
    check_sizes,
    distinct,
    examples,
    first_places,
    generator,
    next_tokens,
)
from keras_mom.tasks.motifs import fuzzy_in_context_recall

__all__ = [
    "compression",
    "fuzzy_in_context_recall",
    "in_context_recall",
    "memorization",
    "noisy_in_context_recall",
    "selective_copying",
]


def in_context_recall(
    num_examples,
    length=128,
    vocabulary_size=16,
    *,
    training=False,
    seed=0,
):
    """Recall of values by keys that have come before.

    A sequence is a list of pairs; a key has the same value all along. Where a key
    repeats, its value is asked for, and the last key always does.

        inputs   k1 v4  k3 v7  k1 v4  k3 v7
        targets                v4     v7

    Keys are the first half of the tokens, values the second.

    Args:
        num_examples: B.
        length: T; even, at least 4.
        vocabulary_size: number of tokens.
        training: whether every next token is asked for, as MAD trains.
        seed: seed, or a `numpy.random.Generator`.

    Returns:
        `keras_mom.tasks.Examples` with arrays `[B, T]`.

    Raises:
        ValueError: if an argument does not fit; the message names it.
    """
    return _recall(num_examples, length, vocabulary_size, 0, 0.0, training, seed)


def noisy_in_context_recall(
    num_examples,
    length=128,
    vocabulary_size=32,
    *,
    noise_vocabulary_size=16,
    noise=0.2,
    training=False,
    seed=0,
):
    """Recall of values by keys between tokens that mean nothing.

    As `in_context_recall`, but each pair is with probability `noise` one of tokens of
    a vocabulary of their own, the last ones.

    Args:
        num_examples: B.
        length: T; even, at least 4.
        vocabulary_size: number of tokens, those of the noise included.
        noise_vocabulary_size: number of tokens of the noise.
        noise: share of the pairs that are noise, 0 to 1.
        training: whether every next token is asked for, as MAD trains.
        seed: seed, or a `numpy.random.Generator`.

    Returns:
        `keras_mom.tasks.Examples` with arrays `[B, T]`.

    Raises:
        ValueError: if an argument does not fit; the message names it.
    """
    check_sizes(noise_vocabulary_size=noise_vocabulary_size)
    check_fraction("noise", noise)
    return _recall(
        num_examples,
        length,
        vocabulary_size,
        noise_vocabulary_size,
        noise,
        training,
        seed,
    )


def _recall(num_examples, length, vocabulary_size, of_noise, noise, training, seed):
    check_sizes(
        num_examples=num_examples, length=length, vocabulary_size=vocabulary_size
    )
    if length % 2 or length < 4:
        raise ValueError(f"`length` must be even and at least 4. Received: {length}")
    check_enough(
        "vocabulary_size",
        vocabulary_size,
        of_noise + 2,
        f"for a key, a value and {of_noise} tokens of noise",
    )
    rng = generator(seed)
    symbols = vocabulary_size - of_noise
    count = length // 2
    shape = (num_examples, count)
    keys = rng.integers(symbols // 2, size=shape)
    silent = np.zeros(shape, bool)
    if of_noise:
        silent = rng.random(shape) < noise
        # One pair at least, for the last key to repeat.
        kept = rng.integers(count - 1, size=(num_examples, 1))
        np.put_along_axis(silent, kept, False, axis=1)
    keys[:, -1] = _one_of_those_presented(rng, keys[:, :-1], ~silent[:, :-1], symbols)
    silent[:, -1] = False
    of_keys = rng.integers(symbols // 2, symbols, size=(num_examples, symbols // 2))
    values = np.take_along_axis(of_keys, keys, axis=1)
    pairs = np.stack([keys, values], axis=-1)
    # Pairs of noise are told apart, so that they repeat nothing.
    marked = np.where(silent, symbols + np.arange(count), keys)
    repeated = first_places(marked) != np.arange(count)
    if of_noise:
        fill = rng.integers(symbols, vocabulary_size, size=pairs.shape)
        pairs = np.where(silent[..., None], fill, pairs)
    tokens = pairs.reshape(num_examples, length)
    asked = np.zeros(pairs.shape, bool)
    asked[..., 1] = repeated
    asked = asked.reshape(tokens.shape)
    if training:
        asked = np.broadcast_to(np.arange(length) > 0, tokens.shape)
    return next_tokens(tokens, asked)


def _one_of_those_presented(rng, keys, presented, symbols):
    """A key of each row, each of those presented as likely: integers `[B]`."""
    seen = np.zeros((len(keys), symbols), bool)
    # Others are sent to a key that is presented.
    first = np.argmax(presented, axis=1)
    stand_in = np.take_along_axis(keys, first[:, None], axis=1)
    np.put_along_axis(seen, np.where(presented, keys, stand_in), True, axis=1)
    return np.argmax(np.where(seen, rng.random(seen.shape), -1), axis=1)


def selective_copying(
    num_examples,
    length=256,
    vocabulary_size=16,
    *,
    num_copied=16,
    seed=0,
):
    """Copying of tokens from between blanks.

    `num_copied` tokens stand among blanks; behind a copy token they are asked for, in
    order.

        inputs   b a b b d c COPY b b b
        targets                   a d c

    The last token of the vocabulary is the copy token, the one before the blank.

    Args:
        num_examples: B.
        length: T, more than `2 * num_copied + 1`.
        vocabulary_size: number of tokens.
        num_copied: number of tokens to be copied.
        seed: seed, or a `numpy.random.Generator`.

    Returns:
        `keras_mom.tasks.Examples` with arrays `[B, T]`; the last `num_copied` places
        are asked at.

    Raises:
        ValueError: if an argument does not fit; the message names it.
    """
    check_sizes(
        num_examples=num_examples,
        length=length,
        vocabulary_size=vocabulary_size,
        num_copied=num_copied,
    )
    check_enough("vocabulary_size", vocabulary_size, 3, "two of them being special")
    check_enough(
        "length", length, 2 * num_copied + 2, "for the tokens, a copy token and a blank"
    )
    rng = generator(seed)
    copy, blank = vocabulary_size - 1, vocabulary_size - 2
    blanks = length - 2 * num_copied - 1
    copied = rng.integers(blank, size=(num_examples, num_copied))
    # Each blank is put before one of the tokens, whatever the others do.
    before = rng.integers(num_copied, size=(num_examples, blanks))
    before += num_copied * np.arange(num_examples)[:, None]
    counts = np.bincount(before.ravel(), minlength=num_examples * num_copied)
    shift = np.cumsum(counts.reshape(copied.shape), axis=1)
    tokens = np.full((num_examples, length), blank)
    np.put_along_axis(tokens, np.arange(num_copied) + shift, copied, axis=1)
    tokens[:, -num_copied - 1] = copy
    targets = np.zeros_like(tokens)
    targets[:, -num_copied:] = copied
    asked = np.broadcast_to(np.arange(length) >= length - num_copied, tokens.shape)
    return examples(tokens, targets, asked)


def compression(num_examples, length=32, vocabulary_size=16, *, seed=0):
    """Random tokens that are to be told from what is known at the end.

    The last token of the sequence is the last of the vocabulary. The targets are the
    inputs: the task is for an auto-encoder, which reads them from the output at the
    last place.

    Args:
        num_examples: B.
        length: T, at least 2.
        vocabulary_size: number of tokens, at least 2.
        seed: seed, or a `numpy.random.Generator`.

    Returns:
        `keras_mom.tasks.Examples` with arrays `[B, T]`; every place is asked for.

    Raises:
        ValueError: if an argument does not fit; the message names it.
    """
    check_sizes(
        num_examples=num_examples, length=length, vocabulary_size=vocabulary_size
    )
    check_enough("length", length, 2, "the last token being special")
    check_enough("vocabulary_size", vocabulary_size, 2, "one of them being special")
    rng = generator(seed)
    tokens = rng.integers(vocabulary_size - 1, size=(num_examples, length))
    tokens[:, -1] = vocabulary_size - 1
    return examples(tokens, tokens, np.ones(tokens.shape, bool))


def memorization(
    num_examples,
    length=32,
    vocabulary_size=256,
    *,
    map_seed=0,
    seed=0,
):
    """Values of keys that are the same in every sequence.

    The value is asked for behind each key, at the last token of the vocabulary, and
    comes in no input.

        inputs   k1 ?  k3 ?  k1 ?
        targets     v4    v7    v4

    Args:
        num_examples: B.
        length: T; even.
        vocabulary_size: number of tokens, at least 3. Half of them but the last are
            keys.
        map_seed: seed of the map from keys to values. The data to learn from and those
            to be tested on need the same.
        seed: seed of the sequences, or a `numpy.random.Generator`.

    Returns:
        `keras_mom.tasks.Examples` with arrays `[B, T]`.

    Raises:
        ValueError: if an argument does not fit; the message names it.
    """
    check_sizes(
        num_examples=num_examples, length=length, vocabulary_size=vocabulary_size
    )
    if length % 2:
        raise ValueError(f"`length` must be even. Received: {length}")
    check_enough("vocabulary_size", vocabulary_size, 3, "one of them being special")
    rng = generator(seed)
    count = (vocabulary_size - 1) // 2
    of_values = vocabulary_size - 1 - count
    of_keys = count + distinct(np.random.default_rng(map_seed), 1, count, of_values)[0]
    keys = rng.integers(count, size=(num_examples, length // 2))
    tokens = np.full((num_examples, length), vocabulary_size - 1)
    tokens[:, ::2] = keys
    targets = np.zeros_like(tokens)
    targets[:, 1::2] = of_keys[keys]
    asked = np.broadcast_to(np.arange(length) % 2 == 1, tokens.shape)
    return examples(tokens, targets, asked)
