"""What TensorFlow alone offers: export, serving, replicas, and what XLA compiles."""

import json
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from agreement import assert_close

import keras_mom
from keras_mom.ops import memory_scan

if keras.backend.backend() != "tensorflow":
    pytest.skip("for TensorFlow", allow_module_level=True)

import tensorflow as tf  # noqa: E402

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
    expected = model.predict(inputs, verbose=0)
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
