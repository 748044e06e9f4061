"""`MoMLayer` in `model.fit`: compilers, precisions, losses, statistics, states."""

import contextlib

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
    evaluate,
    make_layer,
    set_weights,
    to_numpy,
    tokens,
)
from tests.selection import covering, exhaustive, exhaustive_on, once

WIDTH = 12
SIZES = {"num_heads": 2, "key_dim": 6, "value_dim": 10}


def delayed(inputs):
    """A target that one layer can learn: the token before."""
    return np.pad(inputs[:, :-1], [[0, 0], [1, 0], [0, 0]])


def model_of(length=None, batch=None, **kwargs):
    """A model of one layer, and the layer."""
    layer = keras_mom.MoMLayer(**{**SIZES, **kwargs})
    inputs = keras.Input((length, WIDTH), batch_size=batch)
    model = keras.Model(inputs, layer(inputs))
    set_weights(layer)
    return model, layer


def fit(model, inputs, targets=None, epochs=4, **kwargs):
    """Losses of training on one batch an epoch."""
    targets = delayed(inputs) if targets is None else targets
    history = model.fit(
        inputs,
        targets,
        batch_size=kwargs.pop("batch_size", len(inputs)),
        epochs=epochs,
        shuffle=False,
        verbose=0,
        **kwargs,
    )
    return history.history["loss"]


def compiled(model, rate=0.02, optimizer=None, **kwargs):
    kwargs.setdefault("run_eagerly", EAGERLY and "jit_compile" not in kwargs)
    optimizer = optimizer or keras.optimizers.Adam(rate)
    model.compile(optimizer, kwargs.pop("loss", "mse"), **kwargs)
    return model


def assert_falls(losses):
    assert np.isfinite(losses).all(), losses
    assert losses[-1] < 0.97 * losses[0], losses


# Compilers. On torch, `jit_compile=True` is `torch.compile`.


COMPILED = BACKEND != "torch"


# "auto" is True on JAX, and False on TensorFlow without a GPU, where
# `test_tensorflow.py` compares all of them.
HOW = {
    "jax": [True, False],
    "tensorflow": ["auto"],
    # `torch.compile` of a training step takes more than a minute.
    "torch": [pytest.param(True, marks=exhaustive), False, "auto"],
}


@pytest.mark.parametrize("jit_compile", HOW[BACKEND])
def test_fit_with_a_length_that_is_not_known(jit_compile):
    model, _ = model_of(None)
    compiled(model, jit_compile=jit_compile)
    assert_falls(fit(model, tokens(4, 10, WIDTH)))


@once
def test_fit_with_a_fixed_length():
    model, _ = model_of(10, **QUICK)
    compiled(model, jit_compile=COMPILED)
    assert_falls(fit(model, tokens(4, 10, WIDTH)))


@once
def test_fit_with_two_lengths_in_turn():
    model, _ = model_of(None)
    compiled(model, jit_compile=COMPILED)
    losses = {10: [], 7: []}
    for _ in range(4):
        for length, history in losses.items():
            history += fit(model, tokens(4, length, WIDTH), epochs=1)
    for history in losses.values():
        assert_falls(history)


@exhaustive_on("tensorflow")
def test_compilers_agree():
    """One step, compiled and not, from the same weights."""
    results = []
    for jit_compile in (COMPILED or "auto", False):
        model, layer = model_of(10, balance_loss_weight=0.1)
        sgd = keras.optimizers.SGD(0.1)
        compiled(model, optimizer=sgd, jit_compile=jit_compile)
        fit(model, tokens(4, 10, WIDTH), epochs=2)
        results.append([to_numpy(v.value) for v in layer.trainable_variables])
    assert_close(*results, 1e-5)


@pytest.mark.parametrize(
    "dtype", covering(["mixed_bfloat16", "mixed_float16"], ["mixed_bfloat16"])
)
def test_fit_with_mixed_precision(dtype):
    model, layer = model_of(10, dtype=dtype)
    compiled(model, optimizer="adam")
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    # Keras scales the loss where the model itself, not one layer, is float16.
    assert not scaled
    if dtype == "mixed_float16":
        adam = keras.optimizers.Adam(0.02)
        compiled(model, optimizer=keras.optimizers.LossScaleOptimizer(adam))
    else:
        compiled(model)
    assert_falls(fit(model, tokens(4, 10, WIDTH), epochs=6))
    assert all(v.dtype == "float32" for v in layer.trainable_variables)
    assert all(np.isfinite(to_numpy(v.value)).all() for v in layer.variables)


