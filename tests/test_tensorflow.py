"""What TensorFlow alone offers: export, serving, replicas, and what XLA compiles."""

import functools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from agreement import assert_close
from selection import covering

import keras_mom
from keras_mom import backend
from keras_mom.ops import memory_scan

if keras.backend.backend() != "tensorflow":
    pytest.skip("for TensorFlow", allow_module_level=True)

import tensorflow as tf  # noqa: E402

from keras_mom_kernels.memory_step.reference import (  # noqa: E402
    memory_step as step_reference,
)
from keras_mom_kernels.memory_step.shapes import (  # noqa: E402
    STEP_CASES,
    make_state,
    make_tokens,
)
from keras_mom_kernels.memory_step.tensorflow import memory_step  # noqa: E402

SERVING = """
import sys
sys.modules["keras"] = sys.modules["keras_mom"] = None
import numpy as np, tensorflow as tf
folder = sys.argv[1]
model = tf.saved_model.load(folder + "/model")
inputs = np.load(folder + "/inputs.npy")
np.save(folder + "/whole.npy", model.serve(inputs).numpy())
np.save(folder + "/part.npy", model.serve(inputs[:1, :7]).numpy())
"""


def run(*arguments):
    """What a Python process of its own prints."""
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_saved_model_is_served_without_keras(tmp_path):
    tokens = keras.Input((None, 16))
    model = keras.Model(tokens, keras_mom.MoMLayer(2, 8)(tokens))
    inputs = np.random.default_rng(0).normal(size=(2, 70, 16)).astype("float32")
    expected = model(inputs).numpy()
    model.export(tmp_path / "model", verbose=False)
    np.save(tmp_path / "inputs.npy", inputs)
    run("-c", SERVING, tmp_path)
    assert_close(np.load(tmp_path / "whole.npy"), expected, 1e-5, "output")
    assert_close(np.load(tmp_path / "part.npy"), expected[:1, :7], 1e-5, "part")


def test_two_replicas_train_like_one():
    here = Path(__file__).resolve().parent
    alone, mirrored = json.loads(run(here / "tensorflow_replicas.py").splitlines()[-1])
    assert_close(np.array(mirrored["loss"]), np.array(alone["loss"]), 1e-5, "loss")
    for x, y in zip(mirrored["weights"], alone["weights"], strict=True):
        assert_close(np.array(x), np.array(y), 1e-5, "weight")


def scan_inputs(batch, length, heads, key_dim, value_dim):
    random = np.random.default_rng(0)
    rows = (batch, length, heads)
    shapes = ((*rows, key_dim), (*rows, key_dim), (*rows, value_dim))
    inputs = [random.normal(size=shape) for shape in shapes]
    inputs[1] /= np.linalg.norm(inputs[1], axis=-1, keepdims=True)
    inputs += [-random.uniform(size=rows), random.uniform(size=rows)]
    return [tf.constant(x, "float32") for x in inputs]


def gradients(query, key, value, log_decay, beta):
    inputs = (query, key, value, log_decay, beta)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = memory_scan(query, key, value, log_decay=log_decay, beta=beta)
        loss = tf.reduce_sum(output**2)
    return tape.gradient(loss, inputs)


def test_the_compiled_scan_keeps_no_state_a_row_and_stays_on_the_device():
    length, heads, key_dim, value_dim = 1024, 2, 48, 40
    inputs = scan_inputs(1, length, heads, key_dim, value_dim)
    step = tf.function(gradients, jit_compile=True)
    hlo = step.experimental_get_compiler_ir(*inputs)(stage="optimized_hlo")
    shapes = [
        [int(size) for size in shape.split(",")]
        for shape in re.findall(r"f32\[([\d,]+)\]", hlo)
    ]
    # A state a chunk of 64 rows is the most that is kept of states.
    states = [s for s in shapes if s[-2:] == [key_dim, value_dim]]
    kept = length // 64 * heads * key_dim * value_dim
    assert states and max(map(np.prod, states)) <= kept
    assert max(map(np.prod, shapes)) < length * key_dim * value_dim
    for call in ("custom-call", "infeed", "outfeed", "send(", "recv("):
        assert call not in hlo


