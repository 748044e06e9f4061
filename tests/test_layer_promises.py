"""The promises of `MoMLayer`: causality, independence, splits, masks, documents."""

import functools
import importlib

import keras
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.layer_helpers import (
    assert_close,
    call,
    evaluate,
    make_layer,
    relative_rms,
    set_weights,
    tokens,
)
from tests.layer_reference import mom_layer, weights_of
from tests.selection import covering

BATCH, LENGTH, WIDTH = 3, 20, 12
VARIANTS = {
    "defaults": {},
    "additive": {
        "update_rule": "linear_attention",
        "shared_memory": False,
        "per_memory_projections": False,
    },
    "no_convolution": {"conv_width": None, "top_k": 1},
}
some = settings(max_examples=15, deadline=None, derandomize=True)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Chunks of 8 rows, so that short sequences cross many of their borders."""
    patch = pytest.MonkeyPatch()
    module = importlib.import_module("keras_mom.ops.memory_scan")
    patch.setattr(module, "CHUNK_SIZE", 8)
    yield
    patch.undo()


@functools.cache
def layer_of(variant="defaults"):
    return make_layer(return_state=True, **VARIANTS[variant])


def state_of(layer, batch=BATCH, seed=5):
    shapes = [x.shape for x in layer.get_initial_state(batch)]
    return tuple(tokens(*shape, seed=seed) for shape in shapes)


def empty_state(layer, batch=BATCH):
    shapes = [x.shape for x in layer.get_initial_state(batch)]
    return tuple(np.zeros(shape, "float32") for shape in shapes)


def assert_same(actual, expected):
    """Equal up to the last bit or two of float32."""
    keras.tree.map_structure(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6),
        actual,
        expected,
    )


# Causality.


@pytest.mark.parametrize("training", covering([False, True], [True]))
@each_variant
def test_later_tokens_change_no_earlier_output(variant, training):
    layer = layer_of(variant)
    inputs = tokens(BATCH, LENGTH, WIDTH)
    before, _ = call(layer, inputs, training=training)
    for t in (1, 2, 7, 8, 9, 16, LENGTH - 1):
        changed = inputs.copy()
        changed[:, t:] = 3 * tokens(BATCH, LENGTH - t, WIDTH, seed=t)
        after, _ = call(layer, changed, training=training)
        assert_same(after[:, :t], before[:, :t])
        assert relative_rms(after[:, t:], before[:, t:]) > 0.1


@each_variant
def test_gradients_of_earlier_outputs_do_not_reach_later_tokens(variant):
    cotangent = tokens(BATCH, LENGTH, WIDTH)
    for t in (1, 8, 13):
        early = cotangent.copy()
        early[:, t:] = 0
        _, of_inputs, _ = evaluate(
            layer_of(variant), tokens(BATCH, LENGTH, WIDTH), early
        )
        assert not of_inputs[:, t:].any()
        assert of_inputs[:, :t].any(axis=-1).all()


@each_variant
def test_training_and_inference_give_the_same_outputs(variant):
    inputs = tokens(BATCH, LENGTH, WIDTH)
    layer = layer_of(variant)
    assert_same(call(layer, inputs, training=True), call(layer, inputs))


# Independence of batch rows.


@each_variant
def test_a_batch_row_does_not_see_the_others(variant):
    layer = layer_of(variant)
    inputs = tokens(BATCH, LENGTH, WIDTH)
    before = call(layer, inputs, training=True)
    for row in range(BATCH):
        changed = inputs.copy()
        changed[row] = 3 * tokens(LENGTH, WIDTH, seed=9)
        after = call(layer, changed, training=True)
        pairs = zip(keras.tree.flatten(after), keras.tree.flatten(before))
        for x, y in pairs:
            assert_same(np.delete(x, row, axis=0), np.delete(y, row, axis=0))
        assert relative_rms(after[0][row], before[0][row]) > 0.1


def test_a_row_in_a_batch_equals_the_row_alone():
    layer = layer_of()
    inputs = tokens(BATCH, LENGTH, WIDTH)
    together = call(layer, inputs)
    for row in range(BATCH):
        alone = call(layer, inputs[row : row + 1])
        expected = keras.tree.map_structure(lambda x, i=row: x[i : i + 1], together)
        assert_same(alone, expected)


@each_variant
def test_gradients_of_a_row_do_not_reach_the_others(variant):
    cotangent = tokens(BATCH, LENGTH, WIDTH)
    cotangent[[0, 2]] = 0
    _, of_inputs, _ = evaluate(
        layer_of(variant), tokens(BATCH, LENGTH, WIDTH), cotangent
    )
    assert not of_inputs[[0, 2]].any()
    assert of_inputs[1].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@each_variant
def test_a_row_that_is_not_a_number_stays_alone(variant, bad):
    """In outputs, in states, and in the gradients of the other rows' outputs."""
    layer = layer_of(variant)
    inputs, cotangent = tokens(BATCH, LENGTH, WIDTH), tokens(BATCH, LENGTH, WIDTH)
    cotangent[1] = 0
    before, grads_before, _ = evaluate(layer, inputs, cotangent)
    inputs[1, 6, 3] = bad
    after, grads_after, _ = evaluate(layer, inputs, cotangent)
    for row in (0, 2):
        pick = functools.partial(keras.tree.map_structure, lambda x, i=row: x[i])
        assert_same(pick(after), pick(before))
        assert_same(grads_after[row], grads_before[row])
    assert not np.isfinite(after[0][1, 6:]).all()


