"""Checks that layers and rules share."""

import numbers


def check_positive(name, value):
    """Raises unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {value!r}")


def check_names(inputs, expected):
    """Refuses a dict with inputs that a model does not have.

    Keras would take the first of them, in the order of their names, for its own.
    """
    unknown = sorted(set(inputs) - set(expected))
    if unknown:
        hint = ""
        if "segment_ids" in unknown:
            hint = " `segment_ids` are an input of a backbone with `packed=True`."
        raise ValueError(
            f"`inputs` must be a dict of {sorted(expected)}.{hint} "
            f"Received: {unknown} too"
        )


def check_keywords(name, kwargs, expected=("name", "trainable")):
    """Refuses what `keras.Model` would take without a word."""
    unknown = sorted(set(kwargs) - set(expected))
    if unknown:
        raise TypeError(f"`{name}` has no arguments {unknown}")