def test_one_trace_serves_all_lengths():
    traces = []

    def traced(*inputs):
        traces.append(1)
        return gradients(*inputs)

    specs = [tf.TensorSpec((None, None, 1, 8))] * 3 + [
        tf.TensorSpec((None, None, 1))
    ] * 2
    step = tf.function(traced, input_signature=specs)
    for length in (1, 2, 63, 64, 65, 200, *range(300, 314)):
        inputs = scan_inputs(1 + length % 3, length, 1, 8, 8)
        found = step(*inputs)
        assert all(x.shape == y.shape for x, y in zip(found, inputs))
        if length in (65, 313):
            for x, y in zip(found, gradients(*inputs)):
                assert_close(x.numpy(), y.numpy(), 1e-5, "gradient")
    assert len(traces) == 1


@pytest.mark.parametrize(
    "rule", covering(["gated_delta_net", "gsa"], ["gated_delta_net"])
)
def test_lite_rt_needs_no_other_operations(rule, tmp_path):
    tokens = keras.Input((70, 16))
    model = keras.Model(tokens, keras_mom.MoMLayer(2, 8, update_rule=rule)(tokens))
    inputs = np.random.default_rng(0).normal(size=(2, 70, 16)).astype("float32")
    expected = model(inputs).numpy()
    path = tmp_path / "model.tflite"
    signature = [tf.TensorSpec(inputs.shape)]
    model.export(path, format="litert", input_signature=signature, verbose=False)
    # Operations other than LiteRT's own would not load.
    interpreter = tf.lite.Interpreter(
        str(path),
        experimental_op_resolver_type=tf.lite.experimental.OpResolverType.BUILTIN_REF,
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], inputs)
    interpreter.invoke()
    output = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    assert_close(output, expected, 1e-5, "output")


def test_softplus_keeps_its_digits_in_lite_rt():
    x = np.linspace(-30, 30, 6001).astype("float32")
    expected = np.logaddexp(0, x.astype("float64"))
    slope = 1 / (1 + np.exp(-x.astype("float64")))
    x = tf.constant(x)

    def value_and_gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = backend.softplus(x)
        return y, tape.gradient(y, x)

    for jit_compile in (False, True):
        y, gradient = tf.function(value_and_gradient, jit_compile=jit_compile)(x)
        np.testing.assert_allclose(y, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, slope, rtol=1e-5)

    function = tf.function(backend.softplus).get_concrete_function(x)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(y, expected, rtol=1e-5)


# A single token.


@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case.name)
def test_steps_are_those_of_the_recurrence(case):
    tolerance = 1e-5 if case.dtype == "float32" else 5e-3
    step = tf.function(functools.partial(memory_step, **case.rule), jit_compile=True)
    actual = tf.constant(make_state(case)[0], "float32")
    expected = actual.numpy().astype("float64")
    for token in make_tokens(case):
        del token["projected"]
        tensors = {
            name: tf.constant(x)
            if name == "active"
            else tf.constant(x, "float32" if name == "weights" else case.dtype)
            for name, x in token.items()
        }
        output, actual = step(**tensors, state=actual)
        exact = {
            name: x.numpy().astype(bool if name == "active" else "float64")
            for name, x in tensors.items()
        }
        mixed, expected = step_reference(**exact, state=expected, **case.rule)
        assert output.dtype == actual.dtype == tf.float32
        assert_close(output, mixed, tolerance, "output")
        assert_close(actual, expected, tolerance, "state")


