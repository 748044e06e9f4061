"""`MoMCausalLM`: its loss, training, evaluation and scores."""

import json

import keras
import numpy as np
import pytest

from keras_mom.models import MoMBackbone, MoMCausalLM
from tests.layer_helpers import BACKEND, EAGERLY, to_numpy

VOCABULARY, B, T = 11, 2, 9


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Optimisation takes most of a compilation on JAX, and these models are small."""
    if BACKEND != "jax":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_lm(**kwargs):
    sizes = dict(num_layers=1, hidden_dim=8, num_heads=2, key_dim=4)
    # Compiling the layer takes most of the time, and it is tested elsewhere.
    sizes |= dict(update_rule="linear_attention", shared_memory=False, conv_width=None)
    backbone = MoMBackbone(VOCABULARY, **{**sizes, **kwargs})
    lm = MoMCausalLM(backbone)
    random = np.random.default_rng(0)
    for variable in lm.trainable_variables:
        if len(variable.shape) == 2:
            variable.assign(0.5 * random.normal(size=variable.shape))
    return lm


@pytest.fixture(scope="module")
def lm():
    lm = make_lm(num_experts=2, experts_per_token=1)
    lm.compile(keras.optimizers.SGD(0.1), run_eagerly=EAGERLY)
    return lm


random = np.random.default_rng(1)
IDS = random.integers(0, VOCABULARY, size=(B, T)).astype("int32")
LABELS = random.integers(0, VOCABULARY, size=(B, T)).astype("int32")
LABELS[0, 4] = -1
WEIGHTS = random.uniform(size=(B, T)).astype("float32")
# Padding on the right, on the left and in the middle.
MASK = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1, 1, 1]], "int32")
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1], [3, 3, 3, 3, 3, 3, 3, 2, 2]], "int32")


def log_softmax(logits):
    logits = logits.astype("float64")
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def predictions(mask=None, segments=None):
    """(row, place, label) of each token that predicts the next."""
    for row, place in np.ndindex(B, T - 1):
        if mask is not None and not (mask[row, place] and mask[row, place + 1]):
            continue
        if segments is not None and segments[row, place] != segments[row, place + 1]:
            continue
        yield row, place, IDS[row, place + 1]


def expected_loss(logits, items, weight=lambda row, place: 1.0):
    scores = log_softmax(logits)
    losses = [(-scores[r, t, label], weight(r, t)) for r, t, label in items]
    return sum(x * w for x, w in losses) / sum(w for _, w in losses)


GIVEN = [(r, t, LABELS[r, t]) for r, t in np.ndindex(B, T) if LABELS[r, t] >= 0]
VALID = [(r, t, label) for r, t, label in GIVEN if MASK[r, t]]
CASES = {
    "ids": ({"token_ids": IDS}, {}, list(predictions()), None),
    "padding": (
        {"token_ids": IDS, "padding_mask": MASK},
        {},
        list(predictions(MASK)),
        None,
    ),
    "documents, weights of tokens": (
        {"token_ids": IDS, "padding_mask": MASK, "segment_ids": SEGMENTS},
        {"sample_weight": WEIGHTS},
        list(predictions(MASK, SEGMENTS)),
        lambda row, place: WEIGHTS[row, place + 1],
    ),
    "weights of rows": (
        {"token_ids": IDS},
        {"sample_weight": WEIGHTS[:, 0]},
        list(predictions()),
        lambda row, place: WEIGHTS[row, 0],
    ),
    "targets": ({"token_ids": IDS, "padding_mask": MASK}, {"y": LABELS}, VALID, None),
    "targets and weights": (
        {"token_ids": IDS},
        {"y": LABELS, "sample_weight": WEIGHTS},
        GIVEN,
        lambda row, place: WEIGHTS[row, place],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_which_tokens_count(lm, case):
    x, arguments, items, weight = CASES[case]
    logits = np.random.default_rng(2).normal(size=(B, T, VOCABULARY))
    weight = weight or (lambda row, place: 1.0)
    arguments = {"y": None, "sample_weight": None, **arguments}
    lm.reset_metrics()
    loss = lm.compute_loss(x=x, y_pred=logits.astype("float32"), **arguments)
    np.testing.assert_allclose(
        to_numpy(loss), expected_loss(logits, items, weight), rtol=1e-5
    )
    hits = [(logits[r, t].argmax() == label, weight(r, t)) for r, t, label in items]
    results = to_numpy(lm.get_metrics_result())
    np.testing.assert_allclose(results["perplexity"], np.exp(to_numpy(loss)), rtol=1e-5)
    np.testing.assert_allclose(
        results["accuracy"],
        sum(x * w for x, w in hits) / sum(w for _, w in hits),
        rtol=1e-5,
        atol=1e-7,
    )


def test_evaluate_and_score(lm):
    x = {"token_ids": IDS, "padding_mask": MASK}
    logits = lm.predict(x, verbose=0)
    results = lm.evaluate(x, verbose=0, return_dict=True)
    expected = expected_loss(logits, predictions(MASK))
    np.testing.assert_allclose(results["perplexity"], np.exp(expected), rtol=1e-4)
    # And the balance losses of the memories and the experts, each at least 0.01.
    assert 0.0199 < results["loss"] - expected < 0.06
    scores = lm.score(**x)
    values = np.zeros((B, T))
    for row, place, label in predictions(MASK):
        values[row, place + 1] = log_softmax(logits)[row, place, label]
    np.testing.assert_allclose(scores, values, atol=1e-4)
    np.testing.assert_allclose(lm.perplexity(**x), np.exp(expected), rtol=1e-4)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"token_ids": IDS, "padding_mask": MASK}


def values_of(lm):
    return {v.path: to_numpy(v.value) for v in lm.trainable_variables}


def changed(lm, before):
    return {
        path for path, value in values_of(lm).items() if (value != before[path]).any()
    }


def test_fit_moves_every_weight_and_survives_a_file(lm, tmp_path):
    before = values_of(lm)
    lm.compile(keras.optimizers.SGD(0.1), z_loss=1e-4, jit_compile=BACKEND != "torch")
    history = lm.fit(Batches(), epochs=5, verbose=0).history
    assert changed(lm, before) == set(before)
    assert history["loss"][-1] < history["loss"][0]
    assert set(history) == {"loss", "perplexity", "accuracy"}
    assert "keras.src" not in json.dumps(lm.get_compile_config())
    lm.save(tmp_path / "lm.keras")
    loaded = keras.saving.load_model(tmp_path / "lm.keras")
    assert loaded.get_compile_config() == lm.get_compile_config()
    assert int(to_numpy(loaded.optimizer.iterations.value)) == 10
    assert [metric.name for metric in loaded.metrics] == [m.name for m in lm.metrics]


def test_mixed_precision_accumulated_gradients_and_metrics_of_logits():
    lm = make_lm(dtype="mixed_bfloat16", tie_embeddings=True)
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    metric = keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="ce")
    lm.compile(optimizer, metrics=[metric])
    before = values_of(lm)
    results = lm.train_on_batch(IDS, return_dict=True)
    assert not changed(lm, before)
    # Without weights, the metric counts the last place too, whose target is 0.
    assert results["ce"] == pytest.approx(np.log(results["perplexity"]), rel=0.5)
    assert results["ce"] != pytest.approx(np.log(results["perplexity"]), rel=1e-4)
    lm.train_on_batch(IDS)
    assert changed(lm, before) == set(before)


def test_another_loss():
    lm = make_lm(balance_loss_weight=0)
    with pytest.raises(ValueError, match="z_loss"):
        lm.compile("sgd", "sparse_categorical_crossentropy", z_loss=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
    lm.compile("sgd", loss)
    x = {"token_ids": IDS, "padding_mask": MASK}
    logits = np.random.default_rng(2).normal(size=(B, T, VOCABULARY)).astype("float32")
    value = lm.compute_loss(x=x, y=None, y_pred=logits, sample_weight=None)
    np.testing.assert_allclose(
        to_numpy(value), expected_loss(logits, predictions(MASK)), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["token_ids", "padding_mask", "segment_ids"])
def test_bad_arguments_of_score_are_named(lm, name):
    arguments = {"token_ids": IDS, name: IDS[:, :3] if name != "token_ids" else IDS[0]}
    with pytest.raises(ValueError, match=f"`{name}`"):
        lm.score(**arguments)


# Bad input, and what files hold.


@pytest.mark.parametrize("packed", [False, True])
def test_weights_without_targets_count(packed):
    """Those of `x` alone: Keras would drop them."""
    lm = make_lm(packed=packed)
    lm.compile(keras.optimizers.SGD(0.0), run_eagerly=EAGERLY)
    inputs = {"token_ids": IDS, "padding_mask": MASK}
    if packed:
        inputs["segment_ids"] = SEGMENTS
    items = list(predictions(MASK, SEGMENTS if packed else None))
    logits = to_numpy(lm(inputs))
    for weights in (WEIGHTS, WEIGHTS[:, 0]):

        def weight(row, place, weights=weights):
            return weights[row, place + 1] if weights.ndim == 2 else weights[row]

        scores = log_softmax(logits)
        total = sum(weight(*item[:2]) for item in items)
        loss = -sum(weight(r, t) * scores[r, t, label] for r, t, label in items) / total
        found = lm.evaluate(inputs, sample_weight=weights, verbose=0, return_dict=True)
        np.testing.assert_allclose(found["perplexity"], np.exp(loss), rtol=1e-4)
    history = lm.fit(
        inputs,
        sample_weight=weights,
        validation_data=(inputs, None, weights),
        verbose=0,
    ).history
    np.testing.assert_allclose(history["perplexity"], np.exp(loss), rtol=1e-4)
    np.testing.assert_allclose(history["val_perplexity"], np.exp(loss), rtol=1e-4)
    with pytest.raises(ValueError, match=r"`sample_weight` must have .*\(2, 3\)"):
        lm.evaluate(inputs, sample_weight=WEIGHTS[:, :3], verbose=0)


def test_inputs_of_other_models_are_refused(lm):
    """Keras takes them for the token ids, in the order of their names."""
    inputs = {"token_ids": IDS, "padding_mask": MASK, "segment_ids": SEGMENTS}
    for function in (lm, lm.backbone, lm.fit, lm.evaluate):
        with pytest.raises(ValueError, match=r"segment_ids.*packed=True"):
            function(inputs)
    with pytest.raises(ValueError, match=r"segment_ids.*packed=True"):
        lm.score(IDS, segment_ids=SEGMENTS)
    with pytest.raises(ValueError, match=r"Received: \['labels'\] too"):
        lm({"token_ids": IDS, "labels": LABELS})
    assert lm.score(IDS[:0]).shape == (0, T)


def test_scores_follow_lora_and_quantization():
    lm = make_lm()
    for change in (lambda: lm.enable_lora(2), lambda: lm.quantize("int8")):
        before = lm.score(IDS)
        change()
        for index, variable in enumerate(lm.trainable_variables):
            if "lora" in variable.path:
                draw = np.random.default_rng(index).normal(size=variable.shape)
                variable.assign(draw)
        logits = to_numpy(keras.ops.cast(lm(IDS), "float32"))
        expected = np.take_along_axis(
            log_softmax(logits)[:, :-1], IDS[:, 1:, None], axis=2
        )[..., 0]
        found = lm.score(IDS)
        np.testing.assert_allclose(found[:, 1:], expected, rtol=1e-4, atol=1e-4)
        assert np.abs(found - before).max() > 1e-4


def test_whether_to_compile_is_the_loading_backends_choice():
    lm = make_lm()
    assert lm.get_compile_config()["jit_compile"] == "auto"
    lm.compile("sgd", jit_compile=False)
    assert lm.get_compile_config()["jit_compile"] is False


def test_misspelt_arguments_are_refused(lm):
    with pytest.raises(TypeError, match="MoMBackbone.*num_memory"):
        make_lm(num_memory=3)
    with pytest.raises(TypeError, match="MoMCausalLM.*tokenizer"):
        MoMCausalLM(lm.backbone, tokenizer=None)
