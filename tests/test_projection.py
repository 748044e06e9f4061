"""A single row goes through a projection several times where that is faster."""

import numpy as np
import pytest
from keras import ops
from layer_helpers import make_layer, to_numpy, tokens

from keras_mom import backend
from keras_mom.models import GatedMLP
from keras_mom.ops.projection import project

ROWS = 8


@pytest.fixture
def several(monkeypatch):
    monkeypatch.setattr(backend, "least_rows", lambda: ROWS)


@pytest.mark.parametrize(
    "shape, seen",
    {
        (1, 1, 3): (ROWS, 1, 3),
        (1, 3): (ROWS, 3),
        (2, 1, 3): (2, 1, 3),
        (1, 2, 3): (1, 2, 3),
    }.items(),
)
def test_only_a_single_row_is_repeated(several, shape, seen):
    shapes = []

    def function(x):
        shapes.append(tuple(x.shape))
        return {"double": 2 * x, "others": (x[..., :1], -x)}

    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    found = project(function, ops.convert_to_tensor(x))
    assert shapes == [seen]
    np.testing.assert_array_equal(found["double"], 2 * x)
    np.testing.assert_array_equal(found["others"][0], x[..., :1])
    np.testing.assert_array_equal(found["others"][1], -x)


def test_unknown_sizes_are_left_alone(several):
    class Unknown:
        shape = (None, 1, 3)

    assert project(lambda x: x.shape, Unknown()) == (None, 1, 3)


def shapes_seen(layers, monkeypatch):
    """The shapes that these layers are called with, from now on."""
    seen = []
    for layer in layers:

        def call(x, *rest, original=layer.call):
            seen.append(tuple(x.shape))
            return original(x, *rest)

        monkeypatch.setattr(layer, "call", call)
    return seen


@pytest.mark.parametrize("rule", ("gated_delta_net", "rwkv7"))
def test_a_token_is_what_it_was(several, monkeypatch, rule):
    layer = make_layer(num_heads=2, update_rule=rule, name="layer")
    inputs = ops.convert_to_tensor(tokens(1, 5, 12))
    _, state = layer.call_with_state(inputs[:, :4], layer.get_initial_state(1))
    found = layer.call_with_state(inputs[:, 4:], state)
    monkeypatch.undo()
    expected = layer.call_with_state(inputs[:, 4:], state)
    for x, y in zip(*map(_arrays, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def _arrays(results):
    output, states = to_numpy(results)
    return [output, *states]


def test_all_projections_of_a_token_are_repeated(several, monkeypatch):
    layer = make_layer(num_heads=2, name="layer")
    state = layer.get_initial_state(1)
    layers = layer._all_projections()
    seen = shapes_seen(layers, monkeypatch)
    layer.call_with_state(ops.convert_to_tensor(tokens(1, 1, 12)), state)
    assert {shape[:2] for shape in seen} == {(ROWS, 1)} and len(seen) == len(layers)
    seen.clear()
    layer.call_with_state(ops.convert_to_tensor(tokens(1, 3, 12)), state)
    assert {shape[:2] for shape in seen} == {(1, 3)}


def test_the_feed_forward_network_of_a_token_is_repeated(several, monkeypatch):
    network = GatedMLP(20)
    x = ops.convert_to_tensor(tokens(1, 1, 12))
    network.build(x.shape)
    seen = shapes_seen(network._projections(), monkeypatch)
    found = to_numpy(network(x))
    assert {shape[:2] for shape in seen} == {(ROWS, 1)} and len(seen) == 3
    monkeypatch.undo()
    np.testing.assert_allclose(found, to_numpy(network(x)), rtol=1e-5, atol=1e-6)
