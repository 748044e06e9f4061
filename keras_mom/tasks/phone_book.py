"""Looking a number up in a phone book."""

import numpy as np

from keras_mom.tasks.draws import (
    check_enough,
    check_sizes,
    distinct,
    generator,
    next_tokens,
)

_COLON, _LINE_END, _FIRST_NAME = 10, 11, 12


def phone_book(
    num_examples,
    num_entries,
    *,
    num_digits=7,
    num_queries=1,
    num_first_names=32,
    num_last_names=32,
    seed=0,
):
    """A phone book, and names whose numbers are asked for.

    An entry is a first name, a last name, a colon, digits and an end of line. Behind
    `num_entries` of them, `num_queries` are repeated, and each of their digits is to
    be foretold. Entries share first or last names, never both.

        inputs   Ann Lee : 4 2 \\n  Bob Lee : 7 1 \\n  Ann Lee : 4 2 \\n
        targets                                        4 2

    Tokens 0 to 9 are the digits, 10 the colon, 11 the end of a line; then first and
    last names.

    Source: the task of arXiv 2402.01032, in tokens of its own.

    Args:
        num_examples: B.
        num_entries: number of entries.
        num_digits: digits of a number.
        num_queries: number of entries asked for, all different.
        num_first_names, num_last_names: how many names there are. The vocabulary has
            12 tokens more.
        seed: seed, or a `numpy.random.Generator`.

    Returns:
        `keras_mom.tasks.Examples` with arrays `[B, T]`, T being
        `(num_entries + num_queries) * (num_digits + 4)`.

    Raises:
        ValueError: if there are too few names or entries; the message names the
            argument.
    """
    check_sizes(
        num_examples=num_examples,
        num_entries=num_entries,
        num_digits=num_digits,
        num_queries=num_queries,
        num_first_names=num_first_names,
        num_last_names=num_last_names,
    )
    check_enough("num_entries", num_entries, num_queries, "for different queries")
    names = num_first_names * num_last_names
    if names < num_entries:
        raise ValueError(
            "`num_first_names` times `num_last_names` must be at least `num_entries`. "
            f"Received: num_first_names={num_first_names}, "
            f"num_last_names={num_last_names}, num_entries={num_entries}"
        )
    rng = generator(seed)
    chosen = distinct(rng, num_examples, num_entries, names)
    entries = np.empty((num_examples, num_entries, num_digits + 4), "int64")
    entries[..., 0] = _FIRST_NAME + chosen % num_first_names
    entries[..., 1] = _FIRST_NAME + num_first_names + chosen // num_first_names
    entries[..., 2] = _COLON
    entries[..., 3:-1] = rng.integers(10, size=(num_examples, num_entries, num_digits))
    entries[..., -1] = _LINE_END
    queries = distinct(rng, num_examples, num_queries, num_entries)
    repeated = np.take_along_axis(entries, queries[..., None], axis=1)
    lines = np.concatenate([entries, repeated], axis=1)
    asked = np.zeros(lines.shape, bool)
    asked[:, num_entries:, 3:-1] = True
    return next_tokens(lines.reshape(num_examples, -1), asked.reshape(num_examples, -1))
