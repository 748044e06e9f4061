"""Every update rule in the layer, against a transcription of its paper's equation."""

import numpy as np
import pytest

import keras_mom
from benchmarks import recall
from tests.layer_agreement import check_layer, check_outputs
from tests.layer_helpers import (
    BACKEND,
    assert_close,
    bfloat16_product,
    call,
    evaluate,
    make_layer,
    round_to_bfloat16,
    to_bfloat16,
    to_numpy,
    tokens,
    variables_of,
)
from tests.layer_reference import lone_memory, weights_of
from tests.rule_extremes import EXTREMES, apply
from tests.rule_reference import STEPS
from tests.selection import covering

WIDTH = 12
# Options change nothing but what `prepare` computes.
RULES = {
    **{name: name for name in STEPS},
    "gla of rank 3": keras_mom.rules.GLA(rank=3, temperature=2.0),
    "gsa of 5 slots": keras_mom.rules.GSA(num_slots=5, temperature=2.0),
    "hgrn2 with a lower bound": keras_mom.rules.HGRN2(lower_bound=0.7),
    "lightning without slopes": keras_mom.rules.Lightning(slope_scale=0.0),
    "lightning with steep slopes": keras_mom.rules.Lightning(slope_scale=5120.0),
    "delta_net with negative eigenvalues": keras_mom.rules.DeltaNet(
        allow_negative_eigenvalues=True
    ),
    "kda of rank 2": keras_mom.rules.KDA(rank=2),
    "rwkv6 of rank 5": keras_mom.rules.RWKV6(rank=5),
    "rwkv7 of rank 5": keras_mom.rules.RWKV7(rank=5),
    "ttt at a rate of 2": keras_mom.rules.TTT(learning_rate=2.0),
}
each_rule = pytest.mark.parametrize("rule", RULES)
# One of each recurrence, and the two with a scan of their own.
EACH_SCAN = ["gla", "gated_delta_net", "kda", "titans", "rwkv6", "gsa"]


def layer_of(rule, **kwargs):
    return make_layer(update_rule=RULES[rule], return_state=True, **kwargs)


def test_the_transcriptions_cover_every_rule():
    assert set(STEPS) == set(keras_mom.rules.names())


@pytest.mark.parametrize("rule", covering(RULES, EACH_SCAN))
def test_the_layer_follows_the_rule(rule):
    """Output, final state and every gradient, at common gates and at extreme ones."""
    layer = layer_of(rule)
    check_layer(layer, {}, batch=1)
    variables = variables_of(layer)
    values = {name: to_numpy(variable.value) for name, variable in variables.items()}
    for setting in EXTREMES.get(rule, {}).values():
        apply(variables, setting, values)
        check_layer(layer, {}, batch=1, smallest=1e-6)
        apply(variables, {name: (1.0, 0.0) for name in setting}, values)


@pytest.mark.parametrize("name", [name for name in STEPS if name not in EACH_SCAN])
def test_outputs_follow_the_rule(name):
    """On every backend; gradients too, as above, are exhaustive where tests compile."""
    check_outputs(layer_of(name), {}, batch=1, length=20)


@pytest.mark.parametrize("conv_width", covering([None, 1], [None]))
def test_reading_before_the_update_needs_no_convolution(conv_width):
    layer = layer_of("rwkv6", conv_width=conv_width)
    check_layer(layer, company(layer), length=40)


def company(layer):
    """A mask, documents and a first state for 2 rows of 40 tokens."""
    mask = np.random.default_rng(3).random((2, 40)) < 0.8
    ids = np.repeat([[4, 9, 4], [1, 2, 3]], [9, 1, 30], axis=1).astype("int32")
    state = tuple(tokens(*x.shape, seed=7) for x in layer.get_initial_state(2))
    return {"mask": mask, "segment_ids": ids, "initial_state": state}


