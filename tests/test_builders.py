"""Encoder, classifier and forecaster, and the layers that they are made of."""

import keras
import numpy as np
import pytest

import keras_mom
from keras_mom.models import QuantileLoss, mom_classifier, mom_encoder, mom_forecaster
from keras_mom.models.masking import MaskedPooling
from keras_mom.models.window_layers import Forecast, WindowNormalization
from tests.layer_helpers import (
    EAGERLY,
    QUICK,
    assert_close,
    outputs_of,
    to_numpy,
    tokens,
)
from tests.selection import exhaustive_on

SIZES = {"num_layers": 1, "hidden_dim": 8, "num_heads": 2, "key_dim": 4}
# What compiles in the shortest time.
PLAIN = {**SIZES, **QUICK, "conv_width": None}
MASK = np.array([[0, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
IDS = np.random.default_rng(0).integers(0, 9, MASK.shape)
HORIZON = 3


@pytest.fixture(scope="module")
def encoder():
    """Logits a token, from token ids and a mask."""
    keras.utils.set_random_seed(0)
    return mom_encoder(
        **SIZES,
        vocabulary_size=9,
        num_classes=3,
        padding_mask=True,
        num_memories=3,
        update_rule="delta_net",
        norm_epsilon=1e-5,
    )


@pytest.fixture(scope="module")
def forecaster():
    """Quantiles of two series, from values, covariates and a mask."""
    keras.utils.set_random_seed(0)
    return mom_forecaster(
        2, HORIZON, **PLAIN, known_covariates=2, padding_mask=True, seed=1, dropout=0.1
    )


def window(seed=1):
    length = MASK.shape[1]
    return {
        "values": tokens(2, length, 2, seed=seed),
        "known_covariates": tokens(2, length + HORIZON, 2, seed=seed + 1),
        "padding_mask": MASK,
    }


def tagged(ids, mask):
    return {"token_ids": ids, "padding_mask": mask}


# Encoder.


def test_an_encoder_reads_in_both_directions_and_past_masked_tokens(encoder, tmp_path):
    outputs = outputs_of(encoder, tagged(IDS, MASK))
    assert outputs.shape == (2, 7, 3) and np.isfinite(outputs).all()
    assert not outputs[MASK == 0].any()
    other = np.where(MASK > 0, IDS, (IDS + 1) % 9)
    assert_close(outputs_of(encoder, tagged(other, MASK)), outputs, 1e-6)
    # The last valid token reaches the first, and the first the last.
    for changed, seen in ((6, 1), (1, 6)):
        other = IDS.copy()
        other[0, changed] = (other[0, changed] + 1) % 9
        moved = outputs_of(encoder, tagged(other, MASK)) - outputs
        assert np.abs(moved[0, seen]).max() > 1e-4
        # Eager TensorFlow need not give equal bits twice.
        assert np.abs(moved[1]).max() <= (1e-6 if EAGERLY else 0)

    encoder.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(encoder) and not loaded.compiled
    assert_close(outputs_of(loaded, tagged(IDS, MASK)), outputs, 1e-6)


def test_arguments_reach_the_layers(encoder):
    mixer = encoder.get_layer("block_0_mixer")
    for layer in (mixer.forward_layer, mixer.backward_layer):
        assert layer.num_memories == 3
        assert layer.update_rule.name.startswith("delta_net")
        assert layer.norm_epsilon == 1e-5
    assert encoder.get_layer("final_norm").epsilon == 1e-5
    assert encoder.get_layer("block_0_feed_forward").intermediate_dim == 16

    model = mom_classifier(
        5,
        **SIZES,
        feature_dim=3,
        bidirectional=False,
        intermediate_dim=7,
        conv_width=None,
        kernel_regularizer="l2",
        dtype="mixed_bfloat16",
    )
    mixer, mlp = (
        model.get_layer(f"block_0_{name}") for name in ("mixer", "feed_forward")
    )
    assert mixer.conv_width is None and mlp.intermediate_dim == 7
    assert mixer.kernel_regularizer is not None and mlp.kernel_regularizer is not None
    assert mixer.compute_dtype == mlp.compute_dtype == "bfloat16"
    assert model.get_layer("pooling").mode == "last"
    assert model.output.dtype == "float32" and model.output.shape == (None, 5)


def test_losses_leave_out_what_the_mask_does(encoder):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    encoder.compile("sgd", loss, run_eagerly=EAGERLY)
    labels = IDS % 3
    other = np.where(MASK > 0, labels, (labels + 1) % 3)
    losses = [
        encoder.evaluate(tagged(IDS, MASK), y, verbose=0) for y in (labels, other)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@exhaustive_on("tensorflow")
def test_rematerialization_changes_no_step():
    losses = []
    for remat in (False, True):
        keras.utils.set_random_seed(0)
        model = mom_encoder(**PLAIN, feature_dim=2, padding_mask=True, remat=remat)
        names = model.get_layer("block_0_mixer").forward_layer._remat_mode.layer_names
        assert bool(names) == remat or not remat
        model.compile(keras.optimizers.SGD(0.05), "mse", run_eagerly=EAGERLY)
        x, y = tokens(2, 7, 2), tokens(2, 7, 8, seed=2)
        inputs = {"features": x, "padding_mask": MASK}
        losses.append([float(model.train_on_batch(inputs, y)) for _ in range(2)])
    assert losses[0][1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


# Classifier.


def test_padding_changes_no_class():
    keras.utils.set_random_seed(0)
    model = mom_classifier(
        3, **PLAIN, vocabulary_size=9, padding_id=0, bidirectional=False
    )
    ids = 1 + IDS[:1] % 8
    padded = np.pad(ids, ((0, 0), (2, 3)))
    assert_close(outputs_of(model, padded), outputs_of(model, ids), 1e-5)


@pytest.mark.parametrize("mode", ("mean", "max", "last"))
def test_pooling_takes_valid_tokens(mode):
    values = tokens(3, 7, 4) - 2
    mask = np.concatenate([MASK, np.zeros((1, 7))]) > 0
    poisoned = np.where(mask[..., None], values, np.nan).astype("float32")
    layer = MaskedPooling(mode)
    reduce = {"mean": np.mean, "max": np.max, "last": lambda x, axis: x[-1]}[mode]
    expected = [reduce(x[m], axis=0) for x, m in zip(values[:2], mask[:2])]
    actual = to_numpy(layer(poisoned, mask=mask))
    assert_close(actual, np.stack([*expected, np.zeros(4, "float32")]), 1e-6)
    whole = np.stack([reduce(x, axis=0) for x in values])
    assert_close(to_numpy(layer(values)), whole, 1e-6)


# Forecaster.


def test_a_forecast_keeps_the_scale_of_its_window(forecaster, tmp_path):
    inputs = window()
    outputs = outputs_of(forecaster, inputs)
    assert outputs.shape == (2, HORIZON, 2, 3) and np.isfinite(outputs).all()
    assert (np.diff(outputs, axis=-1) > 0).all()
    scale, center = np.array([40, 0.01], "float32"), np.array([7, -3], "float32")
    moved = {**inputs, "values": inputs["values"] * scale + center}
    expected = outputs * scale[:, None] + center[:, None]
    assert_close(outputs_of(forecaster, moved), expected, 1e-4)
    # Steps that do not count, whatever they hold.
    hidden = np.where(MASK[..., None] > 0, inputs["values"], 1e9)
    assert_close(outputs_of(forecaster, {**inputs, "values": hidden}), outputs, 1e-5)
    # A covariate of the last step to come moves that step alone.
    known = inputs["known_covariates"].copy()
    known[:, -1] += 1
    change = outputs_of(forecaster, {**inputs, "known_covariates": known}) - outputs
    assert np.abs(change[:, -1]).max() > 1e-3 and np.abs(change[:, :-1]).max() < 1e-5

    forecaster.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(forecaster)
    assert_close(outputs_of(loaded, inputs), outputs, 1e-6)


@exhaustive_on("tensorflow")
def test_a_forecaster_learns_quantiles(forecaster):
    inputs = window()
    targets = 100 + tokens(2, HORIZON, 2, seed=4)
    loss = QuantileLoss((0.1, 0.5, 0.9))
    forecaster.compile(keras.optimizers.Adam(0.02), loss, run_eagerly=EAGERLY)
    losses = forecaster.fit(inputs, targets, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_values_without_quantiles_or_normalization():
    model = mom_forecaster(2, HORIZON, **SIZES, quantiles=None, normalize=False)
    assert model.output.shape == (None, HORIZON, 2)
    assert isinstance(model.input, keras.KerasTensor)
    layer = Forecast(2, HORIZON)
    hidden, center, scale = tokens(2, 6, 8), tokens(2, 1, 2), tokens(2, 1, 2) ** 2
    plain = to_numpy(layer(hidden))
    scaled = to_numpy(layer((hidden, center, scale)))
    assert plain.shape == (2, HORIZON, 2)
    assert_close(scaled, plain * scale + center, 1e-6)


def test_the_window_is_standardized():
    values = 50 + 10 * tokens(2, 7, 2)
    values[1, :, 1] = 12345.678  # a series that does not change
    normalized, center, scale = to_numpy(WindowNormalization()(values, mask=MASK > 0))
    for row in range(2):
        part = values[row][MASK[row] > 0].astype("float64")
        assert_close(center[row, 0], part.mean(0).astype("float32"), 1e-5)
        deviation = part.std(0)
        deviation[deviation < 1e-3] = 1
        assert_close(scale[row, 0], deviation.astype("float32"), 1e-4)
    assert not normalized[MASK == 0].any() and np.abs(normalized[1, :, 1]).max() < 0.01


@pytest.mark.parametrize("count", (1, 2, 5))
def test_quantiles_never_cross(count):
    layer = Forecast(2, HORIZON, count)
    outputs = to_numpy(layer(tokens(2, 6, 8)))
    assert outputs.shape == (2, HORIZON, 2, count)
    assert (np.diff(outputs, axis=-1) > 0).all()
    kernel, bias = to_numpy([v.value for v in layer.dense.variables])
    raw = (tokens(2, 6, 8)[:, -HORIZON:] @ kernel + bias).reshape(outputs.shape)
    assert_close(outputs[..., count // 2], raw[..., 0], 1e-5)


def test_the_quantile_loss_is_the_pinball_loss():
    quantiles = (0.1, 0.5, 0.75)
    true, predicted = tokens(4, 3, 2), tokens(4, 3, 2, 3, seed=2)
    error = true[..., None] - predicted
    q = np.array(quantiles)
    expected = np.where(error > 0, q * error, (q - 1) * error)
    loss = QuantileLoss(quantiles)
    assert float(loss(true, predicted)) == pytest.approx(expected.mean(), rel=1e-5)
    weights = (np.arange(4) > 1).astype("float32")[:, None, None]
    weighted = float(loss(true, predicted, weights * np.ones_like(true)))
    assert weighted == pytest.approx((expected * weights[..., None]).mean(), rel=1e-5)
    again = QuantileLoss.from_config(loss.get_config())
    assert again.quantiles == quantiles
    with pytest.raises(ValueError, match="with the 3 quantiles.*shape"):
        loss(true, predicted[..., :2])


# Bad arguments.

BAD = {
    "num_layers": (mom_encoder, {"num_layers": 0}),
    "hidden_dim": (mom_encoder, {"hidden_dim": 2.5}),
    "num_heads": (mom_encoder, {"num_heads": 0}),
    "intermediate_dim": (mom_encoder, {"intermediate_dim": -1}),
    "dropout": (mom_encoder, {"dropout": 1.0}),
    "feature_dim": (mom_encoder, {"feature_dim": 3}),
    "vocabulary_size": (mom_encoder, {"vocabulary_size": None}),
    "padding_id": (mom_encoder, {"padding_id": 9}),
    "padding_mask": (mom_encoder, {"padding_id": 0, "padding_mask": True}),
    "sequence_length": (mom_encoder, {"sequence_length": 0}),
    "activation": (mom_encoder, {"activation": "softmax"}),
    "top_k": (mom_encoder, {"top_k": 9}),
    "return_state": (mom_encoder, {"return_state": True}),
    "number_memories": (mom_encoder, {"number_memories": 2}),
    "num_classes": (mom_classifier, {"num_classes": 0}),
    "pooling": (mom_classifier, {"num_classes": 2, "pooling": "sum"}),
    "horizon": (mom_forecaster, {"horizon": 0}),
    "num_series": (mom_forecaster, {"num_series": 0}),
    "quantiles": (mom_forecaster, {"quantiles": (0.5, 0.1)}),
    "known_covariates": (mom_forecaster, {"known_covariates": -1}),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_the_argument(name):
    build, changes = BAD[name]
    own = {"num_series": 1, "horizon": 2} if build is mom_forecaster else {}
    if build is not mom_forecaster:
        own = {"vocabulary_size": 9}
    with pytest.raises(ValueError, match=f"`{name}`"):
        build(**{**SIZES, **own, **changes})


def test_the_builders_are_public():
    for name in ("mom_encoder", "mom_classifier", "mom_forecaster", "QuantileLoss"):
        assert name in keras_mom.models.__all__


def test_characters_get_the_tags_of_their_tokens():
    from examples.tagging import TAGS, tag_characters

    text = 'def f(x):\n    """Two\n    lines."""\n    return x + 1.5  # sum\n'
    codes, tags = tag_characters(text)
    assert "".join(chr(code - 1) for code in codes) == text
    letters = "".join(" " if tag == 0 else TAGS[tag][0] for tag in tags)
    assert letters[:9] == "kkk nonoo"
    assert letters[14 : text.index('"""\n') + 3] == "s" * len('"""Two\n    lines."""')
    assert letters[text.index("return") :] == "kkkkkk n o nnn  ccccc "
