"""Files and configs: what is written loads again, here and on the other backends."""

import fcntl
import io
import json
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_mom
from tests.layer_helpers import (
    BACKEND,
    EAGERLY,
    QUICK,
    assert_close,
    call,
    make_layer,
    relative_rms,
    to_numpy,
    tokens,
)
from tests.selection import covering, once

WIDTH = 12
INPUTS = tokens(2, 9, WIDTH)
SIZES = {"num_heads": 2, "key_dim": 6, "value_dim": 10}


@keras.saving.register_keras_serializable("keras_mom_tests")
class Fading(keras_mom.rules.MemoryUpdateRule):
    """A user's rule: additive writes, and a decay a channel that a token projects."""

    write = "additive"

    def __init__(self, sharpness=1.0, **kwargs):
        super().__init__(**kwargs)
        self.sharpness = sharpness

    def create_projections(self):
        units = self.num_heads * self.key_dim
        self.decay_projection = self.per_memory_dense(units, "decay")

    def build(self, inputs_shape):
        self.offset = self.add_weight(
            shape=(self.num_heads, self.key_dim), initializer="ones", name="offset"
        )
        super().build(inputs_shape)

    def project(self, inputs):
        return (self.split_memories(self.decay_projection(inputs)),)

    def prepare(self, query, key, value, decay):
        decay = keras.ops.reshape(decay, keras.ops.shape(query))
        decay = keras.ops.cast(decay, "float32") + self.offset
        log_decay = -self.sharpness * keras.ops.softplus(decay)
        return query, key, value, log_decay, None

    def get_config(self):
        return {**super().get_config(), "sharpness": self.sharpness}


def model_of(layer):
    inputs = keras.Input((None, WIDTH))
    return keras.Model(inputs, layer(inputs))


def saved_and_loaded(model, folder, name="model.keras"):
    path = folder / name
    model.save(path)
    return keras.saving.load_model(path)


def outputs_of(model, inputs=INPUTS):
    # Eager JAX compiles operation by operation.
    return call(model, inputs) if BACKEND == "jax" else to_numpy(model(inputs))


def assert_survives(model, folder):
    """Saves and loads a model; the outputs stay. Returns the loaded model."""
    loaded = saved_and_loaded(model, folder)
    assert_close(outputs_of(loaded), outputs_of(model), 1e-6)
    return loaded


# Configs.

ALL_ARGUMENTS = {
    "num_heads": 3,
    "key_dim": 4,
    "value_dim": 5,
    "num_memories": 6,
    "top_k": 3,
    "shared_memory": False,
    "update_rule": "linear_attention",
    "per_memory_projections": False,
    "conv_width": 2,
    "use_output_gate": False,
    "balance_loss_weight": 0.5,
    "norm_epsilon": 1e-3,
    "implementation": "portable",
    "return_sequences": False,
    "return_state": True,
    "go_backwards": True,
    "stateful": True,
    "kernel_initializer": keras.initializers.HeNormal(seed=3),
    "kernel_regularizer": keras.regularizers.L2(0.25),
    "kernel_constraint": keras.constraints.MaxNorm(1.5),
    "lora_rank": 2,
    "lora_alpha": 4,
    "dtype": "mixed_bfloat16",
    "name": "memories",
    "trainable": False,
}


@pytest.mark.parametrize("settings", [SIZES, ALL_ARGUMENTS], ids=["few", "all"])
def test_config_round_trip(settings):
    layer = keras_mom.MoMLayer(**settings)
    config = layer.get_config()
    again = keras_mom.MoMLayer.from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert again.get_config() == config
    objects = ("update_rule", "kernel_initializer", "kernel_regularizer")
    objects += ("kernel_constraint", "dtype")
    for name, value in settings.items():
        if name not in objects:
            assert getattr(again, name) == value, name
    if settings is ALL_ARGUMENTS:
        assert isinstance(again.update_rule, keras_mom.rules.LinearAttention)
        assert again.kernel_initializer.seed == 3
        assert again.kernel_regularizer.l2 == 0.25
        assert again.kernel_constraint.max_value == 1.5
        assert again.dtype_policy.name == "mixed_bfloat16"


