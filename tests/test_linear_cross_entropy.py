"""The chunked cross entropy against all logits in float64, and its memory."""

import keras
import numpy as np
import pytest
from agreement import assert_close
from gradients import compiled_value_and_grad, kept_for_backward, value_and_grad
from keras import ops

from keras_mom.ops import linear_cross_entropy
from keras_mom.ops.linear_cross_entropy import token_cross_entropy

B, T, D, V = 2, 11, 6, 9


def inputs_of(batch=B, length=T, dtype="float32"):
    random = np.random.default_rng(0)
    hidden = random.normal(size=(batch, length, D))
    labels = random.integers(0, V, size=(batch, length)).astype("int32")
    labels[:, 3] = -100
    weights = random.uniform(size=(batch, length)).astype("float32")
    weights[0, 5:7] = 0
    hidden[0, 5] = np.nan  # Weight 0: it may hold anything.
    kernel = random.normal(size=(D, V)).astype("float32")
    if dtype == "bfloat16":
        hidden, kernel = bfloat16(hidden), bfloat16(kernel).astype("float32")
    else:
        hidden = hidden.astype(dtype)
    return {"hidden": hidden, "kernel": kernel, "labels": labels, "weights": weights}


def bfloat16(x):
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16)


def reference(inputs, smoothing=0.0, z_loss=0.0):
    """Loss and gradients from all logits, float64."""
    hidden, kernel = (inputs[x].astype("float64") for x in ("hidden", "kernel"))
    labels = inputs["labels"]
    weights = np.where(labels >= 0, inputs["weights"].astype("float64"), 0)
    weights = weights / weights.sum()
    hidden = np.where(weights[..., None] > 0, hidden, 0)
    logits = hidden @ kernel
    log_total = np.log(np.exp(logits).sum(-1))
    target = (1 - smoothing) * np.eye(V)[np.maximum(labels, 0)] + smoothing / V
    loss = log_total - (target * logits).sum(-1) + z_loss * log_total**2
    probability = np.exp(logits - log_total[..., None])
    of_logits = probability * (1 + 2 * z_loss * log_total[..., None]) - target
    of_logits *= weights[..., None]
    gradients = {
        "hidden": of_logits @ kernel.T,
        "kernel": np.einsum("btd,btv->dv", hidden, of_logits),
        "weights": np.zeros(weights.shape),
    }
    return (weights * loss).sum(), gradients


def plain(hidden, kernel, labels, weights):
    return (linear_cross_entropy(hidden, kernel, labels, weights, chunk_size=8),)


def tied(hidden, kernel, labels, weights):
    return plain(hidden, ops.transpose(kernel), labels, weights)


def smoothed(hidden, kernel, labels, weights):
    options = {"label_smoothing": 0.1, "z_loss": 0.02, "chunk_size": 6}
    return (linear_cross_entropy(hidden, kernel, labels, weights, **options),)


def assert_agrees(actual, expected, tolerances=(1e-6, 1e-5)):
    (loss,), gradients = actual
    assert_close(loss, expected[0], tolerances[0], "loss")
    for name, gradient in expected[1].items():
        if np.any(gradient):
            assert_close(gradients[name], gradient, tolerances[1], name)
        else:
            assert not np.any(gradients[name])


@pytest.mark.parametrize(
    "function, options",
    [(plain, {}), (smoothed, {"smoothing": 0.1, "z_loss": 0.02})],
    ids=["plain", "smoothed"],
)
def test_values_and_gradients(function, options):
    inputs = inputs_of()
    actual = value_and_grad(function, inputs, [np.float32(1)])
    assert_agrees(actual, reference(inputs, **options))


def test_bfloat16():
    inputs = inputs_of(dtype="bfloat16")
    actual = value_and_grad(plain, inputs, [np.float32(1)])
    assert_agrees(actual, reference(inputs), (5e-3, 1e-2))


def test_compiled_with_unknown_length():
    inputs = inputs_of()
    expected = reference(inputs)
    # As a tied embedding gives it.
    inputs["kernel"] = inputs["kernel"].T.copy()
    expected[1]["kernel"] = expected[1]["kernel"].T
    actual = compiled_value_and_grad(tied, inputs, [np.float32(1)], T)
    assert_agrees(actual, expected)


def test_no_token_counts():
    inputs = inputs_of()
    inputs["weights"][:] = 0
    (loss,), gradients = value_and_grad(plain, inputs, [np.float32(1)])
    assert loss == 0
    assert not any(np.any(gradient) for gradient in gradients.values())


def test_tokens_losses_and_hits():
    inputs = inputs_of()
    inputs["hidden"][np.isnan(inputs["hidden"])] = 0.1
    inputs["labels"][1, 4] = V  # Impossible: it must not pass unseen.
    weights = inputs.pop("weights")
    losses, correct = token_cross_entropy(**inputs)
    losses, correct = (ops.convert_to_numpy(x) for x in (losses, correct))
    assert np.isnan(losses[1, 4]) and np.isfinite(losses).sum() == losses.size - 1
    assert not losses[:, 3].any()
    logits = inputs["hidden"] @ inputs["kernel"]
    np.testing.assert_array_equal(correct, logits.argmax(-1) == inputs["labels"])
    weights[1, 4] = 0
    losses[1, 4] = 0
    expected = (losses * weights)[inputs["labels"] >= 0].sum()
    expected /= weights[inputs["labels"] >= 0].sum()
    loss = linear_cross_entropy(**inputs, weights=weights)
    np.testing.assert_allclose(ops.convert_to_numpy(loss), expected, rtol=1e-6)


def large(hidden, kernel):
    labels = ops.zeros(hidden.shape[:2], "int32")
    return (linear_cross_entropy(hidden, kernel, labels, chunk_size=64),)


def test_memory_holds_a_chunk_of_logits():
    length, width, vocabulary = 1024, 8, 600
    inputs = {
        "hidden": np.zeros((1, length, width), "float32"),
        "kernel": np.zeros((width, vocabulary), "float32"),
    }
    all_logits = 4 * length * vocabulary
    kept = kept_for_backward(large, inputs, [np.float32(1)])
    assert kept <= 4 * 64 * vocabulary < all_logits / 10


@pytest.mark.parametrize(
    "name, changes",
    [
        ("hidden", {"hidden": np.zeros((B, T, D, 1), "float32")}),
        ("kernel", {"kernel": np.zeros((D + 1, V), "float32")}),
        ("labels", {"labels": np.zeros((B, T + 1), "int32")}),
        ("weights", {"weights": np.zeros((B,), "float32")}),
        ("label_smoothing", {"label_smoothing": 1.0}),
        ("z_loss", {"z_loss": -1.0}),
        ("chunk_size", {"chunk_size": 0}),
    ],
)
def test_bad_arguments_are_named(name, changes):
    with pytest.raises(ValueError, match=f"`{name}`"):
        linear_cross_entropy(**{**inputs_of(), **changes})


def test_weights_have_no_gradient_on_any_backend():
    inputs = inputs_of()
    _, gradients = value_and_grad(plain, inputs, [np.float32(1)])
    assert gradients["weights"].shape == (B, T) and not gradients["weights"].any()
    assert keras.backend.standardize_dtype(plain(**inputs)[0].dtype) == "float32"
