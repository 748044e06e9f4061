"""Associative recall with many queries."""

import numpy as np

from keras_mom.tasks.draws import (
    check_enough,
    check_sizes,
    distinct,
    examples,
    generator,
)


def multi_query_recall(
    num_examples,
    length,
    num_pairs,
    vocabulary_size=8192,
    *,
    power=0.01,
    num_passes=1,
    random_fill=True,
    seed=0,
):
    """Multi-query associative recall (MQAR) in the form of Zoology.

    A sequence begins with pairs of a key and a value. Each key comes once more later,
    and there its value is asked for. Most come soon: gaps follow a power law.

        inputs   k2 v8  k4 v7  .  .  k4 .  .  .  k2 .
        targets                      v7          v8

    Token 0 is free, keys are the tokens below `vocabulary_size // 2`, and values those
    from there on. No key and no value is drawn twice in a sequence. Between the queries
    stand tokens of the whole vocabulary.

    Source: arXiv 2312.04927; its settings are those of `num_examples` 100,000,
    `length` 64, `num_pairs` 4 up to `length` 1024, `num_pairs` 256.

    Args:
        num_examples: B.
        length: T; even.
        num_pairs: number of pairs.
        vocabulary_size: number of tokens.
        power: exponent a of the gaps' distribution, `p(i) ~ i^(a - 1)`. With 1 all
            gaps are as likely.
        num_passes: how often the list of pairs is read out.
        random_fill: whether random tokens stand between the queries, or token 0.
        seed: seed, or a `numpy.random.Generator`.

    Returns:
        `keras_mom.tasks.Examples` with arrays `[B, T]`.

    Raises:
        ValueError: if the pairs and their queries do not fit; the message names the
            argument.
    """
    check_sizes(
        num_examples=num_examples,
        length=length,
        num_pairs=num_pairs,
        vocabulary_size=vocabulary_size,
        num_passes=num_passes,
    )
    if length % 2:
        raise ValueError(f"`length` must be even. Received: {length}")
    if not power > 0:
        raise ValueError(f"`power` must be positive. Received: {power!r}")
    context = 2 * num_pairs * num_passes
    check_enough(
        "length",
        length,
        context + 2 * num_pairs,
        f"for {num_pairs} pairs, read {num_passes} time(s), and as many queries",
    )
    half = vocabulary_size // 2
    check_enough(
        "vocabulary_size",
        vocabulary_size,
        2 * (num_pairs + 1),
        "for as many different keys in its first half",
    )
    rng = generator(seed)
    keys = 1 + distinct(rng, num_examples, num_pairs, half - 1)
    values = half + distinct(rng, num_examples, num_pairs, vocabulary_size - half)
    pairs = np.stack([keys, values], axis=-1).reshape(num_examples, 2 * num_pairs)

    # Draws without replacement in the order of a race: the earliest of exponential
    # times with the rates p come first.
    space = (length - context) // 2
    rates = np.arange(1, space + 1) ** (power - 1.0)
    times = rng.exponential(size=(num_examples, space)) / rates
    gaps = np.argsort(times, axis=1)[:, :num_pairs]

    tokens = np.zeros((num_examples, length), "int64")
    if random_fill:
        tokens = rng.integers(vocabulary_size, size=(num_examples, length))
    tokens[:, :context] = np.tile(pairs, (1, num_passes))
    places = context + 2 * gaps
    np.put_along_axis(tokens, places, keys, axis=1)
    targets = np.zeros_like(tokens)
    np.put_along_axis(targets, places, values, axis=1)
    asked = np.zeros(tokens.shape, bool)
    np.put_along_axis(asked, places, True, axis=1)
    return examples(tokens, targets, asked)
