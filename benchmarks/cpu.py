"""Times MoMLayer beside Keras' own sequence layers on a CPU.

For the Keras backend in force (KERAS_BACKEND), a table of forward, forward + backward,
a whole training step and the first call, for layers of width 256 and batch 2:

    MoMLayer            4 heads of 64, 4 memories, top 2, shared memory
    LSTM                256 units
    MultiHeadAttention  4 heads of 64, causal
    GatedDeltaNet       KerasHub's Qwen3.5 layer, 4 heads of 64, where it is installed

Every row of the table runs in a process of its own, so that peak memory and compile
time are that row's. Times are medians of `--repeats` calls behind one warm-up.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

WIDTH, HEADS, BATCH = 256, 4, 2
LAYERS = ("MoMLayer", "LSTM", "MultiHeadAttention", "GatedDeltaNet")
LENGTHS = {
    "MoMLayer": (512, 4096, 16384),
    "LSTM": (512, 4096),
    "MultiHeadAttention": (512, 4096),
    "GatedDeltaNet": (512,),
}


def make_layer(name):
    import keras

    if name == "MoMLayer":
        import keras_mom

        return keras_mom.MoMLayer(HEADS, WIDTH // HEADS)
    if name == "LSTM":
        return keras.layers.LSTM(WIDTH, return_sequences=True)
    if name == "MultiHeadAttention":
        return CausalAttention.make()
    from keras_hub.src.models.qwen3_5.qwen3_5_gated_delta_net import (
        Qwen3_5GatedDeltaNet,
    )

    return Qwen3_5GatedDeltaNet(
        hidden_size=WIDTH,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=WIDTH // HEADS,
        linear_value_head_dim=WIDTH // HEADS,
    )


class CausalAttention:
    """`keras.layers.MultiHeadAttention` with one input."""

    @staticmethod
    def make():
        import keras

        class Layer(keras.layers.Layer):
            def __init__(self):
                super().__init__()
                self.attention = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)

            def build(self, shape):
                self.attention.build(shape, shape)

            def call(self, x):
                return self.attention(x, x, use_causal_mask=True)

        return Layer()


def compiled(layer, length, backward):
    """A function of one array that runs the layer, compiled where the backend compiles.

    With `backward` it returns the gradients of the inputs and of all weights.
    """
    import keras

    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        state = [v.value for v in layer.non_trainable_variables]

        def forward(weights, x):
            return layer.stateless_call(weights, state, x)[0]

        def mean(weights, x):
            return forward(weights, x).mean()

        weights = [v.value for v in layer.trainable_variables]
        on_jax = jax.jit(jax.grad(mean, argnums=(0, 1)) if backward else forward)
        return lambda x: jax.block_until_ready(on_jax(weights, x))
    if backend == "tensorflow":
        import tensorflow as tf

        weights = [v.value for v in layer.trainable_variables]

        @tf.function(jit_compile=True)
        def on_tensorflow(x):
            if not backward:
                return layer(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_mean(layer(x))
            return tape.gradient(loss, [x, *weights])

        return lambda x: [
            y.numpy() for y in tf.nest.flatten(on_tensorflow(tf.constant(x)))[:1]
        ]
    import torch

    def on_torch(x):
        x = torch.tensor(x, requires_grad=backward)
        if not backward:
            with torch.no_grad():
                return layer(x)
        weights = [v.value for v in layer.trainable_variables]
        return torch.autograd.grad(layer(x).mean(), [x, *weights])

    return on_torch


def training_step(layer, length):
    """`train_on_batch` of a model that holds the layer alone."""
    import keras

    inputs = keras.Input((length, WIDTH))
    model = keras.Model(inputs, layer(inputs))
    jit = False if keras.backend.backend() == "torch" else True
    model.compile("sgd", "mse", jit_compile=jit)
    return lambda x: model.train_on_batch(x, x)


def measure(name, length, repeats):
    """One row: seconds, and peak memory in MiB beyond what importing takes."""
    import numpy as np

    layer = make_layer(name)
    x = np.random.default_rng(0).normal(size=(BATCH, length, WIDTH)).astype("float32")
    layer.build(x.shape)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"layer": name, "length": length}
    functions = {
        "forward": lambda: compiled(layer, length, backward=False),
        "gradient": lambda: compiled(layer, length, backward=True),
        "step": lambda: training_step(layer, length),
    }
    for key, make in functions.items():
        function = make()
        start = time.perf_counter()
        function(x)
        row[f"{key}_first"] = time.perf_counter() - start
        times = []
        while len(times) < repeats and sum(times) < 20:
            start = time.perf_counter()
            function(x)
            times.append(time.perf_counter() - start)
        row[key] = sorted(times)[len(times) // 2]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row["peak_mib"] = (peak - base) / 1024
    return row


def run_row(name, length, repeats):
    command = [sys.executable, __file__, "--row", name, str(length)]
    command += ["--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"layer": name, "length": length, "error": last_line(done.stderr)}
    return json.loads(done.stdout.strip().splitlines()[-1])


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:100] if lines else "failed"


def print_table(rows, file=sys.stdout):
    print(
        f"\n{'layer':<20}{'T':>6}{'forward':>10}{'fwd+bwd':>10}{'step':>10}"
        f"{'us/token':>10}{'first fwd':>11}{'first bwd':>11}{'peak MiB':>10}",
        file=file,
    )
    for row in rows:
        head = f"{row['layer']:<20}{row['length']:>6}"
        if "error" in row:
            print(f"{head}  {row['error']}", file=file)
            continue
        per_token = row["step"] / (BATCH * row["length"]) * 1e6
        print(
            f"{head}{row['forward'] * 1e3:>8.0f}ms{row['gradient'] * 1e3:>8.0f}ms"
            f"{row['step'] * 1e3:>8.0f}ms{per_token:>10.1f}"
            f"{row['forward_first']:>10.2f}s{row['gradient_first']:>10.2f}s"
            f"{row['peak_mib']:>10.0f}",
            file=file,
        )


def main():
    parser = argparse.ArgumentParser(description="Times MoMLayer beside Keras' layers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", nargs="*", default=LAYERS)
    parser.add_argument("--lengths", nargs="*", type=int)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if arguments.row:
        name, length = arguments.row
        print(json.dumps(measure(name, int(length), arguments.repeats)))
        return
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    print(f"backend {backend}, {os.cpu_count()} cores, batch {BATCH}, width {WIDTH}")
    rows = []
    for name in arguments.layers:
        for length in arguments.lengths or LENGTHS[name]:
            rows.append(run_row(name, length, arguments.repeats))
            print(f"  {name} T {length}: done", file=sys.stderr)
    print_table(rows)


if __name__ == "__main__":
    main()
