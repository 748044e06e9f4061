"""Exported models compute what the model does, at any length or not at all."""

import keras
import numpy as np
import pytest

import keras_mom
from keras_mom.models import MoMBackbone, MoMCausalLM, mom_forecaster
from tests.layer_helpers import BACKEND, assert_close, outputs_of, to_numpy, tokens
from tests.selection import exhaustive_on

LENGTH = 12


@pytest.fixture(scope="module")
def model():
    """A hybrid language model: a block with memories, one with attention."""
    keras.utils.set_random_seed(0)
    normal = keras.initializers.RandomNormal(stddev=0.3)
    backbone = MoMBackbone(
        16, 2, 8, 2, 4, attention_layers=[1], kernel_initializer=normal
    )
    return MoMCausalLM(backbone)


@pytest.fixture(scope="module")
def inputs():
    ids = np.random.default_rng(0).integers(0, 16, (2, LENGTH)).astype("int32")
    mask = np.ones_like(ids)
    mask[0, :3] = mask[1, -2:] = 0
    return {"token_ids": ids, "padding_mask": mask}


def valid(output, inputs):
    """The output at tokens that count."""
    return np.asarray(output)[np.asarray(inputs["padding_mask"]) > 0]


def spec_of(inputs):
    return [
        {
            name: keras.layers.InputSpec(shape=x.shape, dtype=str(x.dtype), name=name)
            for name, x in inputs.items()
        }
    ]


if BACKEND != "torch":
    import tensorflow as tf

    def test_a_saved_model_takes_any_length(model, inputs, tmp_path):
        model.export(tmp_path / "model", verbose=False)
        served = tf.saved_model.load(tmp_path / "model")
        expected = outputs_of(model, inputs)
        for rows, length in ((2, LENGTH), (1, 5)):
            part = {name: x[:rows, :length] for name, x in inputs.items()}
            actual = served.serve(part).numpy()
            # Later tokens and other rows change nothing.
            assert_close(
                valid(actual, part), valid(expected[:rows, :length], part), 1e-5
            )

    @exhaustive_on("jax")
    def test_a_saved_forecaster_knows_the_length_of_its_covariates(tmp_path):
        keras.utils.set_random_seed(0)
        model = mom_forecaster(
            1,
            3,
            1,
            8,
            2,
            4,
            known_covariates=2,
            update_rule="linear_attention",
            conv_width=None,
        )
        inputs = {
            "values": tokens(2, 6, 1),
            "known_covariates": tokens(2, 9, 2, seed=2),
        }
        model.export(tmp_path / "model", verbose=False)
        served = tf.saved_model.load(tmp_path / "model")
        expected = outputs_of(model, inputs)
        assert_close(served.serve(inputs).numpy(), expected, 1e-5)


if BACKEND == "tensorflow":

    def test_lite_rt(model, inputs, tmp_path):
        path = tmp_path / "model.tflite"
        signature = spec_of(inputs)
        model.export(path, format="litert", input_signature=signature, verbose=False)
        interpreter = tf.lite.Interpreter(str(path))
        runner = interpreter.get_signature_runner()
        (actual,) = runner(**inputs).values()
        expected = to_numpy(model(inputs))
        assert_close(valid(actual, inputs), valid(expected, inputs), 1e-5)


if BACKEND == "torch":
    import torch

    def test_onnx(model, inputs, tmp_path):
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        path = str(tmp_path / "model.onnx")
        signature = spec_of(inputs)
        model.export(path, format="onnx", input_signature=signature, verbose=False)
        session = runtime.InferenceSession(path)
        given = session.get_inputs()
        # Keras flattens a dict in the order of its keys.
        feeds = {x.name: inputs[name] for x, name in zip(given, sorted(inputs))}
        (actual,) = session.run(None, feeds)
        expected = to_numpy(model(inputs))
        assert_close(valid(actual, inputs), valid(expected, inputs), 1e-5)

    @pytest.mark.parametrize("format", ("onnx", "torch"))
    def test_a_model_of_ours_needs_a_length(format, model, tmp_path):
        with pytest.raises(ValueError, match="holds for one number of tokens"):
            model.export(tmp_path / "model.pt2", format=format, verbose=False)

    def test_a_length_that_a_trace_would_forget_is_refused():
        sequence = keras.Input((None, 8))
        model = keras.Model(sequence, keras_mom.MoMLayer(2, 4)(sequence))
        model(np.ones((1, 5, 8), "float32"))
        with pytest.raises(
            ValueError, match="not exported to ONNX through TorchScript"
        ):
            model.export("never.onnx", format="onnx", verbose=False)
        with pytest.raises(ValueError, match="a dynamic number of tokens"):
            torch.export.export(
                model,
                (torch.ones(2, 5, 8),),
                dynamic_shapes=[({1: torch.export.Dim("length", min=2)},)],
                strict=False,
            )
