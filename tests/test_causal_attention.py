"""Causal attention, against a plain computation, and its cache."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_mom import backend
from keras_mom.models import CausalAttention
from keras_mom.models.cache import places
from tests.layer_helpers import assert_close, call, tokens

BATCH, LENGTH, WIDTH = 3, 9, 8
MASK = np.ones((BATCH, LENGTH), bool)
MASK[0, :2] = MASK[1, 3:5] = MASK[2, 7:] = False
SEGMENTS = np.zeros((BATCH, LENGTH), "int32")
SEGMENTS[:, 4:] = 1
SEGMENTS[1, 6:] = 3


@functools.cache
def make(sliding_window=None):
    layer = CausalAttention(
        4, 6, 2, sliding_window=sliding_window, rope_max_wavelength=100
    )
    layer.build((None, None, WIDTH))
    rng = np.random.default_rng(0)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return layer


def reference(layer, x, mask, segments):
    """Token by token, in float64."""
    kernels = [
        ops.convert_to_numpy(part.kernel).astype("float64")
        for part in (
            layer.query_projection,
            layer.key_projection,
            layer.value_projection,
            layer.output_projection,
        )
    ]
    size, groups = layer.head_dim, layer.num_heads // layer.num_key_value_heads

    def turned(vector, position):
        angle = position * 100.0 ** -(np.arange(size // 2) / (size // 2))
        pair = vector[: size // 2] + 1j * vector[size // 2 :]
        pair = pair * np.exp(1j * angle)
        return np.concatenate([pair.real, pair.imag])

    output = np.zeros(x.shape)
    for row in range(len(x)):
        seen = []  # of this document: position, keys, values
        position, document = 0, None
        for t in range(x.shape[1]):
            if not mask[row, t]:
                continue
            if segments[row, t] != document:
                seen, document = [], segments[row, t]
            query, key, value = (
                (x[row, t] @ kernel).reshape(-1, size) for kernel in kernels[:3]
            )
            seen.append((position, [turned(k, position) for k in key], value))
            mixed = []
            for head in range(layer.num_heads):
                of_head = [
                    (keys[head // groups], values[head // groups])
                    for at, keys, values in seen
                    if position - at < (layer.sliding_window or 1000)
                ]
                scores = [turned(query[head], position) @ k for k, _ in of_head]
                weights = np.exp(np.array(scores) / np.sqrt(size))
                weights /= weights.sum()
                mixed.append(sum(w * v for w, (_, v) in zip(weights, of_head)))
            output[row, t] = np.concatenate(mixed) @ kernels[3]
            position += 1
    return output


@pytest.mark.parametrize("window", [None, 3])
def test_equals_the_reference(window):
    layer, x = make(window), tokens(BATCH, LENGTH, WIDTH)
    everything, one = np.ones_like(MASK), np.zeros_like(SEGMENTS)
    assert_close(call(layer, x), reference(layer, x, everything, one), 1e-5)
    output = call(layer, x, mask=MASK, segment_ids=SEGMENTS)
    assert_close(output, reference(layer, x, MASK, SEGMENTS), 1e-5)


@backend.compiled
def read(window, inputs, mask, cache, counts):
    where, _, counts = places(counts, inputs[..., 0], mask, None)
    return *make(window).call_with_cache(inputs, cache, where), counts


@pytest.mark.parametrize("window", [None, 3])
def test_pieces_equal_the_whole(window):
    layer, x = make(window), tokens(BATCH, LENGTH, WIDTH)
    whole = call(layer, x, mask=MASK)
    cache = layer.get_initial_cache(BATCH, LENGTH)
    assert cache[0].shape == (BATCH, 2, window or LENGTH, 6)
    names = ("position", "document_start", "segment_id")
    counts = {name: ops.zeros((BATCH,), "int32") for name in names}
    outputs, at = [], 0
    for size in (1, 4, 1, 3):
        part, mask = (
            x[:, at : at + size],
            ops.convert_to_tensor(MASK[:, at : at + size]),
        )
        before = [ops.convert_to_numpy(part) for part in cache]
        output, following, counts = read(window, part, mask, cache, counts)
        for held, value in zip(cache, before):
            np.testing.assert_array_equal(ops.convert_to_numpy(held), value)
        cache, at = following, at + size
        outputs.append(ops.convert_to_numpy(output))
    assert_close(np.concatenate(outputs, axis=1), whole, 1e-5)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(counts["position"]), MASK.sum(axis=1)
    )


def test_layer_protocol():
    layer = make(3)
    again = CausalAttention.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    again.build((None, None, WIDTH))
    again.set_weights(layer.get_weights())
    x = tokens(1, 4, WIDTH)
    assert_close(call(again, x), call(layer, x), 1e-6)
    spec = layer.compute_output_spec(keras.KerasTensor((None, None, WIDTH)))
    assert spec.shape == (None, None, WIDTH)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_heads=4, head_dim=5), "`head_dim` must be even.*=5"),
        (dict(num_heads=4, head_dim=4, num_key_value_heads=3), "must divide.*=3"),
        (dict(num_heads=4, head_dim=4, sliding_window=0), "`sliding_window`.*0"),
        (dict(num_heads=0, head_dim=4), "`num_heads`.*0"),
        (dict(num_heads=1, head_dim=4, rope_max_wavelength=0), "`rope_max.*=0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CausalAttention(**arguments)


def test_bad_calls():
    layer = make()
    with pytest.raises(ValueError, match="`max_length` must be given"):
        layer.get_initial_cache(2)
    with pytest.raises(ValueError, match="`mask` must have shape"):
        layer(tokens(2, 4, WIDTH), mask=np.ones((2, 3), bool))


def test_a_cache_without_room():
    layer = make()
    counts = {
        name: ops.zeros((1,), "int32")
        for name in ("position", "document_start", "segment_id")
    }
    where, _, _ = places(counts, np.zeros((1, 4), "int32"), None, None)
    with pytest.raises(ValueError, match="no room.*4 tokens, max_length=3"):
        layer.call_with_cache(tokens(1, 4, WIDTH), layer.get_initial_cache(1, 3), where)