# Splits.


def run_in_pieces(layer, pieces, inputs, state, mask=None):
    outputs, start = [], 0
    for piece in pieces:
        part = slice(start, start + piece)
        given = {} if mask is None else {"mask": mask[:, part]}
        output, state = call(layer, inputs[:, part], initial_state=state, **given)
        outputs.append(output)
        start += piece
    return np.concatenate(outputs, axis=1), state


@st.composite
def splits(draw):
    """Compositions of LENGTH from few sizes: each size is compiled once."""
    pieces = []
    while (left := LENGTH - sum(pieces)) > 0:
        pieces.append(draw(st.sampled_from([n for n in (1, 2, 8, 13) if n <= left])))
    return pieces


masks = st.lists(st.booleans(), min_size=BATCH * LENGTH, max_size=BATCH * LENGTH).map(
    lambda bits: np.reshape(bits, (BATCH, LENGTH))
)


@some
@given(pieces=splits(), mask=masks, seed=st.integers(0, 99))
@example(pieces=[1] * LENGTH, mask=np.ones((BATCH, LENGTH), bool), seed=1)
@example(pieces=[13, 1, 1, 2, 2, 1], mask=np.ones((BATCH, LENGTH), bool), seed=1)
@example(pieces=[8, 8, 2, 2], mask=np.zeros((BATCH, LENGTH), bool), seed=1)
def test_any_split_equals_the_whole(pieces, mask, seed):
    layer = layer_of()
    inputs, state = tokens(BATCH, LENGTH, WIDTH, seed=seed), state_of(layer)
    whole = call(layer, inputs, initial_state=state, mask=mask)
    assert_close(run_in_pieces(layer, pieces, inputs, state, mask), whole, 1e-5)


@pytest.mark.parametrize("variant", ["additive", "no_convolution"])
def test_single_tokens_equal_the_whole(variant):
    layer = layer_of(variant)
    inputs, state = tokens(BATCH, LENGTH, WIDTH), empty_state(layer)
    whole = call(layer, inputs)
    assert_close(run_in_pieces(layer, [1] * LENGTH, inputs, state), whole, 1e-5)


def test_a_split_inside_a_document_equals_the_whole():
    layer = layer_of()
    inputs, state = tokens(BATCH, LENGTH, WIDTH), state_of(layer)
    ids = np.repeat([[0, 1, 0], [2, 2, 2], [1, 2, 3]], [6, 9, 5], axis=1)
    whole = call(layer, inputs, segment_ids=ids, initial_state=state)
    half = LENGTH // 2
    first, state = call(
        layer, inputs[:, :half], segment_ids=ids[:, :half], initial_state=state
    )
    second, state = call(
        layer, inputs[:, half:], segment_ids=ids[:, half:], initial_state=state
    )
    assert_close((np.concatenate([first, second], axis=1), state), whole, 1e-5)


@pytest.mark.parametrize("length", covering([1, LENGTH], [1]))
def test_the_state_passed_in_is_never_changed(length):
    layer = layer_of()
    inputs = keras.ops.convert_to_tensor(tokens(BATCH, length, WIDTH))
    arrays = state_of(layer)
    for state in (arrays, tuple(keras.ops.convert_to_tensor(x) for x in arrays)):
        before = [np.array(keras.ops.convert_to_numpy(x)) for x in state]
        _, after = layer(inputs, initial_state=state)
        assert_same([keras.ops.convert_to_numpy(x) for x in state], before)
        assert not np.allclose(keras.ops.convert_to_numpy(after[0]), before[0])


