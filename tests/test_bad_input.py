"""Bad arguments: errors that name the argument, what came and what was expected."""

import keras
import numpy as np
import pytest

import keras_mom
from tests.layer_helpers import BACKEND, make_layer, tokens

INPUTS = tokens(2, 6, 12)
SIZES = {"num_heads": 2, "key_dim": 4}


def build(**kwargs):
    return keras_mom.MoMLayer(**{**SIZES, **kwargs})


# The constructor.


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "4"])
@pytest.mark.parametrize(
    "name",
    ["num_heads", "key_dim", "value_dim", "num_memories", "top_k", "conv_width"],
)
def test_sizes(name, bad):
    message = rf"`{name}` must be a positive integer. Received: {bad!r}"
    with pytest.raises(ValueError, match=message):
        build(**{name: bad})


def test_top_k_above_num_memories():
    message = (
        "`top_k` must not exceed `num_memories`. Received: top_k=5, num_memories=4"
    )
    with pytest.raises(ValueError, match=message):
        build(top_k=5)
    with pytest.raises(ValueError, match="`top_k` must not exceed `num_memories`"):
        build(num_memories=1)


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_balance_loss_weight(bad):
    message = f"`balance_loss_weight` must be 0 or more. Received: .*{bad}"
    with pytest.raises(ValueError, match=message):
        build(balance_loss_weight=bad)


@pytest.mark.parametrize("bad", [0, -1e-6, float("nan")])
def test_norm_epsilon(bad):
    message = f"`norm_epsilon` must be positive. Received: .*{bad}"
    with pytest.raises(ValueError, match=message):
        build(norm_epsilon=bad)


@pytest.mark.parametrize("bad", ["delta", 3, None])
def test_unknown_rule(bad):
    message = rf"`update_rule` must be one of .*gated_delta_net.*Received: .*{bad!r}"
    with pytest.raises(ValueError, match=message):
        build(update_rule=bad)


def test_a_config_that_is_no_rule():
    config = keras.saving.serialize_keras_object(keras.layers.Dense(3))
    with pytest.raises(ValueError, match="`update_rule` must be .* MemoryUpdateRule"):
        build(update_rule=config)


def test_unknown_implementation():
    message = "`implementation` must be None or one of .*portable.*Received: .*'cuda'"
    with pytest.raises(ValueError, match=message):
        build(implementation="cuda")
    with pytest.raises(ValueError, match=message):
        keras_mom.config.set_implementation("cuda")


@pytest.mark.parametrize("length", [1, 6])
def test_an_implementation_that_does_not_exist_here(length):
    name = "triton" if BACKEND == "jax" else "pallas"
    layer = make_layer(implementation=name)
    with pytest.raises(NotImplementedError, match=f"implementation='{name}'.*portable"):
        layer(INPUTS[:, :length])


@pytest.mark.parametrize("length", [1, 6])
def test_an_implementation_by_name(length):
    fastest = "xla" if BACKEND == "tensorflow" else "portable"
    output = make_layer(implementation=fastest)(INPUTS[:, :length])
    expected = make_layer()(INPUTS[:, :length])
    portable = make_layer(implementation="portable")(INPUTS[:, :length])
    output, expected, portable = map(
        keras.ops.convert_to_numpy, (output, expected, portable)
    )
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_allclose(portable, expected, atol=1e-5)


# The inputs.


@pytest.mark.parametrize("shape", [(6, 12), (2, 3, 6, 12), (12,)])
def test_rank(shape):
    with pytest.raises(ValueError, match="expected ndim=3, found ndim="):
        make_layer()(np.zeros(shape, "float32"))
    with pytest.raises(ValueError, match="expected ndim=3, found ndim="):
        make_layer()(keras.Input(batch_shape=shape))
    with pytest.raises(ValueError, match=r"`inputs` must have shape \[B, T, D\]"):
        make_layer().route(np.zeros(shape, "float32"))


def test_rank_at_the_first_call():
    with pytest.raises(ValueError, match="expected ndim=3, found ndim=2"):
        build()(np.zeros((6, 12), "float32"))


def test_width():
    with pytest.raises(ValueError, match=r"axis -1 .* value 12, .*6, 13\)"):
        make_layer()(np.zeros((2, 6, 13), "float32"))
    with pytest.raises(ValueError, match=r"axis -1 .* value 12, .*6, 13\)"):
        make_layer()(keras.Input((6, 13)))


def test_last_axis_unknown():
    message = r"last axis of `inputs` must be known. Received: shape .*None, 6, None"
    with pytest.raises(ValueError, match=message):
        build()(keras.Input((6, None)))


@pytest.mark.parametrize("shape", [(2, 5), (3, 6), (2, 6, 1), (6,), (2, 6, 12)])
@pytest.mark.parametrize("name", ["mask", "segment_ids"])
def test_shape_of_mask_and_segment_ids(name, shape):
    message = rf"`{name}` must have shape \[B, T\] = \[2, 6\].*\[{shape[0]},? ?"
    given = {name: np.ones(shape, "int32")}
    with pytest.raises(ValueError, match=message):
        make_layer()(INPUTS, **given)
    with pytest.raises(ValueError, match=f"`{name}` must have shape"):
        symbolic = keras.Input(batch_shape=shape, dtype="int32")
        make_layer()(keras.Input(batch_shape=(2, 6, 12)), **{name: symbolic})


