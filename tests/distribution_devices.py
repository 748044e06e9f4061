"""Trains a model on eight devices of a CPU, and on one, on JAX.

Run by `test_distribution.py`, in a process of its own: devices are made at its start.
Prints, for each way to distribute the model, over how many devices each weight is cut.
"""

import os

# What is compiled needs not be fast.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
os.environ["KERAS_BACKEND"] = "jax"

import functools
import json
import random
import tempfile

import jax
import jax.numpy as jnp
import keras
import numpy as np

import keras_mom

distribution = keras.distribution
HEADS, KEY_DIM, LENGTH, WIDTH = 8, 4, 20, 16
FIT = dict(batch_size=8, epochs=2, shuffle=False, verbose=0)


def make_model(implementation=None):
    random.seed(0)  # Keras' own function would import TensorFlow.
    inputs = keras.Input((LENGTH, WIDTH))
    layer = keras_mom.MoMLayer(
        HEADS,
        KEY_DIM,
        num_memories=3,
        implementation=implementation,
        # The names of layers count up.
        name="mo_m_layer_7",
    )
    model = keras.Model(inputs, keras.layers.Dense(3)(layer(inputs)))
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=True)
    return model


def data():
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(8, LENGTH, WIDTH)).astype("float32")
    return inputs, generator.normal(size=(8, LENGTH, 3)).astype("float32")


def use_kernels():
    """The layer's kernels in Pallas' interpreter, as if JAX ran on a GPU."""
    from keras_mom_kernels.memory_scan import jax as scan_kernels
    from keras_mom_kernels.packed_convolution import jax as row_kernels

    scan_kernels.platform = lambda: "gpu"
    scan_kernels.memory_scan = functools.partial(
        scan_kernels.memory_scan, kernels="gpu", interpret=True
    )
    row_kernels.packed_convolution = functools.partial(
        row_kernels.packed_convolution, interpret=True
    )


def outputs_and_gradients(model, inputs, targets):
    others = [x.value for x in model.non_trainable_variables]

    def loss(weights, inputs):
        outputs, _ = model.stateless_call(weights, others, inputs)
        return jnp.mean((outputs - targets) ** 2), outputs

    weights = [x.value for x in model.trainable_variables]
    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, outputs), grads = program(weights, inputs)
    return outputs, grads


def assert_close(actual, expected, limit, name):
    actual, expected = np.asarray(actual), np.asarray(expected)
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= limit, (name, error)


def make_distribution(name):
    devices = distribution.list_devices("cpu")
    if name == "data":
        return distribution.DataParallel(devices=devices)
    shape = (1, 8) if name == "heads" else (2, 4)
    mesh = distribution.DeviceMesh(shape, ["batch", "model"], devices)
    layouts = keras_mom.distribution.layout_map(mesh)
    return distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def train(model, alone, inputs, targets):
    model.fit(inputs, targets, **FIT)
    for x, y in zip(model.trainable_variables, alone.trainable_variables):
        assert_close(x.value, y.value, 1e-4, f"trained {x.path}")


def save_and_load(model, inputs):
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.keras"
        model.save(file)
        expected = model.predict(inputs, verbose=0)
        distribution.set_distribution(None)
        loaded = keras.saving.load_model(file)
    assert_close(loaded.predict(inputs, verbose=0), expected, 1e-5, "loaded")


def main():
    """One model alone, which every distributed one must equal."""
    inputs, targets = data()
    alone = make_model()
    start = alone.get_weights()
    expected = outputs_and_gradients(alone, inputs, targets)
    alone.fit(inputs, targets, **FIT)
    shards = {}
    for name in ("data", "heads"):
        model, shards[name] = distributed(name, start, *expected)
        train(model, alone, inputs, targets)
    save_and_load(model, inputs)
    use_kernels()
    _, shards["kernels"] = distributed("kernels", start, *expected)
    print(json.dumps(shards))


def distributed(name, start, expected, expected_grads):
    """The distributed model, and over how many devices each of its weights is cut."""
    inputs, targets = data()
    distribution.set_distribution(make_distribution(name))
    model = make_model("pallas" if name == "kernels" else None)
    model.set_weights(start)
    layout = distribution.TensorLayout(
        ("batch", None, None), distribution.distribution().device_mesh
    )
    sharded = distribution.distribute_tensor(jnp.asarray(inputs), layout)
    outputs, grads = outputs_and_gradients(model, sharded, targets)
    assert_close(outputs, expected, 1e-5, "outputs")
    paths = [x.path for x in model.trainable_variables]
    for path, x, y in zip(paths, grads, expected_grads, strict=True):
        assert_close(x, y, 1e-4, path)
    shards = {
        x.path.split("/", 1)[1]: x.value.size // x.value.addressable_shards[0].data.size
        for x in model.layers[1].weights
    }
    return model, shards


if __name__ == "__main__":
    main()