@pytest.mark.parametrize("name", covering(STEPS, ["gated_delta_net", "kda", "gsa"]))
def test_with_mask_documents_and_state(name):
    """As the equations say, in one piece and in several; causal, each row alone."""
    layer = layer_of(name, per_memory_projections=False)
    inputs, given = tokens(2, 40, WIDTH), company(layer)
    whole = check_outputs(layer, given, length=40)
    state, parts, start = given["initial_state"], [], 0
    for length in (1, 38, 1):
        piece = slice(start, start + length)
        here = {name: given[name][:, piece] for name in ("mask", "segment_ids")}
        part, state = call(layer, inputs[:, piece], initial_state=state, **here)
        parts.append(part)
        start += length
    assert_close((np.concatenate(parts, axis=1), state), whole, 1e-5)

    changed = inputs.copy()
    changed[:, 27:] = 3 * tokens(2, 13, WIDTH, seed=5)
    changed[1] = np.nan
    after, _ = call(layer, changed, **given)
    np.testing.assert_allclose(after[0, :27], whole[0][0, :27], atol=1e-6)
    assert not np.allclose(after[0, 27:], whole[0][0, 27:])


some_names = pytest.mark.parametrize("name", covering(STEPS, ["gated_delta_net"]))


@some_names
def test_the_plain_layer_of_a_rule(name):
    """One memory: no routing, and the sequence goes through the rule as it is."""
    layer = layer_of(name, num_memories=1, top_k=1, shared_memory=False)
    check_layer(layer, {}, length=40)


@some_names
def test_16k_tokens_in_bfloat16(name):
    plain = {"num_memories": 1, "top_k": 1, "shared_memory": False, "num_heads": 1}
    sizes = {"key_dim": 8, "value_dim": 8, "conv_width": None, "width": 8}
    layer = layer_of(name, dtype="mixed_bfloat16", **plain, **sizes)
    round_to_bfloat16(layer)
    inputs = to_bfloat16(tokens(1, 16384, 8))
    outputs, of_inputs, of_weights = evaluate(layer, inputs, tokens(1, 16384, 8))
    weights = weights_of(layer)
    expected, state = lone_memory(
        layer, weights, inputs[0].astype("float64"), product=bfloat16_product
    )
    assert_close((outputs[0][0], outputs[1][0][0, 0]), (expected, state), 5e-3)
    for gradient in (of_inputs, *of_weights.values()):
        assert np.isfinite(gradient).all()


if BACKEND == "torch":
    # `make recall` trains every rule.

    def test_a_trained_layer_recalls():
        name = "gated_delta_net"
        assert recall.train_and_test(name) >= recall.stated_accuracy(name)


def test_every_rule_states_an_accuracy():
    assert set(recall.STATED) == set(STEPS)


@each_rule
def test_configs_keep_the_options(rule):
    layer = layer_of(rule)
    again = keras_mom.MoMLayer.from_config(layer.get_config())
    assert type(again.update_rule) is type(layer.update_rule)
    assert again.get_config() == layer.get_config()
    assert again.update_rule.get_config() == layer.update_rule.get_config()


@pytest.mark.parametrize(
    "make, argument",
    [
        (lambda: keras_mom.rules.GLA(rank=0), "rank"),
        (lambda: keras_mom.rules.GLA(temperature=0), "temperature"),
        (lambda: keras_mom.rules.GSA(num_slots=0), "num_slots"),
        (lambda: keras_mom.rules.GSA(temperature=-1), "temperature"),
        (lambda: keras_mom.rules.KDA(rank=1.5), "rank"),
        (lambda: keras_mom.rules.RWKV6(rank=0), "rank"),
        (lambda: keras_mom.rules.RWKV7(rank=-1), "rank"),
        (lambda: keras_mom.rules.HGRN2(lower_bound=1), "lower_bound"),
        (lambda: keras_mom.rules.Lightning(slope_scale=-1), "slope_scale"),
        (lambda: keras_mom.rules.TTT(learning_rate=2.5), "learning_rate"),
        (lambda: keras_mom.MoMLayer(2, 4, update_rule="gsb"), "update_rule"),
    ],
)
def test_bad_options_are_named(make, argument):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        make()