def test_fit_under_the_global_float16_policy():
    """Keras adds the loss scale by itself."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, layer = model_of(10, **QUICK)
        compiled(model, rate=0.02, jit_compile="auto")
        losses = fit(model, tokens(4, 10, WIDTH), epochs=6)
    finally:
        keras.config.set_dtype_policy(policy)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert layer.compute_dtype == "float16"
    assert_falls(losses)


# The balance loss and other losses.


def balance_by_hand(layer, inputs, mask=None):
    """`M * sum_m f_m P_m / k`, from the router's kernel."""
    logits = inputs.astype("float64") @ to_numpy(layer.router.kernel.value)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    valid = np.ones(inputs.shape[:2], bool) if mask is None else mask
    fraction, mean = np.zeros(layer.num_memories), np.zeros(layer.num_memories)
    for p in probabilities[valid]:
        chosen = np.argsort(-p, kind="stable")[: layer.top_k]
        fraction[chosen] += 1 / valid.sum()
        mean += p / valid.sum()
    loss = layer.num_memories * (fraction * mean).sum() / layer.top_k
    return loss, fraction / layer.top_k


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_loss(masked):
    layer = make_layer(balance_loss_weight=0.3)
    inputs = tokens(3, 20, WIDTH) + 1
    mask = None
    if masked:
        mask = np.random.default_rng(0).random((3, 20)) < 0.6
        inputs[~mask] = np.nan
    layer(inputs, mask=mask)
    (loss,) = layer.losses
    expected, _ = balance_by_hand(layer, inputs, mask)
    assert expected > 1.05
    np.testing.assert_allclose(to_numpy(loss), 0.3 * expected, rtol=1e-5)


def test_a_perfect_balance_is_1():
    layer = make_layer(num_memories=4, top_k=1, balance_loss_weight=1.0)
    kernel = np.zeros((WIDTH, 4), "float32")
    kernel[:4] = np.eye(4)
    layer.router.kernel.assign(kernel)
    inputs = np.zeros((1, 8, WIDTH), "float32")
    inputs[0, np.arange(8), np.arange(8) % 4] = 3.0
    layer(inputs)
    np.testing.assert_allclose(to_numpy(layer.losses[0]), 1.0, rtol=1e-6)


def test_a_weight_of_0_adds_no_loss():
    layer = make_layer(balance_loss_weight=0)
    layer(tokens(2, 5, WIDTH), training=True)
    assert layer.losses == []


def test_the_balance_loss_counts_in_fit():
    model, layer = model_of(10, balance_loss_weight=0.5, **QUICK)
    compiled(model, optimizer=keras.optimizers.SGD(0.0))
    inputs = tokens(4, 10, WIDTH)
    targets = delayed(inputs)
    error = np.mean((model.predict(inputs, verbose=0) - targets) ** 2)
    expected = error + 0.5 * balance_by_hand(layer, inputs)[0]
    np.testing.assert_allclose(fit(model, inputs, epochs=1), [expected], rtol=1e-5)
    measured = model.evaluate(inputs, targets, verbose=0)
    np.testing.assert_allclose(measured, expected, rtol=1e-5)


@once
def test_the_balance_loss_balances():
    model, layer = model_of(20, balance_loss_weight=1.0, top_k=1, **QUICK)
    kernel = 0.1 * to_numpy(layer.router.kernel.value)
    kernel[0] = [2.0, 0.0, 0.0, -2.0]
    layer.router.kernel.assign(kernel)
    inputs = tokens(8, 20, WIDTH)
    inputs[..., 0] = 1.0
    before, share = balance_by_hand(layer, inputs)
    assert before > 2 and share[0] > 0.9
    loss, how = (lambda y, p: 0.0 * p[..., 0]), {"jit_compile": COMPILED or "auto"}
    compiled(model, rate=0.1, loss=loss, **how)
    fit(model, inputs, epochs=30)
    after, share = balance_by_hand(layer, inputs)
    assert after < 1.1
    assert share.min() > 0.1


def kernels_of(layer):
    return [v for v in layer.trainable_variables if v.name == "kernel"]