def test_every_argument_is_in_the_config():
    layer = keras_mom.MoMLayer(**ALL_ARGUMENTS)
    assert set(ALL_ARGUMENTS) <= set(layer.get_config())


def test_clone_model():
    model = model_of(keras_mom.MoMLayer(**SIZES))
    clone = keras.models.clone_model(model)
    assert [v.shape for v in clone.weights] == [v.shape for v in model.weights]
    assert not any(v is w for v in clone.weights for w in model.weights)
    clone.set_weights(model.get_weights())
    assert_close(outputs_of(clone), outputs_of(model), 1e-6)


# Files.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"update_rule": "linear_attention", "shared_memory": False},
        {"conv_width": None, "per_memory_projections": False},
        {"use_output_gate": False, "dtype": "mixed_bfloat16"},
    ],
    ids=["defaults", "linear", "no convolution", "bfloat16"],
)
def test_a_file_needs_no_custom_objects(settings, tmp_path):
    assert_survives(model_of(make_layer(**settings)), tmp_path)


@once
def test_a_trained_model_goes_on_training(tmp_path):
    model = model_of(make_layer(balance_loss_weight=0.1))
    model.compile("adam", "mse", run_eagerly=EAGERLY)
    model.fit(INPUTS, INPUTS, epochs=2, verbose=0)
    loaded = assert_survives(model, tmp_path)
    share = model.layers[1].routing_statistics["share"]
    assert_close(loaded.layers[1].routing_statistics["share"], share, 1e-6)
    losses = [m.evaluate(INPUTS, INPUTS, verbose=0) for m in (model, loaded)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    loaded.fit(INPUTS, INPUTS, epochs=1, verbose=0)


def test_a_stateful_layer_keeps_its_state(tmp_path):
    layer = make_layer(stateful=True, batch=2)
    inputs = keras.Input((None, WIDTH), batch_size=2)
    model = keras.Model(inputs, layer(inputs))
    outputs_of(model)
    loaded = saved_and_loaded(model, tmp_path)
    assert any(to_numpy(v.value).any() for v in loaded.layers[1].states)
    assert_close(outputs_of(loaded), outputs_of(model), 1e-6)


def test_weights_alone(tmp_path):
    model = model_of(make_layer())
    model.save_weights(tmp_path / "model.weights.h5")
    other = model_of(make_layer(seed=5))
    assert relative_rms(outputs_of(other), outputs_of(model)) > 0.1
    other.load_weights(tmp_path / "model.weights.h5")
    assert_close(outputs_of(other), outputs_of(model), 1e-6)
    wider = model_of(make_layer(num_memories=5))
    with pytest.raises(ValueError):
        wider.load_weights(tmp_path / "model.weights.h5")


def test_the_layer_has_no_weight_that_is_not_saved(tmp_path):
    """Every weight is changed, and every change is found again."""
    model = model_of(make_layer())
    for i, variable in enumerate(model.weights):
        variable.assign(np.full(variable.shape, i + 1.0, "float32"))
    loaded = saved_and_loaded(model, tmp_path)
    assert len(loaded.weights) == 16
    for i, variable in enumerate(loaded.weights):
        assert (to_numpy(variable.value) == i + 1).all(), variable.path


DAMAGE = {
    "truncated a little": lambda data: data[:-20],
    "truncated to half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no zip file": lambda data: b"keras" * 1000,
    "damaged weights": lambda data: _scrambled(data, "model.weights.h5"),
    "damaged config": lambda data: _scrambled(data, "config.json"),
    "damaged directory": lambda data: data[:-60] + bytes(40) + data[-20:],
}


def _scrambled(data, member):
    """Inverts bytes in the middle of a member of a zip file."""
    info = zipfile.ZipFile(io.BytesIO(data)).getinfo(member)
    middle = info.header_offset + 30 + len(member) + info.compress_size // 2
    return (
        data[:middle]
        + bytes(255 - b for b in data[middle : middle + 64])
        + (data[middle + 64 :])
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_raises(damage, tmp_path):
    path = tmp_path / "model.keras"
    model_of(make_layer()).save(path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    errors = (ValueError, OSError, KeyError, zipfile.BadZipFile, zlib.error)
    with pytest.raises(errors):
        keras.saving.load_model(path)


# Rules of a user.


@pytest.mark.parametrize(
    "given",
    [
        lambda: Fading(sharpness=2.0),
        lambda: keras.saving.serialize_keras_object(Fading(sharpness=2.0)),
    ],
    ids=["rule", "config"],
)
def test_a_rule_of_a_user(given, tmp_path):
    layer = make_layer(update_rule=given())
    assert isinstance(layer.update_rule, Fading)
    assert layer.update_rule.sharpness == 2.0
    kernel = layer.update_rule.decay_projection.kernel
    assert kernel.shape == (WIDTH, 5 * 2 * 6)
    kernel.assign(0.5 * tokens(*kernel.shape))
    model = model_of(layer)
    loaded = assert_survives(model, tmp_path)
    assert loaded.layers[1].update_rule.sharpness == 2.0
    # The rule's projection matters, and the layer stays causal.
    before = outputs_of(model)
    changed = INPUTS.copy()
    changed[:, 5:] += 1
    after = outputs_of(model, changed)
    np.testing.assert_allclose(after[:, :5], before[:, :5], atol=1e-6)
    kernel.assign(np.zeros(kernel.shape, "float32"))
    assert relative_rms(outputs_of(model), before) > 1e-2


def test_one_rule_serves_as_a_pattern_for_several_layers():
    rule = Fading(sharpness=2.0)
    layers = [make_layer(update_rule=rule), make_layer(update_rule=rule)]
    assert layers[0].update_rule is not layers[1].update_rule
    assert not rule.weights


# LoRA and quantization.


def parameters(variables):
    return sum(int(np.prod(v.shape)) for v in variables)


def with_lora(rank=2):
    """A model whose low-rank updates are not zero."""
    layer = make_layer(**QUICK)
    model = model_of(layer)
    layer.enable_lora(rank, lora_alpha=4)
    for i, variable in enumerate(lora_variables(layer)):
        variable.assign(0.3 * tokens(*variable.shape, seed=i))
    return model, layer


def lora_variables(layer):
    return [v for v in layer.trainable_variables if "lora" in v.name]


def test_lora():
    layer = make_layer(**QUICK)
    full = parameters(layer.trainable_variables)
    before = call(layer, INPUTS)
    model, changed = with_lora()
    layer.enable_lora(2)
    assert_close(call(make_layer(**QUICK), INPUTS), before, 1e-6)
    assert_close(outputs_of(layer), before, 1e-5)
    assert parameters(layer.trainable_variables) < full / 2
    # Two factors for query, key, value, gate and output.
    assert len(lora_variables(layer)) == 10
    assert relative_rms(outputs_of(model), before) > 0.05
    assert changed.lora_rank == 2 and changed.lora_alpha == 4


def test_lora_survives(tmp_path):
    model, layer = with_lora()
    loaded = saved_and_loaded(model, tmp_path)
    # The file holds the kernels with their updates merged.
    assert_close(outputs_of(loaded), outputs_of(model), 1e-5)
    again = loaded.layers[1]
    assert again.lora_rank == 2 and again.lora_alpha == 4
    shapes = [(v.name, v.shape) for v in layer.trainable_variables]
    assert [(v.name, v.shape) for v in again.trainable_variables] == shapes
    assert all(v.trainable for v in lora_variables(again))
    # And once more, with updates of its own.
    for variable in lora_variables(again):
        variable.assign(0.2 * tokens(*variable.shape))
    twice = saved_and_loaded(loaded, tmp_path)
    assert_close(outputs_of(twice), outputs_of(loaded), 1e-5)


def test_lora_trains_nothing_else():
    layer = make_layer(**QUICK)
    model = model_of(layer)
    layer.enable_lora(2)
    kernels = [layer.query_projection._kernel, layer.output_projection._kernel]
    before = [to_numpy(k.value) for k in kernels]
    model.compile("adam", "mse", run_eagerly=EAGERLY)
    model.fit(INPUTS, INPUTS, epochs=2, verbose=0)
    for kernel, value in zip(kernels, before):
        np.testing.assert_array_equal(to_numpy(kernel.value), value)


@pytest.mark.parametrize("through", covering(["layer", "model"], ["layer"]))
def test_int8(through, tmp_path):
    layer = make_layer(**QUICK if through == "model" else {})
    model = model_of(layer)
    before = outputs_of(model)
    if through == "layer":
        layer.quantize("int8")
    else:
        model.quantize("int8")
    assert str(layer.key_projection._kernel.dtype) == "int8"
    assert str(layer.output_projection._kernel.dtype) == "int8"
    # Near the float outputs: each projection rounds to 8 bits, no more.
    error = relative_rms(outputs_of(model), before)
    assert 1e-4 < error < 0.1
    loaded = assert_survives(model, tmp_path)
    assert str(loaded.layers[1].key_projection._kernel.dtype) == "int8"
    dtypes = [str(v.dtype) for v in model.weights]
    assert [str(v.dtype) for v in loaded.weights] == dtypes
    assert loaded.layers[1].get_config() == layer.get_config()


@once
def test_int8_behind_lora(tmp_path):
    model, layer = with_lora()
    before = outputs_of(model)
    layer.quantize("int8")
    assert relative_rms(outputs_of(model), before) < 0.1
    loaded = saved_and_loaded(model, tmp_path)
    # The updates are merged into 8 bits: equal up to one more rounding.
    assert relative_rms(outputs_of(loaded), outputs_of(model)) < 0.1
    assert len(lora_variables(loaded.layers[1])) == 10


# Between backends. Each backend's process writes its files, then reads all of them;
# the three processes serve all tests, and one backend's test run holds them.

if BACKEND == "jax":
    BACKENDS = ("jax", "torch", "tensorflow")
    MODELS = ("defaults", "small", "lora")

    @pytest.fixture(scope="session")
    def exchanged(tmp_path_factory):
        """A folder with every backend's files, and outputs of all of them.

        The first worker that asks for it fills it for all.
        """
        place = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            place = place.parent
        folder = place / "exchange"
        complete = folder / "complete"
        with open(place / "exchange.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                folder.mkdir(exist_ok=True)
                exchange(folder)
                complete.touch()
        return folder

    def exchange(folder):
        root = Path(__file__).parent.parent
        processes = {}
        for backend in BACKENDS:
            paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
            processes[backend] = subprocess.Popen(
                [sys.executable, "-m", "tests.exchange_files", str(folder)],
                cwd=root,
                env={
                    **os.environ,
                    "KERAS_BACKEND": backend,
                    "PYTHONPATH": os.pathsep.join(paths),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        try:
            for backend, process in processes.items():
                # Frameworks may print lines of their own before.
                lines = iter(process.stdout.readline, "")
                if not any(line.strip() == "written" for line in lines):
                    pytest.fail(f"{backend}: {process.communicate()[1][-3000:]}")
            for backend, process in processes.items():
                _, errors = process.communicate("read\n", timeout=300)
                assert process.returncode == 0, f"{backend}: {errors[-3000:]}"
        finally:
            for process in processes.values():
                process.kill()

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("reader", BACKENDS)
    @pytest.mark.parametrize("writer", BACKENDS)
    def test_a_file_loads_on_every_backend(writer, reader, name, exchanged):
        written = np.load(exchanged / f"{name}-{writer}.npy")
        read = np.load(exchanged / f"{name}-{writer}-read-by-{reader}.npy")
        assert written.std() > 0.1
        assert relative_rms(read, written) < 1e-5

    @pytest.mark.parametrize("reader", BACKENDS)
    @pytest.mark.parametrize("writer", BACKENDS)
    def test_a_file_of_each_rule_loads_on_every_backend(writer, reader, exchanged):
        written = np.load(exchanged / f"every rule-{writer}.npy")
        read = np.load(exchanged / f"every rule-{writer}-read-by-{reader}.npy")
        for name, before, after in zip(keras_mom.rules.names(), written, read):
            assert before.std() > 0.01, name
            assert relative_rms(after, before) < 1e-5, name
