import numpy as np
import pytest
from agreement import assert_values_and_gradients
from contracts.short_convolution import small_blocks
from gradients import value_and_grad

from keras_mom.ops.normalization import l2_normalize


@pytest.mark.parametrize("rows", [1, 150])
def test_values_and_gradients(rows):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, rows, 2, 5)).astype("float32")
    x[0, 0, 0] = 0
    cotangent = random.normal(size=x.shape).astype("float32")
    with small_blocks():
        actual = value_and_grad(
            lambda x: (l2_normalize(x, 1e-2),), {"x": x}, [cotangent]
        )
    norm = np.sqrt((x.astype("float64") ** 2).sum(-1, keepdims=True) + 1e-2)
    along = (cotangent * x).sum(-1, keepdims=True, dtype="float64")
    gradient = cotangent / norm - x * along / norm**3
    expected = [x / norm], {"x": gradient}
    assert_values_and_gradients(actual, expected, "float32", ("output",))
