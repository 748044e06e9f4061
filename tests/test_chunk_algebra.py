"""The algebra inside a chunk, against NumPy in float64."""

import numpy as np
import pytest
from agreement import assert_close
from keras import ops

from keras_mom.ops.arrays import ARRAYS
from keras_mom_kernels.memory_scan.chunk_algebra import ChunkAlgebra, CumulativeDecay

array = ops.convert_to_numpy
algebra = ChunkAlgebra(ARRAYS)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 0.99])
def test_inverse(size, correlation):
    random = np.random.default_rng(0)
    keys = random.normal(size=(3, size, 32))
    common = random.normal(size=(3, 1, 32))
    keys = np.sqrt(1 - correlation) * keys + np.sqrt(correlation) * common
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    strict = np.tril(keys @ keys.swapaxes(1, 2), -1).astype("float32")
    expected = np.linalg.inv(np.eye(size) + strict.astype("float64"))
    actual = array(algebra.unit_lower_inverse(ops.convert_to_tensor(strict)))
    assert_close(actual, expected, 1e-5, "inverse")


def test_differences_of_sums_keep_their_digits():
    log_decay = np.array([-20.0] * 32 + [-1e-3] * 32, "float32")
    total = CumulativeDecay.of(ARRAYS, log_decay, axis=0)
    actual = array(total.map(lambda x: x[-1]).minus(total.map(lambda x: x[32])))
    assert_close(actual, 31 * float(np.float32(-1e-3)), 1e-5, "difference")


def test_shift_down():
    x = np.arange(6, dtype="float32").reshape(1, 3, 2)
    assert array(algebra.shift_down(x, axis=1)).tolist() == [[[0, 0], [0, 1], [2, 3]]]


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("strength", [0.1, 20.0])
def test_channel_pairs(inclusive, strength):
    random = np.random.default_rng(0)
    left, right = random.normal(size=(2, 16, 5)).astype("float32")
    log_decay = -strength * random.uniform(size=(16, 5)).astype("float32")
    total = np.cumsum(log_decay.astype("float64"), axis=0)
    expected = np.zeros((16, 16))
    for t in range(16):
        for j in range(t + inclusive):
            expected[t, j] = (left[t] * right[j] * np.exp(total[t] - total[j])).sum()
    decay = CumulativeDecay.of(ARRAYS, log_decay, axis=0)
    actual = algebra.channel_pairs(
        ops.convert_to_tensor(left),
        ops.convert_to_tensor(right),
        decay,
        decay,
        inclusive,
    )
    assert_close(array(actual), expected, 1e-5, "pairs")
