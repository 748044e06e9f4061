"""The memory scan: the portable form's contract, and what every form refuses."""

import keras
import numpy as np
import pytest
from agreement import assert_values_and_gradients
from contracts.memory_scan import (
    EVERY_RULE,
    MemoryScanContract,
    cotangents_of,
    inputs_of,
    scan,
)
from gradients import value_and_grad
from keras import ops
from selection import exhaustive

from keras_mom import backend
from keras_mom.ops import dispatch, memory_scan
from keras_mom.ops.memory_scan import block_size

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    class TestXla(MemoryScanContract):
        implementation = "xla"

    def eager_value_and_grad(function, inputs, cotangents):
        """`gradients.value_and_grad` without a graph around."""
        tensors = {name: tf.constant(x) for name, x in inputs.items()}
        floats = {name: x for name, x in tensors.items() if x.dtype.is_floating}
        with tf.GradientTape() as tape:
            tape.watch(floats)
            outputs = function(**tensors)
        grads = tape.gradient(outputs, floats, cotangents)
        return [x.numpy() for x in outputs], {n: x.numpy() for n, x in grads.items()}

    @pytest.mark.parametrize(
        "rule, packed",
        (
            (("head", "delta", False), True),
            pytest.param(("none", "additive", False), False, marks=exhaustive),
            pytest.param(("value", "additive", False), True, marks=exhaustive),
        ),
    )
    def test_eager_calls_are_those_of_the_portable_form(rule, packed):
        sizes = dict(B=1, cu_seqlens=(0, 0, 1, 66, 70)) if packed else {}
        inputs = inputs_of(rule, T=70, **sizes)
        cotangents = cotangents_of(inputs)
        expected = value_and_grad(scan("portable", rule), inputs, cotangents)
        actual = eager_value_and_grad(scan("xla", rule), inputs, cotangents)
        names = ("output", "state")
        assert_values_and_gradients(actual, expected, "float32", names)

else:

    class TestPortable(MemoryScanContract):
        implementation = "portable"


def test_kernels_take_single_chunks():
    lengths = (64, 200, 2048, None)
    assert [block_size(x) for x in lengths] == [1, 4, 8, 8]
    for name in ("triton", "pallas"):
        assert [block_size(x, name) for x in lengths] == [1] * 4


# Bad input: each error names the argument.

ROWS = (2, 5, 3)
PACKED_ROWS = (1, 5, 3)


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def arguments(rows, changes):
    inputs = {
        "query": zeros(*rows, 4),
        "key": zeros(*rows, 4),
        "value": zeros(*rows, 6),
    }
    return {**inputs, **changes}


@pytest.mark.parametrize(
    "name, changes",
    (
        ("query", {"query": zeros(2, 5, 4)}),
        ("query", {"query": zeros(*ROWS, 4, 1)}),
        ("query", {"query": zeros(*ROWS, 4, dtype="int32")}),
        ("key", {"key": zeros(*ROWS, 5)}),
        ("key", {"key": zeros(2, 6, 3, 4)}),
        ("key", {"key": zeros(2, 5, 4)}),
        ("key", {"key": zeros(*ROWS, 4, dtype="int32")}),
        ("value", {"value": zeros(1, 5, 3, 6)}),
        ("value", {"value": zeros(2, 5, 2, 6)}),
        ("value", {"value": zeros(2, 5, 3)}),
        ("value", {"value": zeros(*ROWS, 6, dtype="int32")}),
        ("log_decay", {"log_decay": zeros(2, 5)}),
        ("log_decay", {"log_decay": zeros(2, 5, 4)}),
        ("log_decay", {"log_decay": zeros(*ROWS, 6)}),
        ("log_decay", {"log_decay": zeros(*ROWS, 1)}),
        ("log_decay", {"log_decay": zeros(*ROWS, dtype="int32")}),
        ("beta", {"beta": zeros(2, 5)}),
        ("beta", {"beta": zeros(*ROWS, 1)}),
        ("beta", {"beta": zeros(2, 4, 3)}),
        ("beta", {"beta": zeros(*ROWS, dtype="int32")}),
        ("initial_state", {"initial_state": zeros(3, 3, 4, 6)}),
        ("initial_state", {"initial_state": zeros(2, 3, 6, 4)}),
        ("initial_state", {"initial_state": zeros(3, 4, 6)}),
        ("initial_state", {"initial_state": zeros(2, 3, 4, 6, dtype="float16")}),
        ("initial_state", {"initial_state": zeros(2, 3, 4, 6, dtype="int32")}),
        ("scale", {"scale": zeros()}),
        ("scale", {"scale": "1"}),
        ("write", {"write": "replace"}),
        ("write", {"write": None}),
        ("erase_before_decay", {"erase_before_decay": True, "write": "additive"}),
        ("decay_axis", {"decay_axis": "head"}),
        ("decay_axis='value'", {"decay_axis": "value"}),
        (
            "log_decay",
            {"decay_axis": "value", "write": "additive", "log_decay": zeros(*ROWS)},
        ),
        (
            "log_decay",
            {"decay_axis": "value", "write": "additive", "log_decay": zeros(*ROWS, 4)},
        ),
        ("implementation", {"implementation": "fastest"}),
        ("cu_seqlens", {"cu_seqlens": [0, 2, 5]}),  # B is 2
    ),
)
def test_bad_input_is_named(name, changes):
    with pytest.raises(ValueError, match=f"`{name}`"):
        memory_scan(**arguments(ROWS, changes))


