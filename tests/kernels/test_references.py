"""The references against closed forms; they run without Keras."""

import subprocess
import sys

import numpy as np
import torch

from keras_mom_kernels.memory_scan.reference import memory_scan
from keras_mom_kernels.packed_convolution.reference import packed_convolution
from keras_mom_kernels.packing.reference import packed_tokens
from keras_mom_kernels.routing.reference import route
from keras_mom_kernels.short_convolution.reference import short_convolution


def inputs(seed=0, shape=(2, 9, 2, 4), value_dim=3):
    random = np.random.default_rng(seed)
    query, key = random.normal(size=(2, *shape))
    return query, key, random.normal(size=(*shape[:3], value_dim))


def test_keras_is_not_imported():
    code = (
        "import sys, keras_mom_kernels.memory_scan.reference,"
        " keras_mom_kernels.memory_scan.shapes,"
        " keras_mom_kernels.memory_mixing.reference,"
        " keras_mom_kernels.memory_mixing.shapes,"
        " keras_mom_kernels.packing.reference, keras_mom_kernels.routing.reference,"
        " keras_mom_kernels.short_convolution.reference,"
        " keras_mom_kernels.packed_convolution.reference,"
        " keras_mom_kernels.packed_convolution.shapes\n"
        "assert not {'keras', 'keras_mom'} & set(sys.modules)"
    )
    path = {"PYTHONPATH": "kernels"}
    subprocess.run([sys.executable, "-c", code], check=True, env=path)


def test_additive_writes_are_causal_linear_attention():
    query, key, value = inputs()
    scores = np.einsum("bthk,bshk->bhts", query, key) * np.tri(9) / 2
    expected = np.einsum("bhts,bshv->bthv", scores, value)
    output, state = memory_scan(query, key, value, write="additive")
    np.testing.assert_allclose(output, expected, rtol=1e-12)
    expected = np.einsum("bshk,bshv->bhkv", key, value)
    np.testing.assert_allclose(state, expected, rtol=1e-12)


def test_the_delta_rule_replaces_what_a_unit_key_holds():
    query, key, value = inputs()
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    _, state = memory_scan(query, key, value)
    held = np.einsum("bhk,bhkv->bhv", key[:, -1], state)
    np.testing.assert_allclose(held, value[:, -1], rtol=1e-10)


def test_erasing_before_the_decay_equals_a_larger_strength():
    # One head, one key channel: (I - b k k^T a^-1) a S = a S - b k k^T S.
    query, key, value = inputs(shape=(1, 6, 1, 1), value_dim=1)
    decay = np.full((1, 6, 1), 0.5)
    output, _ = memory_scan(
        query, key, value, log_decay=np.log(decay), erase_before_decay=True, scale=1
    )
    state = 0.0
    for t in range(6):
        q, k, v = query[0, t, 0, 0], key[0, t, 0, 0], value[0, t, 0, 0]
        state = 0.5 * state + k * (v - k * state)
        np.testing.assert_allclose(output[0, t, 0, 0], q * state, rtol=1e-12)


def test_packed_sequences_equal_separate_ones():
    query, key, value = inputs(shape=(1, 9, 2, 4))
    output, states = memory_scan(query, key, value, cu_seqlens=[0, 4, 4, 7])
    for s, (start, end) in enumerate([(0, 4), (4, 4), (4, 7)]):
        if start < end:
            alone, state = memory_scan(*(x[:, start:end] for x in (query, key, value)))
            np.testing.assert_array_equal(output[:, start:end], alone)
            np.testing.assert_array_equal(states[s], state[0])
    assert (output[:, 7:] == 0).all() and (states[1] == 0).all()


def test_numpy_and_torch_agree():
    arrays = inputs()
    tensors = [torch.tensor(x) for x in arrays]
    for x, y in zip(memory_scan(*arrays), memory_scan(*tensors, xp=torch)):
        np.testing.assert_allclose(x, y.numpy(), rtol=1e-12)


def test_convolution_equals_numpy():
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(1, 10, 2)), random.normal(size=(4, 2))
    output, state = short_convolution(x, kernel, activation=None)
    for c in range(2):
        expected = np.convolve(x[0, :, c], kernel[::-1, c])[:10]
        np.testing.assert_allclose(output[0, :, c], expected, rtol=1e-12)
    np.testing.assert_array_equal(state, x[:, -3:])


def test_routing_by_hand():
    routing = route(np.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]), 2)
    assert routing.indices.tolist() == [[[0, 1], [2, 0]]]
    np.testing.assert_allclose(routing.weights[0, 0], [2 / 3, 1 / 3])
    np.testing.assert_allclose(routing.share, [0.5, 0.25, 0.25])


def test_packed_convolution_equals_the_convolution():
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(1, 10, 6)), random.normal(size=(4, 6))
    # Two regions behind three empty rows each: even rows of x, then odd ones.
    source = [-1, -1, -1, *range(0, 10, 2), -1, -1, -1, *range(1, 10, 2)]
    rows = packed_convolution(x, kernel, np.array([source]), heads=2)
    for first, last in ((0, 8), (8, 16)):
        taken = x[:, source[first + 3 : last]]
        expected, _ = short_convolution(taken, kernel)
        heads = expected.reshape(1, 5, 2, 3)
        norm = np.sqrt((heads**2).sum(-1, keepdims=True) + 1e-6)
        found = rows[:, first + 3 : last]
        np.testing.assert_allclose(found, (heads / norm).reshape(1, 5, 6), rtol=1e-12)
        assert not rows[:, first : first + 3].any()


def test_packing_by_hand():
    indices = [[[0, 1], [1, 2], [0, 2]]]
    assert packed_tokens(indices, 3, True, [[True, False, True]]) == [
        [[0, 2], [0], [2], [0, 2]]
    ]
