"""What Keras asks of a layer, and its wrappers `Bidirectional`, `TimeDistributed`."""

import keras
import numpy as np
import pytest
from keras.src.testing import TestCase

import keras_mom
from tests.layer_helpers import QUICK, assert_close, call, make_layer, tokens

SIZES = {"num_heads": 2, "key_dim": 4, "num_memories": 3}
SHAPE = (2, 5, 8)


def arguments(**changes):
    """Arguments of `run_layer_test`; one loss: the balance loss."""
    return {
        "layer_cls": keras_mom.MoMLayer,
        "init_kwargs": SIZES,
        "input_shape": SHAPE,
        "expected_output_shape": SHAPE,
        # Router, 5 projections, 3 convolutions, norm scale, and the rule's 4.
        "expected_num_trainable_weights": 14,
        # Routing statistics.
        "expected_num_non_trainable_weights": 2,
        "expected_num_seed_generators": 0,
        "expected_num_losses": 1,
        "supports_masking": True,
        **changes,
    }


class ConformanceTest(TestCase):
    def test_defaults(self):
        self.run_layer_test(**arguments())

    def test_no_shared_memory(self):
        settings = {**SIZES, "shared_memory": False, "top_k": 1}
        self.run_layer_test(**arguments(init_kwargs=settings))

    def test_linear_attention_without_extras(self):
        settings = {
            **SIZES,
            "update_rule": "linear_attention",
            "conv_width": None,
            "use_output_gate": False,
            "balance_loss_weight": 0,
            "value_dim": 6,
        }
        self.run_layer_test(
            **arguments(
                init_kwargs=settings,
                # Router, 4 projections and norm scale.
                expected_num_trainable_weights=6,
                expected_num_losses=0,
            )
        )

    def test_return_state(self):
        state = ((2, 4, 2, 4, 4), (2, 4, 3, 24))
        self.run_layer_test(
            **arguments(
                init_kwargs={**SIZES, "return_state": True},
                expected_output_shape=(SHAPE, state),
                # The training check sums one output.
                run_training_check=False,
            )
        )

    def test_last_output(self):
        self.run_layer_test(
            **arguments(
                init_kwargs={**SIZES, "return_sequences": False},
                expected_output_shape=(2, 8),
            )
        )

    def test_mixed_bfloat16(self):
        self.run_layer_test(
            **arguments(
                init_kwargs={**SIZES, "dtype": "mixed_bfloat16"},
                expected_output_dtype="bfloat16",
            )
        )

    def test_bidirectional(self):
        self.run_layer_test(
            **arguments(
                layer_cls=keras.layers.Bidirectional,
                init_kwargs={"layer": keras_mom.MoMLayer(**SIZES, **QUICK)},
                expected_output_shape=(2, 5, 16),
                expected_num_trainable_weights=20,
                expected_num_non_trainable_weights=4,
                expected_num_losses=2,
            )
        )

    def test_time_distributed(self):
        self.run_layer_test(
            **arguments(
                layer_cls=keras.layers.TimeDistributed,
                init_kwargs={"layer": keras_mom.MoMLayer(**SIZES, **QUICK)},
                input_shape=(2, 2, 5, 8),
                expected_output_shape=(2, 2, 5, 8),
                expected_num_trainable_weights=10,
                expected_num_losses=None,
                # The layer inside is float32 whatever the wrapper is: see below.
                run_mixed_precision_check=False,
            )
        )


MASK = np.array([[1, 1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1]], bool)
LENGTH = MASK.shape[1]


def both_directions(**kwargs):
    """A `Bidirectional` layer, and the layers inside."""
    layer = keras.layers.Bidirectional(
        keras_mom.MoMLayer(**SIZES, **kwargs), merge_mode="concat"
    )
    layer.build((2, LENGTH, 8))
    return layer, layer.forward_layer, layer.backward_layer


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_bidirectional_is_a_forward_and_a_reversed_layer(mask):
    layer, forward, backward = both_directions()
    assert not forward.go_backwards and backward.go_backwards
    inputs = tokens(2, LENGTH, 8)
    output = call(layer, inputs, mask=mask)
    # The backward layer's weights in a layer that runs forwards, on flipped inputs.
    plain = keras_mom.MoMLayer(**SIZES)
    plain.build(inputs.shape)
    plain.set_weights(backward.get_weights())
    flipped = None if mask is None else mask[:, ::-1]
    reverse = call(plain, inputs[:, ::-1], mask=flipped)[:, ::-1]
    expected = [call(forward, inputs, mask=mask), reverse]
    assert_close(output, np.concatenate(expected, axis=-1), 1e-6)
    if mask is not None:
        assert not output[~mask].any()


def test_bidirectional_hands_states_out_and_in():
    layer, forward, backward = both_directions(return_state=True)
    inputs = tokens(2, LENGTH, 8)
    output, *states = call(layer, inputs, mask=MASK)
    assert_close(states[0], call(forward, inputs, mask=MASK)[1], 1e-6)
    assert_close(states[1], call(backward, inputs, mask=MASK)[1], 1e-6)
    continued, *_ = call(layer, inputs, mask=MASK, initial_state=states)
    expected = [
        call(forward, inputs, mask=MASK, initial_state=states[0])[0],
        call(backward, inputs, mask=MASK, initial_state=states[1])[0][:, ::-1],
    ]
    assert_close(continued, np.concatenate(expected, axis=-1), 1e-6)
    assert not np.allclose(continued, output)


def test_bidirectional_last_output():
    layer, forward, backward = both_directions(return_sequences=False)
    inputs = tokens(2, LENGTH, 8)
    expected = [call(x, inputs, mask=MASK) for x in (forward, backward)]
    output = call(layer, inputs, mask=MASK)
    assert_close(output, np.concatenate(expected, axis=-1), 1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_time_distributed_runs_the_layer_on_each_slice(masked):
    inner = make_layer(width=8)
    layer = keras.layers.TimeDistributed(inner)
    inputs = tokens(2, 3, LENGTH, 8)
    layer.build(inputs.shape)
    mask = np.random.default_rng(0).random((2, 3, LENGTH)) < 0.7 if masked else None
    output = call(layer, inputs, mask=mask)
    for i in range(3):
        part = None if mask is None else mask[:, i]
        assert_close(output[:, i], call(inner, inputs[:, i], mask=part), 1e-6)


def test_time_distributed_in_mixed_precision():
    inner = keras_mom.MoMLayer(**SIZES, dtype="mixed_float16")
    layer = keras.layers.TimeDistributed(inner, dtype="mixed_float16")
    inputs = tokens(2, 3, LENGTH, 8)
    output = layer(inputs)
    spec = layer.compute_output_spec(keras.KerasTensor(inputs.shape))
    assert keras.backend.standardize_dtype(output.dtype) == spec.dtype == "float16"
    assert all(v.dtype == "float32" for v in layer.weights)