def test_the_size_of_the_state_does_not_depend_on_the_length():
    layer = layer_of()
    shapes = [x.shape for x in empty_state(layer)]
    assert shapes == [(BATCH, 5, 2, 6, 10), (BATCH, 5, 3, 44)]
    for length in (1, 2, LENGTH):
        _, state = call(layer, tokens(BATCH, length, WIDTH))
        assert [x.shape for x in state] == shapes
        assert all(x.dtype == "float32" for x in state)


# Masks.

PLACES = {
    "left": [0, 1, 2, 3, 4, 5, 6],
    "right": [13, 14, 15, 16, 17, 18, 19],
    "middle": [5, 6, 7, 8, 9, 15, 16],
}


def check_mask(layer, mask):
    """A masked call against one on the valid tokens alone."""
    inputs, state = tokens(BATCH, LENGTH, WIDTH), state_of(layer)
    inputs[~mask] = 1e6
    output, after = call(layer, inputs, mask=mask, initial_state=state)
    compact = np.stack([x[m] for x, m in zip(inputs, mask)])
    expected, expected_state = call(layer, compact, initial_state=state)
    assert not output[~mask].any()
    assert_close(output[mask].reshape(expected.shape), expected, 1e-5)
    assert_close(after, expected_state, 1e-5)


@pytest.mark.parametrize("place", PLACES)
@each_variant
def test_masked_tokens_change_nothing(variant, place):
    mask = np.ones((BATCH, LENGTH), bool)
    mask[:, PLACES[place]] = False
    check_mask(layer_of(variant), mask)


@some
@given(order=st.lists(st.permutations(range(LENGTH)), min_size=BATCH, max_size=BATCH))
def test_any_mask_equals_the_valid_tokens_alone(order):
    # 13 valid tokens a row, so that the compacted sequences have one shape.
    check_mask(layer_of(), np.array(order) < 13)


