"""The memory mixing against its reference; gradients are part of the layer's tests."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mom.ops.memory_mixing import OutputNorm, memory_mixing
from keras_mom.ops.packing import Packing
from keras_mom_kernels.memory_mixing.reference import memory_mixing as reference

BATCH, LENGTH, MEMORIES, HEADS, WIDTH = 2, 21, 4, 3, 5


def arguments(shared, gated, top_k=2, dtype="float32", seed=0):
    """Arguments of `memory_mixing`; some tokens are masked."""
    random = np.random.default_rng(seed)
    tokens = BATCH, LENGTH
    order = random.uniform(size=(*tokens, MEMORIES)).argsort(-1)
    mask = random.uniform(size=tokens) < 0.8
    indices = ops.convert_to_tensor(order[..., :top_k].astype("int32"))
    packing = Packing(
        indices, MEMORIES, shared, ops.convert_to_tensor(mask), 3, 8, block_size=2
    )
    outputs = random.normal(size=(BATCH, packing.rows, HEADS, WIDTH))
    gate = random.normal(size=(*tokens, HEADS * WIDTH)) if gated else None
    arrays = (
        outputs,
        random.uniform(size=(*tokens, top_k)),
        random.uniform(size=WIDTH),
        gate,
    )
    tensors = [
        None if x is None else ops.convert_to_tensor(x.astype("float32"))
        for x in arrays
    ]
    outputs, weights, scale, gate = tensors
    return outputs, weights, packing, OutputNorm(scale, gate, 1e-6, dtype)


@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("shared, top_k", ((False, 2), (True, 2), (True, 1)))
def test_mixing_is_that_of_the_reference(shared, top_k, gated):
    outputs, weights, packing, norm = arguments(shared, gated, top_k)
    result = memory_mixing(outputs, weights, packing, norm)
    given = (outputs, weights, packing.targets, norm.scale, norm.gate)
    exact = [None if x is None else ops.convert_to_numpy(x) for x in given]
    exact = [x if x is None or x.dtype == "int32" else x.astype(float) for x in exact]
    expected = reference(*exact)
    assert np.any(np.all(expected == 0, axis=-1))
    np.testing.assert_allclose(
        ops.convert_to_numpy(result), expected, rtol=2e-5, atol=2e-6
    )


def test_dtype_of_the_result():
    outputs, *rest = arguments(True, True, dtype="bfloat16")
    result = memory_mixing(ops.cast(outputs, "bfloat16"), *rest)
    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
