"""What published implementations get wrong, and `MoMLayer` must not.

The first eight tests are of defects shown on the `MomAttention` of
flash-linear-attention 0.6 and the paper's authors' repository, the last two of defects
of KerasHub's Qwen3.5 gated delta net.
"""

import functools

import keras
import numpy as np
import pytest

from tests.layer_helpers import (
    assert_close,
    call,
    evaluate,
    make_layer,
    relative_rms,
    tokens,
)
from tests.layer_reference import mom_layer, weights_of
from tests.selection import covering

BATCH, LENGTH, WIDTH = 2, 40, 12


@functools.cache
def default_layer():
    return make_layer(return_state=True)


def empty_state(layer, batch=BATCH):
    return tuple(np.zeros(x.shape, "float32") for x in layer.get_initial_state(batch))


def test_defect_1_convolution_does_not_cross_segments_in_training():
    """The last token moves no earlier output, row 0 does not move row 1."""
    layer = default_layer()
    inputs = tokens(BATCH, LENGTH, WIDTH)
    before, _ = call(layer, inputs, training=True)

    last = inputs.copy()
    last[:, -1] += 5
    after, _ = call(layer, last, training=True)
    np.testing.assert_allclose(after[:, :-1], before[:, :-1], atol=1e-6)

    row = inputs.copy()
    row[0] += 5
    after, _ = call(layer, row, training=True)
    np.testing.assert_allclose(after[1], before[1], atol=1e-6)

    inference, _ = call(layer, inputs, training=False)
    np.testing.assert_allclose(inference, before, atol=1e-6)


def test_defect_2_time_order_inside_a_memory_is_kept():
    """Equal sort keys, that is a memory that takes hundreds of tokens, keep order."""
    layer = make_layer(num_memories=2, top_k=1, conv_width=2, return_state=True)
    layer.router.kernel.assign(np.zeros((WIDTH, 2), "float32"))
    inputs = tokens(1, 300, WIDTH)
    expected = mom_layer(layer, weights_of(layer), inputs.astype("float64"))
    assert_close(call(layer, inputs), expected, 1e-5)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_defect_3_a_confident_token_does_not_disappear(dtype):
    """A weight that rounds to 0 or 1 in half precision shifts no token behind it."""
    layer = make_layer(dtype=dtype)
    kernel = np.zeros((WIDTH, 4), "float32")
    kernel[0] = [30.0, 0.0, -30.0, -60.0]
    layer.router.kernel.assign(kernel)
    inputs = 0.1 * tokens(BATCH, LENGTH, WIDTH)
    inputs[:, ::5, 0] = 1.0
    weights, indices = layer.route(inputs)
    weights = keras.ops.convert_to_numpy(weights)
    assert str(weights.dtype) == "float32"
    assert (keras.ops.convert_to_numpy(indices)[:, ::5] == [0, 1]).all()
    assert (weights[:, ::5, 0] > 0.999999).all()
    expected, _ = mom_layer(layer, weights_of(layer), inputs.astype("float64"))
    # A token that is missing, or in another's place, is an error of the scale itself.
    assert relative_rms(call(layer, inputs), expected) < 0.03


def test_defect_4_prefill_in_pieces_equals_prefill_at_once():
    layer = default_layer()
    inputs = tokens(BATCH, LENGTH, WIDTH)
    whole, last = call(layer, inputs, initial_state=empty_state(layer))
    state, pieces = empty_state(layer), []
    for start, end in ((0, 17), (17, 19), (19, 20), (20, 37), (37, 39), (39, 40)):
        piece, state = call(layer, inputs[:, start:end], initial_state=state)
        pieces.append(piece)
    assert_close((np.concatenate(pieces, axis=1), state), (whole, last), 1e-5)


def test_defect_5_a_step_may_leave_memories_and_rows_unused():
    """No count of active memories is assumed in a step of generation."""
    layer = default_layer()
    inputs = tokens(BATCH, 1, WIDTH)
    state = tuple(tokens(*x.shape) for x in empty_state(layer))
    mask = np.array([[True], [False]])
    output, (memories, windows) = call(layer, inputs, initial_state=state, mask=mask)
    used = set(keras.ops.convert_to_numpy(layer.route(inputs)[1])[0, 0].tolist())
    for memory in range(4):
        changed = not np.array_equal(memories[0, memory], state[0][0, memory])
        assert changed == (memory in used)
    np.testing.assert_array_equal(memories[1], state[0][1])
    np.testing.assert_array_equal(windows[1], state[1][1])
    assert not output[1].any()


