"""The operations call their Triton kernels as these want to be called, on torch.

On tensors without memory, which the kernels' operators serve without a GPU.
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mom import backend
from keras_mom.ops.dispatch import dispatch, implementations
from keras_mom.ops.memory_mixing import OutputNorm, memory_mixing
from keras_mom.ops.packing import Packing
from keras_mom.ops.routing import route

BATCH, LENGTH, MEMORIES, TOP_K = 2, 21, 4, 2
ARRAYS = ("position", "targets", "slot", "token", "memory", "place", "start", "count")
ARRAYS += ("chunk_offsets",)


def packing_of(masked, **how):
    """A packing and its arguments."""
    random = np.random.default_rng(0)
    order = random.uniform(size=(BATCH, LENGTH, MEMORIES)).argsort(-1)
    indices = ops.convert_to_tensor(order[..., :TOP_K].astype("int32"))
    mask = None
    if masked:
        mask = ops.convert_to_tensor(random.uniform(size=(BATCH, LENGTH)) < 0.8)
    if how:
        indices, mask = indices.to("meta"), None if mask is None else mask.to("meta")
    return Packing(indices, MEMORIES, True, mask, 3, 8, block_size=2, **how)


def assert_alike(actual, expected):
    assert actual.device.type == "meta"
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)


if keras.backend.backend() == "torch":
    import torch

    pytest.importorskip("triton")

    @pytest.mark.parametrize("masked", (False, True))
    def test_packing(masked):
        actual, expected = (
            packing_of(masked, implementation="triton"),
            packing_of(masked),
        )
        for name in ARRAYS:
            assert_alike(getattr(actual, name), getattr(expected, name))

    def test_routing():
        logits = torch.zeros(BATCH, LENGTH, MEMORIES)
        results = route(logits.to("meta"), TOP_K, implementation="triton")
        for x, y in zip(results, route(logits, TOP_K), strict=True):
            assert_alike(x, y)

    @pytest.mark.parametrize("gated", (False, True))
    @pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
    def test_mixing(dtype, gated):
        packing = packing_of(True)
        gate = torch.zeros(BATCH, LENGTH, 15) if gated else None
        norm = OutputNorm(torch.ones(5), gate, 1e-6, dtype)
        outputs = torch.zeros(BATCH, packing.rows, 3, 5)
        weights = torch.zeros(BATCH, LENGTH, TOP_K)
        expected = memory_mixing(outputs, weights, packing, norm)
        packing.targets = packing.targets.to("meta")
        gate = None if gate is None else gate.to("meta")
        norm = norm._replace(scale=norm.scale.to("meta"), gate=gate)
        outputs, weights = outputs.to("meta"), weights.to("meta")
        actual = memory_mixing(outputs, weights, packing, norm, implementation="triton")
        assert_alike(actual, expected)

    @pytest.mark.skipif(backend.accelerator() is not None, reason="a GPU is there")
    @pytest.mark.parametrize(
        "operation", ("memory_mixing", "packing_tables", "routing")
    )
    def test_no_cpu_tensor_is_taken(operation):
        assert implementations(operation) == ("triton", "portable")
        x = torch.zeros(1, 2, 3)
        arguments = {
            "memory_mixing": (x, x, None, None),
            "packing_tables": (None, x, None),
        }
        with pytest.raises(NotImplementedError, match="need a GPU.*'cpu'"):
            dispatch(operation, "triton", *arguments.get(operation, (x, 2)))