def test_regularizers():
    layer = make_layer(kernel_regularizer=keras.regularizers.L2(0.1))
    layer(tokens(2, 5, WIDTH))
    # Router, query, key, value, gate, output, and the rule's two; not convolutions.
    assert len(kernels_of(layer)) == 8
    assert len(layer.losses) == 9
    by_hand = sum(0.1 * np.sum(to_numpy(v.value) ** 2) for v in kernels_of(layer))
    by_hand += 0.01 * balance_by_hand(layer, tokens(2, 5, WIDTH))[0]
    total = sum(float(to_numpy(loss)) for loss in layer.losses)
    np.testing.assert_allclose(total, by_hand, rtol=1e-5)


def test_constraints():
    limit = 0.2
    constraint = keras.constraints.MaxNorm(limit, axis=0)
    model, layer = model_of(10, kernel_constraint=constraint, **QUICK)
    assert len(kernels_of(layer)) == 6
    norms = [np.linalg.norm(to_numpy(v.value), axis=0) for v in kernels_of(layer)]
    assert max(n.max() for n in norms) > 2 * limit
    compiled(model)
    fit(model, tokens(4, 10, WIDTH), epochs=1)
    for variable in kernels_of(layer):
        norm = np.linalg.norm(to_numpy(variable.value), axis=0)
        assert norm.max() < limit * 1.001


@pytest.mark.parametrize(
    "seed",
    [3, None, keras.random.SeedGenerator(3)],
    ids=["number", "none", "generator"],
)
def test_initializers(seed):
    """Each memory's block is drawn as a kernel of its own, and from its own seed."""
    layer = keras_mom.MoMLayer(
        2, 50, num_memories=3, kernel_initializer=keras.initializers.HeNormal(seed=seed)
    )
    layer.build((None, None, 100))
    kernel = to_numpy(layer.key_projection.kernel.value)
    blocks = np.split(kernel, 4, axis=1)
    for i, block in enumerate(blocks):
        np.testing.assert_allclose(block.std(), np.sqrt(2 / 100), rtol=0.05)
        for other in blocks[:i]:
            assert not np.allclose(block, other)
    rate = np.exp(to_numpy(layer.update_rule.a_log.value))
    step = np.log1p(np.exp(to_numpy(layer.update_rule.dt_bias.value)))
    assert ((rate > 0) & (rate < 16)).all()
    assert ((step > 0.001 - 1e-6) & (step < 0.1 + 1e-6)).all()


# Routing statistics.


