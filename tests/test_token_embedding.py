"""The embedding of tokens: a gradient with its digits, and Keras' layer otherwise."""

import keras
import numpy as np
import pytest
from gradients import value_and_grad
from keras import ops

import keras_mom
from keras_mom.models import TokenEmbedding
from keras_mom.ops.embedding import embed


def looked_up(table, ids):
    return (ops.cast(embed(table, ids), "float32"),)


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-5), ("bfloat16", 3e-3)])
def test_gradient_of_frequent_tokens(dtype, limit):
    """Summed in bfloat16, that of a token of thousands would stop growing."""
    rng = np.random.default_rng(0)
    ids = rng.choice(4, size=(8, 1024), p=[0.8, 0.1, 0.1, 0.0]).astype("int32")
    cotangent = rng.normal(0.5, 1.0, size=(*ids.shape, 8)).astype("float32")
    table = rng.normal(size=(4, 8)).astype("float32")
    table = ops.convert_to_numpy(ops.cast(table, dtype))
    (output,), grads = value_and_grad(
        looked_up, {"table": table, "ids": ids}, (cotangent,)
    )
    np.testing.assert_array_equal(output, table.astype("float32")[ids])
    # What comes back through a bfloat16 output is of that type.
    given = ops.convert_to_numpy(ops.cast(cotangent, dtype)).astype("float64")
    expected = np.zeros((4, 8))
    np.add.at(expected, ids.reshape(-1), given.reshape(-1, 8))
    error = np.linalg.norm(grads["table"] - expected) / np.linalg.norm(expected)
    assert error < limit
    assert not np.any(grads["table"][3])


def test_it_is_keras_layer_otherwise():
    options = dict(tie_weights=False, dtype="mixed_bfloat16", logit_soft_cap=5.0)
    ours = TokenEmbedding(6, 4, **options)
    theirs = keras.layers.ReversibleEmbedding(6, 4, **options)
    ids = np.array([[5, 0, 2]], "int32")
    for layer in (ours, theirs):
        layer.build(ids.shape)
    ours.set_weights(theirs.get_weights())
    vectors = ours(ids)
    assert keras.backend.standardize_dtype(vectors.dtype) == "bfloat16"
    for inputs, how in ((ids, False), (vectors, True)):
        pair = (
            ops.cast(layer(inputs, reverse=how), "float32") for layer in (ours, theirs)
        )
        np.testing.assert_array_equal(*(ops.convert_to_numpy(x) for x in pair))
    assert ours.get_config() == {**theirs.get_config(), "name": ours.name}
    again = TokenEmbedding.from_config(ours.get_config())
    assert again.get_config() == ours.get_config()
    assert ours.compute_output_spec(keras.KerasTensor((None, 3), "int32")).shape == (
        None,
        3,
        4,
    )


def test_quantization():
    """Of a model as a whole, where Keras leaves out subclasses of its layers."""
    layer = TokenEmbedding(6, 8)
    ids = np.array([[5, 0, 2]], "int32")
    before = ops.convert_to_numpy(layer(ids))
    layer.quantize("int8")
    assert "int8" in {str(v.dtype) for v in layer.weights}
    np.testing.assert_allclose(ops.convert_to_numpy(layer(ids)), before, atol=1e-3)


def test_no_token_is_a_mask():
    with pytest.raises(ValueError, match="`mask_zero` must be False.*mask_zero=True"):
        TokenEmbedding(6, 4, mask_zero=True)


def test_language_models_have_it():
    backbone = keras_mom.models.MoMBackbone(8, 1, 8, 1, 4)
    assert isinstance(backbone.token_embedding, TokenEmbedding)
