"""What every implementation of the short convolution must do."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from agreement import assert_values_and_gradients
from gradients import evaluate, value_and_grad

from keras_mom import backend
from keras_mom.ops import short_convolution
from keras_mom_kernels.short_convolution.reference import (
    short_convolution as reference,
)


@functools.lru_cache
def convolution(implementation, activation):
    def function(segment_ids=None, cu_seqlens=None, **arrays):
        return short_convolution(
            **arrays,
            segment_ids=segment_ids,
            cu_seqlens=cu_seqlens,
            activation=activation,
            return_state=True,
            implementation=implementation,
        )

    return function


def values_and_gradients(arrays, cotangents, **given):
    """Outputs and gradients of the float64 reference."""
    tensors = {
        name: torch.tensor(x.astype("float64"), requires_grad=True)
        for name, x in arrays.items()
    }
    outputs = reference(**tensors, **given, xp=torch)
    gradients = torch.autograd.grad(
        outputs, list(tensors.values()), [torch.tensor(c) for c in cotangents]
    )
    return (
        [x.detach().numpy() for x in outputs],
        {name: g.numpy() for name, g in zip(tensors, gradients)},
    )


@contextlib.contextmanager
def small_blocks():
    """Blocks of 64 rows, also where a compiler would take all rows at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "block_elements", lambda: 1)
        yield


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
        expected = values_and_gradients(arrays, cotangents, activation=activation)
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

    @pytest.mark.parametrize("segmented", [False, True])
    def test_many_blocks_of_rows(self, segmented):
        """Longer than what is computed at a time, where that is limited."""
        random = np.random.default_rng(1)
        arrays = {
            "inputs": random.normal(size=(1, 300, 3)).astype("float32"),
            "kernel": random.normal(size=(4, 3)).astype("float32"),
            "initial_state": random.normal(size=(1, 3, 3)).astype("float32"),
        }
        given = {}
        if segmented:
            ids = np.repeat([0, 1, 2, 3, 4, 5], [2, 61, 2, 63, 2, 170])
            given["segment_ids"] = ids[None].astype("int32")
        cotangents = [
            random.normal(size=(1, 300, 3)).astype("float32"),
            random.normal(size=(1, 3, 3)).astype("float32"),
        ]
        expected = values_and_gradients(arrays, cotangents, **given)
        function = functools.partial(convolution(self.implementation, "silu"), **given)
        with small_blocks():
            actual = value_and_grad(function, arrays, cotangents)
        assert_values_and_gradients(actual, expected, "float32", ("output", "state"))

    @pytest.mark.parametrize("with_state", [False, True])
    def test_packed_sequences(self, with_state):
        """Each gives what it gives alone; one is empty, one shorter than the state."""
        random = np.random.default_rng(2)
        borders = [0, 5, 5, 7, 15]
        arrays = {
            "inputs": random.normal(size=(1, 17, 3)).astype("float32"),
            "kernel": random.normal(size=(4, 3)).astype("float32"),
        }
        if with_state:
            arrays["initial_state"] = random.normal(size=(4, 3, 3)).astype("float32")
        cotangents = [
            random.normal(size=(1, 17, 3)).astype("float32"),
            random.normal(size=(4, 3, 3)).astype("float32"),
        ]
        function = functools.partial(
            convolution(self.implementation, "silu"),
            cu_seqlens=np.array(borders, "int32"),
        )
        actual = value_and_grad(function, arrays, cotangents)
        outputs = [np.zeros((1, 17, 3)), np.zeros((4, 3, 3))]
        gradients = {name: np.zeros(x.shape) for name, x in arrays.items()}
        for s, (start, stop) in enumerate(zip(borders, borders[1:])):
            if start == stop:
                if with_state:
                    outputs[1][s] = arrays["initial_state"][s]
                    gradients["initial_state"][s] = cotangents[1][s]
                continue
            own = {**arrays, "inputs": arrays["inputs"][:, start:stop]}
            if with_state:
                own["initial_state"] = arrays["initial_state"][s : s + 1]
            part = [cotangents[0][:, start:stop], cotangents[1][s : s + 1]]
            (output, state), of = values_and_gradients(own, part)
            outputs[0][:, start:stop], outputs[1][s] = output, state[0]
            gradients["inputs"][:, start:stop] = of["inputs"]
            gradients["kernel"] += of["kernel"]
            if with_state:
                gradients["initial_state"][s] = of["initial_state"][0]
        expected = outputs, gradients
        assert_values_and_gradients(actual, expected, "float32", ("output", "state"))

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