def test_defect_6_the_state_is_not_changed_in_place():
    layer = default_layer()
    state = tuple(keras.ops.convert_to_tensor(x) for x in empty_state(layer))
    first = layer(tokens(BATCH, 1, WIDTH), initial_state=state)
    again = layer(tokens(BATCH, 1, WIDTH), initial_state=state)
    for x in state:
        assert not keras.ops.convert_to_numpy(x).any()
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(first[0]), keras.ops.convert_to_numpy(again[0])
    )


@pytest.mark.parametrize("memories", covering([4, 8], [8]))
def test_defect_7_a_decode_step_reads_nothing_from_the_device(memories, monkeypatch):
    """No tensor becomes a Python value, whatever the number of rows and memories.

    `test_no_host_reads.py` looks at every operation of training and inference.
    """
    layer = make_layer(num_memories=memories, return_state=True)
    state = layer.get_initial_state(memories)
    inputs = keras.ops.convert_to_tensor(tokens(memories, 1, WIDTH))
    reads = []
    kind = type(inputs)
    for name in ("__bool__", "__int__", "__float__", "__index__", "__array__"):
        original = getattr(kind, name)

        def spy(self, *args, _name=name, _original=original, **kwargs):
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, spy)
    layer(inputs, initial_state=state)
    assert not reads


@pytest.mark.parametrize("shared_memory", [False, True])
def test_defect_8_the_layer_works_without_the_convolution(shared_memory):
    layer = make_layer(conv_width=None, shared_memory=shared_memory, return_state=True)
    inputs = tokens(BATCH, LENGTH, WIDTH)
    expected = mom_layer(layer, weights_of(layer), inputs.astype("float64"))
    assert_close(call(layer, inputs), expected, 1e-5)


def test_defect_8_the_layer_works_beside_softmax_attention():
    """A hybrid model, in which a layer of another kind sits between two of these."""
    inputs = keras.Input((None, WIDTH))
    x = inputs + make_layer()(inputs)
    x = x + keras.layers.MultiHeadAttention(2, 6)(x, x, use_causal_mask=True)
    model = keras.Model(inputs, x + make_layer(seed=1)(x))
    batch = tokens(BATCH, LENGTH, WIDTH)
    before = keras.ops.convert_to_numpy(model(batch))
    batch[:, 30:] += 1
    after = keras.ops.convert_to_numpy(model(batch))
    np.testing.assert_allclose(after[:, :30], before[:, :30], atol=1e-5)


def test_qwen_defect_right_padding_does_not_fade_the_state():
    """Neither x nor the decay of a padding token reaches the memories."""
    layer = default_layer()
    inputs = tokens(BATCH, LENGTH, WIDTH)
    mask = np.arange(LENGTH) < 20
    mask = np.stack([mask, np.ones_like(mask)])
    output, padded = call(layer, inputs, mask=mask)
    expected, state = call(layer, inputs[:, :20])
    assert_close(output[0, :20], expected[0], 1e-5)
    assert_close(tuple(x[0] for x in padded), tuple(x[0] for x in state), 1e-5)
    _, of_inputs, _ = evaluate(layer, inputs, np.ones_like(inputs), mask=mask)
    assert not of_inputs[0, 20:].any()


def test_qwen_defect_generation_feeds_the_last_prompt_token_once():
    """`prompt[:-1]`, then the last token, is the full forward pass."""
    layer = default_layer()
    prompt = tokens(BATCH, 20, WIDTH)
    output, state = call(layer, prompt)
    _, before = call(layer, prompt[:, :-1])
    last, after = call(layer, prompt[:, -1:], initial_state=before)
    assert_close((last[:, 0], after), (output[:, -1], state), 1e-5)
    # And the state does remember a token that is fed twice.
    _, twice = call(layer, prompt[:, -1:], initial_state=after)
    assert relative_rms(twice[0], state[0]) > 1e-2
