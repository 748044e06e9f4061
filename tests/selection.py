"""Which tests `make test` runs, and which ones `make test-all` alone.

Torch compiles nothing in most tests, and meets every combination. TensorFlow traces,
and JAX compiles, for seconds: there `make test` takes combinations that cover
everything once, and what no backend has a part in runs on torch. No test is left out
but by the mark `exhaustive`.
"""

import keras
import pytest

exhaustive = pytest.mark.exhaustive


def exhaustive_on(*backends):
    """A decorator: on these backends, the test is for `make test-all`."""
    return exhaustive if keras.backend.backend() in backends else lambda test: test


# For what is the same on every backend.
once = exhaustive_on("jax", "tensorflow")


def covering(values, chosen):
    """Parameters: `values`, some for `make test-all` alone where tests compile.

    Args:
        values: of `pytest.mark.parametrize`.
        chosen: those of them that cover the others.
    """
    values, chosen = list(values), list(chosen)
    assert chosen and all(value in values for value in chosen), (values, chosen)
    if keras.backend.backend() == "torch":
        return values
    return [
        value if value in chosen else pytest.param(value, marks=exhaustive)
        for value in values
    ]
