"""What every implementation of the short convolution must do."""

import functools

import numpy as np
import pytest
import torch
from agreement import assert_values_and_gradients
from gradients import evaluate, value_and_grad

from keras_mom.ops import short_convolution
from keras_mom_kernels.short_convolution.reference import (
    short_convolution as reference,
)


@functools.lru_cache
def convolution(implementation, activation):
    def function(segment_ids=None, **arrays):
        return short_convolution(
            **arrays,
            segment_ids=segment_ids,
            activation=activation,
            return_state=True,
            implementation=implementation,
        )

    return function


class ShortConvolutionContract:
    implementation = "portable"

    @pytest.mark.parametrize("activation", ["silu", None])
    @pytest.mark.parametrize("with_state", [False, True])
    @pytest.mark.parametrize("length", [1, 2, 12])
    def test_values_and_gradients(self, length, with_state, activation):
        random = np.random.default_rng(length)
        arrays = {
            "inputs": random.normal(size=(2, length, 6)).astype("float32"),
            "kernel": random.normal(size=(4, 6)).astype("float32"),
        }
        if with_state:
            arrays["initial_state"] = random.normal(size=(2, 3, 6)).astype("float32")
        cotangents = [
            random.normal(size=(2, length, 6)).astype("float32"),
            random.normal(size=(2, 3, 6)).astype("float32"),
        ]
        tensors = {
            name: torch.tensor(x.astype("float64"), requires_grad=True)
            for name, x in arrays.items()
        }
        outputs = reference(**tensors, activation=activation, xp=torch)
        gradients = torch.autograd.grad(
            outputs, list(tensors.values()), [torch.tensor(c) for c in cotangents]
        )
        expected = (
            [x.detach().numpy() for x in outputs],
            {name: g.numpy() for name, g in zip(tensors, gradients)},
        )
        function = convolution(self.implementation, activation)
        actual = value_and_grad(function, arrays, cotangents)
        assert_values_and_gradients(actual, expected, "float32", ("output", "state"))

    def test_segments_do_not_see_each_other(self):
        random = np.random.default_rng(0)
        arrays = {
            "inputs": random.normal(size=(2, 12, 6)).astype("float32"),
            "kernel": random.normal(size=(4, 6)).astype("float32"),
            "initial_state": random.normal(size=(2, 3, 6)).astype("float32"),
            "segment_ids": np.array(
                [[0] * 5 + [1] * 2 + [2] * 5, [0] * 10 + [1] * 2], "int32"
            ),
        }
        outputs = evaluate(convolution(self.implementation, "silu"), arrays)
        for actual, expected in zip(outputs, reference(**arrays)):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
        changed = dict(arrays, inputs=arrays["inputs"].copy())
        changed["inputs"][0, :5] = np.nan
        again = evaluate(convolution(self.implementation, "silu"), changed)
        assert (again[0][0, 5:] == outputs[0][0, 5:]).all()
        assert (again[0][1] == outputs[0][1]).all()

    def test_split_calls_equal_one(self):
        random = np.random.default_rng(0)
        x = random.normal(size=(2, 12, 6)).astype("float32")
        kernel = random.normal(size=(4, 6)).astype("float32")
        function = convolution(self.implementation, "silu")
        whole, last = evaluate(function, {"inputs": x, "kernel": kernel})
        state, parts = np.zeros((2, 3, 6), "float32"), []
        for piece in np.split(x, [1, 2, 7], axis=1):
            arrays = {"inputs": piece, "kernel": kernel, "initial_state": state}
            part, state = evaluate(function, arrays)
            parts.append(part)
        np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-6)
        np.testing.assert_array_equal(state, last)
