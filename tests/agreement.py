"""How close results have to be: the promises that every implementation keeps."""

import numpy as np

# Relative root-mean-square errors of values and of gradients, by the inputs' dtype.
VALUE_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}


def relative_error(actual, expected):
    """Relative root-mean-square error; 0 for equal arrays, infinite for NaN."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = np.linalg.norm(actual - expected)
    if error == 0:
        return 0.0
    size = np.linalg.norm(expected)
    return error / size if size > 0 and np.isfinite(error) else np.inf


def assert_close(actual, expected, tolerance, what):
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: error {error:.2e}, allowed {tolerance:.0e}"


def assert_values_and_gradients(actual, expected, dtype, names):
    """Compares what `value_and_grad` returns with what the reference gives.

    Args:
        actual, expected: outputs, and a dict of gradients.
        dtype: of the inputs.
        names: what the outputs are called.
    """
    for name, x, y in zip(names, actual[0], expected[0], strict=True):
        assert_close(x, y, VALUE_TOLERANCE[dtype], name)
    assert actual[1].keys() == expected[1].keys()
    for name, y in expected[1].items():
        what = f"gradient of {name}"
        assert_close(actual[1][name], y, GRADIENT_TOLERANCE[dtype], what)