class Reader(keras.callbacks.Callback):
    """Reads the statistics behind each batch, as a user's callback does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        self.seen.append(self.layer.routing_statistics)


def test_statistics_are_readable_during_training():
    model, layer = model_of(10, **QUICK)
    compiled(model, optimizer=keras.optimizers.SGD(0.0))
    inputs = tokens(6, 10, WIDTH)
    reader = Reader(layer)
    fit(model, inputs, epochs=1, batch_size=2, callbacks=[reader])
    assert len(reader.seen) == 3
    for start, statistics in zip((0, 2, 4), reader.seen):
        _, share = balance_by_hand(layer, inputs[start : start + 2])
        np.testing.assert_allclose(statistics["share"], share, atol=1e-6)
        np.testing.assert_allclose(statistics["share"].sum(), 1, rtol=1e-6)
        assert 0 < statistics["entropy"] < np.log(4)
    assert not np.allclose(reader.seen[0]["share"], reader.seen[1]["share"])
    # After `fit`, the last batch; inference leaves them alone.
    after = layer.routing_statistics
    np.testing.assert_array_equal(after["share"], reader.seen[-1]["share"])
    model.predict(inputs, verbose=0)
    model.evaluate(inputs, inputs, verbose=0)
    np.testing.assert_array_equal(layer.routing_statistics["share"], after["share"])
    assert layer.routing_statistics["entropy"] == after["entropy"]


def test_statistics_of_a_call():
    layer = make_layer()
    inputs = tokens(2, 20, WIDTH)
    mask = np.random.default_rng(0).random((2, 20)) < 0.6
    call(layer, inputs, mask=mask)
    assert not layer.routing_statistics["share"].any()
    call(layer, inputs, mask=mask, training=True)
    _, share = balance_by_hand(layer, inputs, mask)
    np.testing.assert_allclose(layer.routing_statistics["share"], share, atol=1e-6)

    logits = inputs @ to_numpy(layer.router.kernel.value)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1)[mask].mean()
    np.testing.assert_allclose(layer.routing_statistics["entropy"], entropy, rtol=1e-5)


# Rematerialization.

SCOPES = {
    "full": {"mode": "full"},
    "list of layers": {"mode": "list_of_layers", "layer_names": ["mom"]},
    "larger than": {"mode": "larger_than", "output_size_threshold": 1},
    "another layer": {"mode": "list_of_layers", "layer_names": ["dense"]},
}


def _train(scope=None):
    """What training leaves behind, and how often the layer was computed."""
    settings = {**SIZES, **QUICK, "name": "mom", "balance_loss_weight": 0.1}
    # Only the layer: Keras cannot rematerialize a whole model on TensorFlow.
    with keras.RematScope(**scope) if scope else contextlib.nullcontext():
        layer = keras_mom.MoMLayer(**settings)
    inputs = keras.Input((10, WIDTH))
    model = keras.Model(inputs, layer(inputs))
    set_weights(layer)
    compute, runs = layer._compute, []

    def counted(*args, **kwargs):
        runs.append(1)
        return compute(*args, **kwargs)

    layer._compute = counted
    compiled(model, optimizer=keras.optimizers.SGD(0.1))
    losses = fit(model, tokens(4, 10, WIDTH), epochs=3)
    left = [to_numpy(v.value) for v in layer.variables], np.array(losses)
    return left, layer.routing_statistics["share"], len(runs)


@pytest.fixture(scope="module")
def trained():
    return _train()


@pytest.mark.parametrize("scope", covering(SCOPES, ["full", "larger than"]))
def test_remat_changes_no_result(scope, trained):
    """Weights behind training, and so gradients; losses; and statistics."""
    left, share, runs = _train(SCOPES[scope])
    expected, expected_share, expected_runs = trained
    assert_close(left, expected, 1e-5)
    np.testing.assert_allclose(share, expected_share, atol=1e-6)
    if BACKEND == "torch":
        # The backward pass computes the layer again; JAX and TF trace it once.
        # Keras calls a model once without a gradient before it trains.
        again = 1 if scope == "another layer" else 2
        assert runs == 1 + again * (expected_runs - 1)


@exhaustive_on("tensorflow")
def test_remat_with_everything_given():
    inputs, cotangent = tokens(2, 10, WIDTH), tokens(2, 10, WIDTH, seed=2)
    plain = make_layer(return_state=True)
    given = {
        "mask": np.random.default_rng(0).random((2, 10)) < 0.7,
        "segment_ids": np.repeat([[1, 2]], [6, 4], axis=1).repeat(2, axis=0),
        "initial_state": tuple(tokens(*x.shape) for x in plain.get_initial_state(2)),
    }
    with keras.RematScope("full"):
        layer = make_layer(return_state=True)
    expected = evaluate(plain, inputs, cotangent, **given)
    assert_close(evaluate(layer, inputs, cotangent, **given), expected, 1e-5)


# Stateful layers.


def test_stateful_calls_continue():
    layer = make_layer(stateful=True, batch=2)
    inputs = tokens(2, 20, WIDTH)
    whole = call(make_layer(), inputs)
    first, second = call(layer, inputs[:, :10]), call(layer, inputs[:, 10:])
    assert_close(np.concatenate([first, second], axis=1), whole, 1e-5)
    layer.reset_state()
    assert_close(call(layer, inputs[:, :10]), first, 1e-6)
    # A state that is given takes the place of the layer's own.
    empty = tuple(np.zeros(x.shape, "float32") for x in layer.get_initial_state(2))
    assert_close(call(layer, inputs[:, :10], initial_state=empty), first, 1e-6)


def test_stateful_predict_and_fit():
    model, layer = model_of(5, batch=2, stateful=True)
    compiled(model, optimizer=keras.optimizers.SGD(0.0))
    inputs = tokens(2, 20, WIDTH)
    whole, state = call(make_layer(return_state=True), inputs)
    # Batches of two rows: pieces of the same two sequences.
    pieces = np.concatenate(np.split(inputs, 4, axis=1))
    output = model.predict(pieces, batch_size=2, verbose=0)
    output = np.concatenate(np.split(output, 4), axis=1)
    assert_close(output, whole, 1e-5)
    assert_close(tuple(to_numpy(v.value) for v in layer.states), state, 1e-5)

    layer.reset_state()
    assert not any(to_numpy(v.value).any() for v in layer.states)
    fit(model, pieces, epochs=1, batch_size=2)
    assert_close(tuple(to_numpy(v.value) for v in layer.states), state, 1e-5)
    assert len(layer.trainable_variables) == 14


# What is returned.


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_last_output(masked, backwards):
    inputs = tokens(3, 10, WIDTH)
    mask = None
    if masked:
        mask = np.ones((3, 10), bool)
        mask[0, 6:] = mask[1, :4] = mask[2] = False
    sequences = call(make_layer(go_backwards=backwards), inputs, mask=mask)
    layer = make_layer(go_backwards=backwards, return_sequences=False)
    output = call(layer, inputs, mask=mask)
    if not masked:
        expected = sequences[:, -1]
    elif backwards:
        expected = np.stack([sequences[0, 9], sequences[1, 5], 0 * sequences[2, 0]])
    else:
        expected = np.stack([sequences[0, 5], sequences[1, 9], 0 * sequences[2, 0]])
    assert_close(output, expected, 1e-6)
    assert layer.compute_output_shape((3, 10, WIDTH)) == (3, WIDTH)


def test_go_backwards_returns_the_order_of_processing():
    inputs = tokens(2, 10, WIDTH)
    backwards = call(make_layer(go_backwards=True), inputs)
    assert_close(backwards, call(make_layer(), inputs[:, ::-1]), 1e-6)


def test_a_single_token():
    """The path without packing, against a sequence whose other token is masked."""
    layer = make_layer(return_state=True)
    inputs = tokens(2, 2, WIDTH)
    mask = np.array([[True, False]] * 2)
    output, state = call(layer, inputs, mask=mask)
    assert_close(call(layer, inputs[:, :1]), (output[:, :1], state), 1e-5)


def test_everything_given_in_a_functional_model(tmp_path):
    """State, documents and mask as inputs of a model that is saved and loaded."""
    layer = keras_mom.MoMLayer(**SIZES, return_state=True)
    shapes = [x.shape[1:] for x in layer.get_initial_state(1)]
    inputs = {
        "x": keras.Input((None, WIDTH)),
        "ids": keras.Input((None,), dtype="int32"),
        "mask": keras.Input((None,), dtype="bool"),
        "memories": keras.Input(shapes[0]),
        "windows": keras.Input(shapes[1]),
    }
    output, state = layer(
        inputs["x"],
        mask=inputs["mask"],
        segment_ids=inputs["ids"],
        initial_state=(inputs["memories"], inputs["windows"]),
    )
    assert output.shape == (None, None, WIDTH)
    assert [x.shape[1:] for x in state] == shapes
    model = keras.Model(inputs, [output, *state])
    given = {
        "x": tokens(2, 9, WIDTH),
        "ids": np.repeat([[1, 2]], [4, 5], axis=1).repeat(2, axis=0).astype("int32"),
        "mask": np.arange(9)[None] >= np.array([[0], [3]]),
        "memories": tokens(2, *shapes[0]),
        "windows": tokens(2, *shapes[1]),
    }
    expected, states = call(
        layer,
        given["x"],
        mask=given["mask"],
        segment_ids=given["ids"],
        initial_state=(given["memories"], given["windows"]),
    )
    model.save(tmp_path / "model.keras")
    for again in (model, keras.saving.load_model(tmp_path / "model.keras")):
        actual = again.predict(given, verbose=0)
        assert_close(actual, [expected, *states], 1e-5)


@pytest.mark.parametrize("return_state", [False, True])
def test_masks_reach_through_a_functional_model(return_state):
    """From `Embedding(mask_zero=True)` through two layers to the loss."""
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(9, WIDTH, mask_zero=True)(ids)
    x = keras_mom.MoMLayer(**SIZES, return_state=return_state)(x)
    x = x[0] if return_state else x
    outputs = keras_mom.MoMLayer(**SIZES)(x)
    model = compiled(keras.Model(ids, outputs), optimizer=keras.optimizers.SGD(0.0))
    short = np.array([[3, 1, 4, 1, 5], [8, 2, 6, 5, 3]])
    padded = np.zeros((2, 9), "int64")
    padded[0, :5], padded[1, [1, 2, 4, 5, 8]] = short[0], short[1]
    expected = model.predict(short, verbose=0)
    output = model.predict(padded, verbose=0)
    assert_close(output[padded > 0].reshape(expected.shape), expected, 1e-5)
    assert not output[padded == 0].any()

    # The loss leaves masked tokens out: their targets do not matter.
    targets = tokens(2, 9, WIDTH)
    before = model.evaluate(padded, targets, verbose=0)
    targets[padded == 0] = 1e3
    np.testing.assert_allclose(
        model.evaluate(padded, targets, verbose=0), before, rtol=1e-6
    )