def test_a_memory_that_is_not_active_is_left_alone():
    """Whatever its inputs and its state hold, in values and in gradients."""
    case = STEP_CASES[4]
    token = make_tokens(case)[0]
    active = np.array([[True, False, True], [False, True, True], [False] * 3])
    state = np.where(active[..., None, None, None], make_state(case)[0], np.nan)
    rows = {
        name: tf.constant(
            np.where(active[(..., *[None] * (x.ndim - 2))], x, np.inf), "float32"
        )
        for name, x in token.items()
        if name not in ("projected", "active")
    }
    state = tf.constant(state, "float32")
    with tf.GradientTape() as tape:
        tape.watch((rows, state))
        output, after = memory_step(**rows, active=tf.constant(active), state=state)
        loss = tf.reduce_sum(output**2)
    gradients, state_gradient = tape.gradient(loss, (rows, state))
    assert np.isfinite(output).all()
    np.testing.assert_array_equal(after[~active], state[~active])
    for gradient in (*gradients.values(), state_gradient):
        assert np.isfinite(gradient).all()
        assert not np.any(gradient[~active]) and np.any(gradient[active])


@pytest.mark.parametrize("compiled", (False, True))
def test_a_decode_loop_is_traced_once(compiled):
    layer = keras_mom.MoMLayer(2, 8, return_state=True)
    inputs = np.random.default_rng(0).normal(size=(2, 12, 16)).astype("float32")
    expected, last = layer(inputs)
    _, state = layer(inputs[:, :3])
    traces = []
    signature = [
        tf.TensorSpec((2, 3, 16)),
        tuple(tf.TensorSpec(x.shape, x.dtype) for x in state),
    ]

    @tf.function(input_signature=signature, jit_compile=compiled)
    def decode(tokens, state):
        traces.append(1)
        outputs = tf.TensorArray(tf.float32, 3, element_shape=(2, 16))
        for t in tf.range(3):
            output, state = layer(tokens[:, t, None], initial_state=state)
            outputs = outputs.write(t, output[:, 0])
        return tf.transpose(outputs.stack(), (1, 0, 2)), state

    for start in (3, 6, 9):
        output, state = decode(inputs[:, start : start + 3], state)
        assert_close(output, expected[:, start : start + 3], 1e-5, "output")
    for x, y in zip(state, last, strict=True):
        assert_close(x, y, 1e-5, "state")
    assert len(traces) == 1


def test_fit_is_the_same_however_it_runs():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(8, 70, 16)).astype("float32")
    losses = []
    for how in ({"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}):
        keras.utils.set_random_seed(0)
        tokens = keras.Input((None, 16))
        model = keras.Model(tokens, keras_mom.MoMLayer(2, 8)(tokens))
        model.compile("sgd", "mse", **how)
        fit = model.fit(inputs, -inputs, batch_size=4, epochs=2, verbose=0)
        losses.append(fit.history["loss"])
    assert losses[0][1] < losses[0][0]
    for loss in losses[1:]:
        assert_close(loss, losses[0], 1e-5, "loss")


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(keras_mom.__file__).parents[1] / "docs" / "tensorflow.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    # A `tf.function` reads its own source.
    (tmp_path / "page.py").write_text(code)
    names = runpy.run_path(str(tmp_path / "page.py"))
    assert names["served"].serve(np.ones((1, 9, 16), "float32")).shape == (1, 9, 16)
    assert (tmp_path / "model.tflite").stat().st_size > 0
    assert names["decode"].experimental_get_tracing_count() == 1
    assert names["gradient"].shape == names["value"].shape


@pytest.mark.parametrize("compiled", (False, True))
def test_second_gradients_are_refused(compiled):
    """They would be those of a constant."""
    layer = keras_mom.MoMLayer(1, 4)
    inputs = tf.random.normal((1, 3, 8))

    def penalty(inputs):
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                loss = tf.reduce_sum(layer(inputs) ** 2)
            norm = tf.reduce_sum(inner.gradient(loss, inputs) ** 2)
        return outer.gradient(norm, inputs)

    function = tf.function(penalty) if compiled else penalty
    with pytest.raises(NotImplementedError, match="no second gradient.*portable"):
        function(inputs)
