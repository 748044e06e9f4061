"""The feed-forward networks of a block: `GatedMLP` and `MixtureOfExperts`."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.testing import TestCase

from keras_mom.models import GatedMLP, MixtureOfExperts
from tests.layer_helpers import assert_close, call, to_numpy, tokens
from tests.selection import once

SIZES = {"num_experts": 4, "experts_per_token": 2, "intermediate_dim": 6}
SHAPE = (2, 5, 8)


class ConformanceTest(TestCase):
    def test_gated_mlp(self):
        self.run_layer_test(
            GatedMLP,
            init_kwargs={"intermediate_dim": 6, "output_initializer": "he_normal"},
            input_shape=SHAPE,
            expected_output_shape=SHAPE,
            expected_num_trainable_weights=3,
            expected_num_losses=0,
            supports_masking=True,
        )

    def test_mixture_of_experts(self):
        self.run_layer_test(
            MixtureOfExperts,
            init_kwargs={**SIZES, "shared_expert": True},
            input_shape=SHAPE,
            expected_output_shape=SHAPE,
            # Router, 3 projections of the experts, 3 of the shared expert.
            expected_num_trainable_weights=7,
            # Routing statistics.
            expected_num_non_trainable_weights=2,
            expected_num_losses=1,
            supports_masking=True,
        )


def make_experts(**kwargs):
    layer = MixtureOfExperts(**{**SIZES, **kwargs})
    layer.build((None, None, SHAPE[-1]))
    random = np.random.default_rng(0)
    for variable in layer.trainable_variables:
        value = random.normal(size=variable.shape) / np.sqrt(variable.shape[0])
        variable.assign(value.astype("float32"))
    return layer


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def gated_mlp(x, gate, up, down):
    gate = x @ gate
    return (gate / (1 + np.exp(-gate)) * (x @ up)) @ down


def reference(layer, x, mask=None):
    """Token by token, float64: output, balance loss and the experts' shares."""
    router, gate, up, down, *shared = [
        to_numpy(v.value).astype("float64") for v in kernels(layer)
    ]
    experts, top_k = layer.num_experts, layer.experts_per_token
    gates, ups = np.split(gate, experts, -1), np.split(up, experts, -1)
    downs = np.split(down, experts, 0)
    output = np.zeros(x.shape)
    counted, probability, count = np.zeros(experts), np.zeros(experts), 0
    for place in np.ndindex(x.shape[:2]):
        if mask is not None and not mask[place]:
            continue
        token = x[place].astype("float64")
        p = softmax(token @ router)
        chosen = np.argsort(-p, kind="stable")[:top_k]
        weights = p[chosen]
        if layer.normalize_weights:
            weights = weights / weights.sum()
        for e, weight in zip(chosen, weights):
            output[place] += weight * gated_mlp(token, gates[e], ups[e], downs[e])
        if shared:
            output[place] += gated_mlp(token, *shared)
        counted[chosen] += 1
        probability += p
        count += 1
    loss = experts * (counted / count) @ (probability / count) / top_k
    return output, loss * layer.balance_loss_weight, counted / counted.sum()


def kernels(layer):
    layers = [layer.gate_projection, layer.up_projection, layer.down_projection]
    if layer.shared_expert is not None:
        shared = layer.shared_expert
        layers += [
            shared.gate_projection,
            shared.up_projection,
            shared.down_projection,
        ]
    return [layer.router.kernel, *(x.kernel for x in layers)]


MASK = np.array([[1, 1, 0, 1, 1], [0, 0, 1, 1, 0]], bool)


@pytest.mark.parametrize(
    "settings, mask",
    [
        ({}, None),
        ({"shared_expert": True, "shared_intermediate_dim": 3}, MASK),
        ({"experts_per_token": 1, "normalize_weights": False}, MASK),
    ],
    ids=["plain", "shared, masked", "switch, masked"],
)
def test_equals_the_experts_one_by_one(settings, mask):
    layer = make_experts(**settings)
    x = tokens(*SHAPE)
    if mask is not None:
        x[~mask] = np.nan
    output = call(layer, x, mask=mask, training=True)
    expected, _, share = reference(layer, x, mask)
    assert_close(output, expected, 1e-5)
    np.testing.assert_allclose(layer.routing_statistics["share"], share, atol=1e-6)


def test_balance_loss_leaves_masked_tokens_out():
    layer = make_experts()
    x = tokens(*SHAPE)
    layer(x, mask=ops.convert_to_tensor(MASK))
    (loss,) = layer.losses
    _, expected, _ = reference(layer, x, MASK)
    np.testing.assert_allclose(to_numpy(loss), expected, rtol=1e-5)


def test_every_expert_is_drawn_as_a_network_of_its_own():
    layer = MixtureOfExperts(8, 2, 50)
    layer.build((None, None, 40))
    for projection, axis in ((layer.up_projection, 1), (layer.down_projection, 0)):
        blocks = np.split(to_numpy(projection.kernel.value), 8, axis)
        bound = np.sqrt(6 / 90)  # Glorot's, of [40, 50]
        assert all(0.95 * bound < np.abs(block).max() < bound for block in blocks)
        assert not np.allclose(blocks[0], blocks[1])


@once
def test_lora_and_int8_survive_a_file(tmp_path):
    layer = make_experts(shared_expert=True)
    inputs = keras.Input(SHAPE[1:])
    model = keras.Model(inputs, layer(inputs))
    x = tokens(*SHAPE)
    layer.enable_lora(2)
    model.quantize("int8")
    model.save(tmp_path / "experts.keras")
    loaded = keras.saving.load_model(tmp_path / "experts.keras")
    np.testing.assert_allclose(call(loaded, x), call(model, x), atol=1e-5)
    restored = loaded.layers[-1].shared_expert.down_projection
    assert restored.quantization_mode == "int8" and restored.lora_enabled


def test_rematerialization_changes_nothing():
    x = tokens(*SHAPE)
    expected = call(make_experts(), x, mask=MASK, training=True)
    with keras.RematScope(mode="full"):
        layer = make_experts()
    np.testing.assert_allclose(
        call(layer, x, mask=MASK, training=True), expected, atol=1e-6
    )
    layer(x)
    assert len(layer.losses) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_experts": 0},
        {"experts_per_token": 5},
        {"intermediate_dim": 1.5},
        {"balance_loss_weight": -1},
        {"shared_intermediate_dim": 0},
    ],
    ids=lambda x: next(iter(x)),
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MixtureOfExperts(**{**SIZES, **arguments})
