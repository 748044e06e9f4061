"""Checks that layers and rules share."""

import numbers


def check_positive(name, value):
    """Raises unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {value!r}")
