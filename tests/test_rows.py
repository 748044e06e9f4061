"""Moving rows: values, and gradients that are gathers too."""

import numpy as np
from gradients import evaluate, value_and_grad
from keras import ops

from keras_mom.ops.rows import gather_rows, sum_rows

SOURCE = np.array([[2, -1, 0, 2, 1], [0, 1, 2, -1, -1]], "int32")
TARGETS = np.array([[[2, -1], [4, -1], [0, 3]], [[0, -1], [-1, 1], [2, -1]]], "int32")


def gather(x):
    return (
        gather_rows(x, ops.convert_to_tensor(SOURCE), ops.convert_to_tensor(TARGETS)),
    )


def scatter(x):
    return (sum_rows(x, ops.convert_to_tensor(SOURCE), ops.convert_to_tensor(TARGETS)),)


def matrix():
    """`[B, rows, T]`: 1 where a row is taken."""
    return (SOURCE[..., None] == np.arange(3)).astype("float32")


def test_gather_and_its_gradient():
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 3, 4)).astype("float32")
    y = random.normal(size=(2, 5, 4)).astype("float32")
    (rows,), gradients = value_and_grad(gather, {"x": x}, [y])
    np.testing.assert_allclose(rows, matrix() @ x, rtol=1e-6)
    expected = matrix().swapaxes(1, 2) @ y
    np.testing.assert_allclose(gradients["x"], expected, rtol=1e-6, atol=1e-6)


def test_sum_and_its_gradient():
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 3, 4)).astype("float32")
    y = random.normal(size=(2, 5, 4)).astype("float32")
    (tokens,), gradients = value_and_grad(scatter, {"x": y}, [x])
    expected = matrix().swapaxes(1, 2) @ y
    np.testing.assert_allclose(tokens, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradients["x"], matrix() @ x, rtol=1e-6)


def test_rows_that_are_not_taken_leak_nothing():
    x = np.ones((2, 3, 4), "float32")
    x[0, 0] = np.nan
    (rows,) = evaluate(gather, {"x": x})
    assert np.isnan(rows[0, 2]).all()
    rows[0, 2] = 0
    assert np.isfinite(rows).all() and (rows[0, 1] == 0).all()
