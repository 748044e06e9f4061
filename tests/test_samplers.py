"""Samplers: what they choose, and that a seed decides it."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mom.models import samplers
from tests.layer_helpers import to_numpy

LOGITS = np.array([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 4.9, -2.0]], "float32")


def sample(sampler, logits=LOGITS, seed=0, step=0):
    seed, step = (ops.convert_to_tensor(np.array(x, "int32")) for x in (seed, step))
    return to_numpy(sampler.sample(ops.convert_to_tensor(logits), seed, step))


def shares(sampler, logits, count=20000):
    """How often each token comes."""
    chosen = sample(sampler, np.repeat(np.array([logits], "float32"), count, axis=0))
    return np.bincount(chosen, minlength=len(logits)) / count


def test_greedy_takes_the_most_probable():
    assert sample(samplers.get("greedy")).tolist() == [1, 0]


def test_hash_is_that_of_unsigned_integers():
    """Signed integers that wrap stand for unsigned ones, on every backend."""
    given = np.array([0, 1, 2, -1], "int32")
    hashed = to_numpy(samplers._hash(ops.convert_to_tensor(given))).view("uint32")
    expected = []
    for x in given.view("uint32").tolist():
        x ^= x >> 16
        x = x * 0x85EBCA6B % 2**32
        x ^= x >> 13
        x = x * 0xC2B2AE35 % 2**32
        expected.append(x ^ (x >> 16))
    assert hashed.tolist() == expected


def test_draws_are_uniform_and_independent():
    def uniform(seed, step):
        return to_numpy(samplers.uniform((seed, step), (500, 400)))

    drawn = uniform(5, 7)
    counts, _ = np.histogram(drawn, bins=50, range=(0, 1))
    assert 0 < drawn.min() and drawn.max() < 1
    # Chi squared with 49 degrees of freedom: beyond 100 by chance once in 10^4 or so.
    assert ((counts - 4000) ** 2 / 4000).sum() < 100
    for other in (uniform(5, 8), uniform(6, 7), np.roll(drawn, 1, 0)):
        assert abs(np.corrcoef(drawn.ravel(), other.ravel())[0, 1]) < 0.01
    assert (uniform(5, 7) == drawn).all()


def test_random_follows_the_distribution():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    found = shares(samplers.RandomSampler(), logits)
    np.testing.assert_allclose(found, [0.5, 0.3, 0.15, 0.05], atol=0.015)
    flatter = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    found = shares(samplers.RandomSampler(temperature=2.0), logits)
    np.testing.assert_allclose(found, flatter / flatter.sum(), atol=0.015)


def test_top_k_follows_the_distribution_of_k():
    logits = np.log([0.05, 0.5, 0.15, 0.3])
    found = shares(samplers.TopKSampler(k=2), logits)
    np.testing.assert_allclose(found, [0, 0.5 / 0.8, 0, 0.3 / 0.8], atol=0.015)
    # More than there are.
    found = shares(samplers.TopKSampler(k=9), logits)
    np.testing.assert_allclose(found, [0.05, 0.5, 0.15, 0.3], atol=0.015)


@pytest.mark.parametrize(
    "p, k, expected",
    [
        (0.75, None, [0, 0.5 / 0.8, 0, 0.3 / 0.8]),
        (0.5, None, [0, 1, 0, 0]),
        (1e-9, None, [0, 1, 0, 0]),
        (1.0, None, [0.05, 0.5, 0.15, 0.3]),
        (1.0, 3, [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
    ],
)
def test_top_p_takes_the_fewest_that_reach_p(p, k, expected):
    found = shares(samplers.TopPSampler(p=p, k=k), np.log([0.05, 0.5, 0.15, 0.3]))
    np.testing.assert_allclose(found, expected, atol=0.015)
    assert ((found > 0) == (np.array(expected) > 0)).all()


@pytest.mark.parametrize("name", ["random", "top_k", "top_p"])
def test_seed_and_step_decide(name):
    logits = np.zeros((64, 50), "float32")
    sampler = samplers.get(name)
    drawn = sample(sampler, logits, seed=3, step=4)
    assert (sample(sampler, logits, seed=3, step=4) == drawn).all()
    assert (sample(sampler, logits, seed=4, step=4) != drawn).any()
    assert (sample(sampler, logits, seed=3, step=5) != drawn).any()
    # Rows draw for themselves, whatever the batch.
    assert len(set(drawn.tolist())) > 1
    assert (sample(sampler, logits[:8], seed=3, step=4) == drawn[:8]).all()


def test_beams_keep_the_best_and_stay_where_they_are_done():
    sampler = samplers.BeamSampler(num_beams=2)
    logits = np.log([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).astype("float32")
    scores = np.log([[0.5, 0.4]]).astype("float32")
    given = [ops.convert_to_tensor(x) for x in (logits, scores)]
    done = ops.convert_to_tensor(np.array([[False, False]]))
    new, parent, token = to_numpy(sampler.advance(*given, done))
    np.testing.assert_allclose(np.exp(new), [[0.32, 0.25]], rtol=1e-5)
    assert (parent.tolist(), token.tolist()) == ([[1, 0]], [[2, 0]])
    done = ops.convert_to_tensor(np.array([[True, False]]))
    new, parent, token = to_numpy(sampler.advance(*given, done))
    np.testing.assert_allclose(np.exp(new), [[0.5, 0.32]], rtol=1e-5)
    assert (parent.tolist(), token.tolist()) == ([[0, 1]], [[0, 2]])
    first = to_numpy(sampler.first_scores(3))
    assert first.shape == (3, 2) and (first[:, 0] == 0).all() and (first < 1).all()


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.GreedySampler(),
        samplers.RandomSampler(0.7, seed=3),
        samplers.TopKSampler(k=4, temperature=0.5, seed=1),
        samplers.TopPSampler(p=0.3, k=9, temperature=2.0),
        samplers.BeamSampler(num_beams=3, temperature=0.9),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_serialization(sampler):
    config = samplers.serialize(sampler)
    again = samplers.get(config)
    assert type(again) is type(sampler)
    assert again.get_config() == sampler.get_config()
    assert keras.saving.serialize_keras_object(again) == config


def test_names_classes_and_instances():
    for name in samplers.names():
        assert isinstance(samplers.get(name), samplers.Sampler)
    sampler = samplers.TopKSampler(k=2)
    assert samplers.get(sampler) is sampler
    assert isinstance(samplers.get(samplers.BeamSampler), samplers.BeamSampler)


class WithState:
    """A sampler of KerasHub's protocol."""

    def __init__(self):
        self.generator = keras.random.SeedGenerator(0)
        self.variables = [self.generator.state]

    def compute_probabilities(self, logits):
        return ops.softmax(logits)

    def get_next_token(self, probabilities):
        logits = ops.log(probabilities)
        drawn = keras.random.categorical(logits, 1, seed=self.generator)
        return ops.squeeze(drawn, axis=-1)