def test_a_row_without_valid_tokens_keeps_its_state():
    layer = layer_of()
    state = state_of(layer)
    for length in (1, LENGTH):
        mask = np.ones((BATCH, length), bool)
        mask[1] = False
        output, after = call(
            layer, tokens(BATCH, length, WIDTH), mask=mask, initial_state=state
        )
        assert not output[1].any()
        for x, y in zip(after, state):
            np.testing.assert_array_equal(x[1], y[1])
            assert not np.allclose(x[0], y[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_a_masked_token_holds_does_not_matter(bad):
    layer = layer_of()
    inputs, cotangent = tokens(BATCH, LENGTH, WIDTH), tokens(BATCH, LENGTH, WIDTH)
    mask = np.random.default_rng(2).random((BATCH, LENGTH)) < 0.7
    given = {"mask": mask, "initial_state": state_of(layer)}
    before = evaluate(layer, inputs, cotangent, **given)
    inputs[~mask] = bad
    after = evaluate(layer, inputs, cotangent, **given)
    assert_same(after, before)
    assert not after[1][~mask].any()
    single = call(layer, inputs[:, :1], mask=mask[:, :1])
    assert all(np.isfinite(x).all() for x in keras.tree.flatten(single))


# Documents.


def test_documents_equal_calls_of_their_own():
    """Documents of 2 tokens are shorter than the convolution; an id comes back."""
    layer = layer_of()
    lengths, names = [2, 2, 8, 8], [7, 3, 7, 0]
    inputs = tokens(BATCH, LENGTH, WIDTH)
    ids = np.tile(np.repeat(names, lengths), (BATCH, 1))
    output, state = call(layer, inputs, segment_ids=ids)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        start += length
        alone, last = call(layer, inputs[:, part], initial_state=empty_state(layer))
        assert_close(output[:, part], alone, 1e-5)
    assert_close(state, last, 1e-5)


@each_variant
def test_a_document_does_not_see_those_before_it(variant):
    layer = layer_of(variant)
    ids = np.repeat([[1, 2, 1], [3, 4, 5], [0, 9, 0]], [6, 5, 9], axis=1)
    inputs = tokens(BATCH, LENGTH, WIDTH)
    before = call(layer, inputs, segment_ids=ids)
    changed = inputs.copy()
    changed[:, :11] = 3 * tokens(BATCH, 11, WIDTH, seed=4)
    after = call(layer, changed, segment_ids=ids)
    assert_same(after[0][:, 11:], before[0][:, 11:])
    assert_same(after[1], before[1])
    assert relative_rms(after[0][:, :11], before[0][:, :11]) > 0.1


def test_gradients_stay_in_their_document():
    layer = layer_of()
    ids = np.repeat([[1, 2, 1]], [6, 5, 9], axis=1).repeat(BATCH, axis=0)
    cotangent = tokens(BATCH, LENGTH, WIDTH)
    cotangent[:, :6] = cotangent[:, 11:] = 0
    _, of_inputs, _ = evaluate(
        layer, tokens(BATCH, LENGTH, WIDTH), cotangent, segment_ids=ids
    )
    assert not of_inputs[:, :6].any()
    assert not of_inputs[:, 11:].any()
    assert of_inputs[:, 6:11].any(axis=-1).all()


def test_masked_tokens_begin_no_document():
    layer = layer_of()
    inputs = tokens(BATCH, LENGTH, WIDTH)
    mask = np.ones((BATCH, LENGTH), bool)
    mask[:, [0, 1, 7, 8, 19]] = False
    ids = np.repeat([[4, 6]], [12, 8], axis=1).repeat(BATCH, axis=0)
    before = call(layer, inputs, mask=mask, segment_ids=ids)
    ids[:, [0, 1, 7, 8, 19]] = [9, 4, 6, 0, 5]
    assert_same(call(layer, inputs, mask=mask, segment_ids=ids), before)


@pytest.mark.parametrize("variant", ["defaults", "no_convolution"])
def test_the_state_describes_the_last_document(variant):
    layer = layer_of(variant)
    inputs, state = tokens(BATCH, LENGTH, WIDTH), state_of(layer)
    last = LENGTH - 1
    ids = np.zeros((BATCH, LENGTH), "int32")
    ids[:, last] = 1
    indices = np.array(keras.ops.convert_to_numpy(layer.route(inputs)[1]))[:, last]
    _, after = call(layer, inputs, segment_ids=ids, initial_state=state)
    for row in range(BATCH):
        touched = {*indices[row].tolist()}
        if layer.shared_memory:
            touched.add(layer.num_memories)
        for memory in range(layer.num_memories + layer.shared_memory):
            assert after[0][row, memory].any() == (memory in touched)
            if layer.conv_width is not None:
                window = after[1][row, memory]
                assert not window[:-1].any()
                assert window[-1].any() == (memory in touched)


# All at once, against the reference.


@some
@given(
    mask=masks,
    ids=st.lists(st.integers(0, 2), min_size=BATCH * 10, max_size=BATCH * 10),
    router_scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_any_routing_mask_and_documents(mask, ids, router_scale, seed):
    """Router scales: all ties, an even routing, and near one-hot probabilities."""
    layer = layer_of()
    ids = np.repeat(np.reshape(ids, (BATCH, 10)), 2, axis=1)
    set_weights(layer, seed)
    layer.router.kernel.assign(router_scale * layer.router.kernel)
    try:
        inputs = tokens(BATCH, LENGTH, WIDTH, seed=seed)
        given = {"mask": mask, "segment_ids": ids, "initial_state": state_of(layer)}
        # Probabilities of 1e-50 are ties in float32, but not in float64.
        indices = keras.ops.convert_to_numpy(layer.route(inputs)[1])
        expected = mom_layer(
            layer,
            weights_of(layer),
            inputs.astype("float64"),
            indices=indices,
            **given,
        )
        assert_close(call(layer, inputs, **given), expected, 1e-5)
    finally:
        set_weights(layer)


def test_ties_go_to_the_lowest_memory():
    layer = layer_of()
    kernel = np.array(keras.ops.convert_to_numpy(layer.router.kernel.value))
    try:
        layer.router.kernel.assign(np.zeros_like(kernel))
        weights, indices = layer.route(tokens(BATCH, LENGTH, WIDTH))
    finally:
        layer.router.kernel.assign(kernel)
    assert (keras.ops.convert_to_numpy(indices) == [0, 1]).all()
    assert (keras.ops.convert_to_numpy(weights) == 0.5).all()


# Long sequences.


@pytest.mark.parametrize(
    "rule", covering(["gated_delta_net", "linear_attention"], ["gated_delta_net"])
)
def test_64k_tokens_stay_finite(rule, monkeypatch):
    """One head forgets by exp(-20) and more a step, and one forgets nothing."""
    module = importlib.import_module("keras_mom.ops.memory_scan")
    monkeypatch.setattr(module, "CHUNK_SIZE", 64)
    layer = make_layer(
        width=8,
        key_dim=4,
        value_dim=4,
        num_memories=2,
        top_k=1,
        update_rule=rule,
        return_state=True,
    )
    if rule == "gated_delta_net":
        layer.update_rule.a_log.assign([3.0, -100.0])
        layer.update_rule.dt_bias.assign([2.0, 0.0])
    inputs = tokens(1, 2**16, 8)
    outputs = evaluate(layer, inputs, tokens(1, 2**16, 8, seed=2))
    for tensor in keras.tree.flatten(outputs):
        assert np.isfinite(tensor).all()
    assert np.abs(outputs[0][0]).max() < 1e3