@pytest.mark.parametrize(
    "name, changes",
    (
        ("cu_seqlens", {"cu_seqlens": [0, 3, 2]}),
        ("cu_seqlens", {"cu_seqlens": [1, 3]}),
        ("cu_seqlens", {"cu_seqlens": [0, 6]}),
        ("cu_seqlens", {"cu_seqlens": [0.0, 5.0]}),
        ("cu_seqlens", {"cu_seqlens": zeros(3)}),
        ("cu_seqlens", {"cu_seqlens": [0]}),
        ("cu_seqlens", {"cu_seqlens": [[0, 5]]}),
        ("cu_seqlens", {"cu_seqlens": 5}),
        ("query", {"cu_seqlens": [0, 5], "query": zeros(4)}),
        (
            "initial_state",
            {"cu_seqlens": [0, 2, 5], "initial_state": zeros(1, 3, 4, 6)},
        ),
    ),
)
def test_bad_packed_input_is_named(name, changes):
    with pytest.raises(ValueError, match=f"`{name}`"):
        memory_scan(**arguments(PACKED_ROWS, changes))


def test_decreasing_cu_seqlens_in_a_tensor_are_named():
    borders = ops.convert_to_tensor([0, 3, 2], "int32")
    with pytest.raises(ValueError, match="`cu_seqlens`"):
        memory_scan(**arguments(PACKED_ROWS, {"cu_seqlens": borders}))


def test_an_implementation_that_is_not_there_is_not_replaced(monkeypatch):
    monkeypatch.delitem(dispatch._REGISTRY["memory_scan"], "triton", raising=False)
    with pytest.raises(NotImplementedError, match="'triton'.*`memory_scan`.*portable"):
        memory_scan(**arguments(ROWS, {"implementation": "triton"}))


if keras.backend.backend() == "torch":

    @EVERY_RULE
    def test_torch_operators_keep_their_promises_to_torch(rule):
        """Schema, fake tensors, autograd registration and compiled gradients."""
        import torch

        from keras_mom.ops.chunked_scan import _SCAN, ScanOptions

        inputs = inputs_of(rule, T=16)
        tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
        names = ("query", "key", "value", "log_decay", "beta")
        rows = [tensors.get(name) for name in names]
        state = tensors["initial_state"][:, None]
        axis = "value" if rule[0] == "value" else "key"
        options = ScanOptions(*rule[1:], 4, 2, 1.0, axis)
        values = [x for x in (*rows, state) if x is not None]
        present = tuple(x is not None for x in (*rows, None, None, state))
        key = repr((tuple(options), present))
        torch.library.opcheck(_SCAN._forward, (values, key))
        for value in values:
            value.requires_grad_()
        torch.library.opcheck(_SCAN._forward, (values, key))

    @pytest.mark.skipif(backend.accelerator() is not None, reason="a GPU is there")
    def test_triton_kernels_need_a_gpu():
        inputs = inputs_of(("head", "delta", False), T=2)
        with pytest.raises(NotImplementedError, match="Triton kernels need a GPU"):
            memory_scan(**inputs, implementation="triton")