def test_protocol_of_keras_hub():
    given = WithState()
    sampler = samplers.get(given)
    assert isinstance(sampler, samplers.KerasHubSampler)
    assert sampler.sampler is given and not sampler.has_own_loop
    before = to_numpy(given.generator.state)
    found = shares(sampler, np.log([0.5, 0.3, 0.2]))
    np.testing.assert_allclose(found, [0.5, 0.3, 0.2], atol=0.015)
    assert (to_numpy(sampler.variables[0]) != before).any()


def test_samplers_of_keras_hub():
    keras_hub = pytest.importorskip("keras_hub")
    greedy = samplers.get(keras_hub.samplers.GreedySampler())
    assert sample(greedy).tolist() == [1, 0]
    found = shares(
        samplers.get(keras_hub.samplers.TopKSampler(k=2, seed=0)),
        np.log([0.05, 0.5, 0.15, 0.3]),
    )
    np.testing.assert_allclose(found, [0, 0.5 / 0.8, 0, 0.3 / 0.8], atol=0.015)
    assert samplers.get("contrastive").has_own_loop
    assert samplers.get(keras_hub.samplers.BeamSampler()).has_own_loop


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: samplers.RandomSampler(temperature=0), "temperature"),
        (lambda: samplers.RandomSampler(seed=0.5), "seed"),
        (lambda: samplers.TopKSampler(k=0), "k"),
        (lambda: samplers.TopPSampler(p=0), "p"),
        (lambda: samplers.TopPSampler(p=1.1), "p"),
        (lambda: samplers.BeamSampler(num_beams=0), "num_beams"),
        (lambda: samplers.get("nothing"), "sampler"),
        (lambda: samplers.get(7), "sampler"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=f"`{message}` must .*Received: .+"):
        make()