def test_shape_of_the_mask_of_route():
    with pytest.raises(ValueError, match=r"`mask` must have shape \[B, T\] = \[2, 6\]"):
        make_layer().route(INPUTS, mask=np.ones((2, 5), bool))


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_dtype_of_segment_ids(dtype):
    message = f"`segment_ids` must be of an integer dtype. Received: dtype .*{dtype}"
    with pytest.raises(ValueError, match=message):
        make_layer()(INPUTS, segment_ids=np.ones((2, 6), dtype))
    with pytest.raises(ValueError, match=message):
        symbolic = keras.Input((6,), dtype=dtype)
        make_layer()(keras.Input((6, 12)), segment_ids=symbolic)


# The state.


def states(layer):
    """States of which one thing is wrong, by what is wrong."""
    memories, windows = (
        np.array(keras.ops.convert_to_numpy(x)) for x in layer.get_initial_state(2)
    )
    return {
        "batch": ((memories[:1], windows), r"memories .*\[2, 5, 2, 6, 10\].*\[1, 5"),
        "batch of windows": ((memories, windows[:1]), r"windows .*\[2, 5, 3, 44\]"),
        "memories": ((memories[:, :4], windows), r"memories .*Received: shape \[2, 4"),
        "heads": ((memories[:, :, :1], windows), r"memories .*shape \[2, 5, 1, 6, 10"),
        "rank": ((memories[0], windows), r"memories .*shape \[5, 2, 6, 10"),
        "window": ((memories, windows[:, :, 1:]), r"windows .*shape \[2, 5, 2, 44"),
        "float64": ((memories.astype("float64"), windows), "memories .*float32.*64"),
        "float16": ((memories, windows.astype("float16")), "windows .*float32.*16"),
        "integer": ((memories.astype("int32"), windows), "memories .*float32.*int32"),
        "short": ((memories,), "tuple of 2 tensors.*Received: 1"),
        "long": ((memories, windows, windows), "tuple of 2 tensors.*Received: 3"),
        "no tuple": (memories, "tuple of 2 tensors.*Received: <class"),
    }


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize(
    "wrong",
    [
        "batch",
        "batch of windows",
        "memories",
        "heads",
        "rank",
        "window",
        "float16",
        "integer",
        "short",
        "long",
        "no tuple",
        # JAX has no float64 unless told so: the array arrives as float32.
        *(["float64"] if BACKEND != "jax" else []),
    ],
)
def test_state(wrong, length):
    layer = make_layer()
    state, message = states(layer)[wrong]
    with pytest.raises(ValueError, match=f"`initial_state`.*{message}|{message}"):
        layer(INPUTS[:, :length], initial_state=state)


@pytest.mark.parametrize("wrong", ["memories", "window", "float16", "short"])
def test_symbolic_state(wrong):
    layer = make_layer()
    state, message = states(layer)[wrong]
    state = tuple(keras.Input(batch_shape=x.shape, dtype=x.dtype) for x in state)
    with pytest.raises(ValueError, match=message):
        layer(keras.Input(batch_shape=(2, 6, 12)), initial_state=state)


def test_state_of_a_layer_without_convolution():
    layer = make_layer(conv_width=None)
    state = make_layer().get_initial_state(2)
    with pytest.raises(ValueError, match="`initial_state` must be a tuple of 1 tensor"):
        layer(INPUTS, initial_state=state)


# Stateful layers.


def test_stateful_without_a_batch_size():
    with pytest.raises(ValueError, match="`stateful=True` needs .* fixed batch size"):
        build(stateful=True)(keras.Input((6, 12)))


def test_stateful_with_another_batch_size():
    layer = make_layer(stateful=True, batch=2)
    with pytest.raises(ValueError, match=r"axis 0 .* value 2, .*\(3, 6, 12\)"):
        layer(np.zeros((3, 6, 12), "float32"))


# Compiled calls raise the same errors.


def test_errors_while_tracing():
    layer = make_layer()
    bad = {"segment_ids": np.ones((2, 5), "int32")}
    if BACKEND == "jax":
        import jax

        function = jax.jit(lambda x, ids: layer(x, segment_ids=ids))
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        function = tf.function(lambda x, ids: layer(x, segment_ids=ids))
    else:

        def function(x, ids):
            return layer(x, segment_ids=ids)

    with pytest.raises(ValueError, match="`segment_ids` must have shape"):
        function(INPUTS, bad["segment_ids"])


# LoRA and quantization.


def test_lora_before_building():
    with pytest.raises(ValueError, match="LoRA on a layer that isn't yet built"):
        build().enable_lora(2)


def test_lora_twice():
    layer = make_layer()
    layer.enable_lora(2)
    with pytest.raises(ValueError, match="(?i)lora is already enabled"):
        layer.enable_lora(2)


def test_unknown_quantization_mode():
    with pytest.raises(ValueError, match="int3"):
        make_layer().quantize("int3")


def test_a_rule_serves_one_layer():
    rule = keras_mom.rules.LinearAttention()
    rule.bind(1, 2, 2, 1, kernel_initializer="zeros")
    with pytest.raises(ValueError, match="LinearAttention serves a layer already"):
        rule.bind(1, 2, 2, 1, kernel_initializer="zeros")
