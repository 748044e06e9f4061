"""Data generators: what is asked can be answered, and is as the sources have it."""

import numpy as np
import pytest

from keras_mom import tasks
from keras_mom.tasks.draws import distinct, first_places

MAKERS = {
    "multi_query_recall": dict(length=32, num_pairs=4, vocabulary_size=64),
    "in_context_recall": dict(length=32),
    "noisy_in_context_recall": dict(length=32, noise=0.4),
    "fuzzy_in_context_recall": dict(length=48),
    "selective_copying": dict(length=32, num_copied=6),
    "compression": dict(length=12),
    "memorization": dict(length=12),
    "needle_in_a_haystack": dict(length=40, num_needles=3, value_length=2),
    "phone_book": dict(num_entries=6, num_digits=3, num_queries=2),
}
COUNT = 200


def make(name, count=COUNT, **changes):
    return getattr(tasks, name)(count, **{**MAKERS[name], **changes})


def asked_places(found, row):
    return np.flatnonzero(found.weights[row])


@pytest.mark.parametrize("name", MAKERS)
def test_arrays_and_seeds(name):
    found = make(name, seed=3)
    for array, dtype in zip(found, ("int32", "int32", "float32")):
        assert array.dtype == dtype
        assert array.shape == found.inputs.shape
        assert len(array) == COUNT
    assert set(np.unique(found.weights)) <= {0, 1}
    assert np.all(found.weights.sum(axis=1) > 0)
    assert not np.any(found.targets[found.weights == 0])
    for array, again in zip(found, make(name, seed=3)):
        np.testing.assert_array_equal(array, again)
    assert np.any(found.inputs != make(name, seed=4).inputs)
    from_generator = make(name, seed=np.random.default_rng(3))
    np.testing.assert_array_equal(found.inputs, from_generator.inputs)


def test_distinct_draws_are_uniform():
    """Also where most of what is drawn at first has to be drawn anew."""
    rng = np.random.default_rng(0)
    for count, choices in ((4, 9), (6, 7)):
        drawn = distinct(rng, 20_000, count, choices)
        assert np.all(np.diff(np.sort(drawn, axis=1), axis=1) > 0)
        assert drawn.min() == 0 and drawn.max() == choices - 1
        for place in range(count):
            shares = np.bincount(drawn[:, place], minlength=choices) / len(drawn)
            np.testing.assert_allclose(shares, 1 / choices, atol=0.012)
    places = first_places(np.array([[5, 2, 5, 2, 7], [1, 1, 1, 0, 0]]))
    np.testing.assert_array_equal(places, [[0, 1, 0, 1, 4], [0, 0, 0, 3, 3]])


def test_multi_query_recall():
    found = make("multi_query_recall", num_passes=2, length=48)
    inputs, targets, weights = found
    pairs = inputs[:, :8].reshape(COUNT, 4, 2)
    np.testing.assert_array_equal(inputs[:, 8:16], inputs[:, :8])
    assert pairs[..., 0].min() == 1 and pairs[..., 0].max() == 31
    assert pairs[..., 1].min() == 32 and pairs[..., 1].max() == 63
    assert not weights[:, :16].any() and not weights[:, 1::2].any()
    for row in range(COUNT):
        keys, values = pairs[row].T
        assert len(set(keys)) == len(set(values)) == 4
        places = asked_places(found, row)
        assert sorted(inputs[row, places]) == sorted(keys)
        answers = dict(zip(keys, values))
        assert [answers[key] for key in inputs[row, places]] == list(
            targets[row, places]
        )
    empty = make("multi_query_recall", random_fill=False).inputs[:, 8:]
    assert np.all(np.sum(empty != 0, axis=1) == 4)


def test_gaps_follow_the_power_law():
    """One pair's gap has the probabilities themselves."""
    found = tasks.multi_query_recall(40_000, 22, 1, 64, power=0.3)
    gaps = np.argmax(found.weights, axis=1) // 2 - 1
    expected = np.arange(1, 11) ** -0.7
    shares = np.bincount(gaps, minlength=10) / len(gaps)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.01)


@pytest.mark.parametrize("name", ["in_context_recall", "noisy_in_context_recall"])
def test_in_context_recall(name):
    found = make(name)
    symbols = 16  # with 16 tokens of noise behind them in the noisy task
    noise = 0
    for row in range(COUNT):
        pairs = found.inputs[row].reshape(-1, 2)
        answers = {}
        for index, (key, value) in enumerate(pairs):
            asked = found.weights[row, 2 * index]
            assert not found.weights[row, 2 * index + 1]
            if key >= symbols:
                assert value >= symbols and not asked
                noise += 1
                continue
            assert key < symbols // 2 <= value < symbols
            assert asked == (key in answers)
            if asked:
                assert found.targets[row, 2 * index] == value == answers[key]
            answers[key] = value
        assert found.weights[row, -2] == 1
    share = noise / (COUNT * len(pairs))
    assert abs(share - (0.4 * 14 / 16 if "noisy" in name else 0)) < 0.04
    trained = make(name, training=True)
    np.testing.assert_array_equal(trained.inputs, found.inputs)
    np.testing.assert_array_equal(trained.targets[:, :-1], found.inputs[:, 1:])
    assert trained.weights[:, :-1].all() and not trained.weights[:, -1].any()


@pytest.mark.parametrize("training", [False, True])
def test_fuzzy_in_context_recall(training):
    found = make("fuzzy_in_context_recall", training=training)
    sizes = set()
    for row in range(COUNT):
        text = found.inputs[row]
        start = np.argmax(text != 15)
        assert start <= 9 and np.all(text[start:] < 15)
        # A pair is keys, below 7, and then values; a key begins behind a value.
        is_value = text >= 7
        begins = [i for i in range(start, len(text)) if not is_value[i]]
        begins = [i for i in begins if i == start or is_value[i - 1]]
        answers, expected = {}, np.zeros(len(text))
        for begin, end in zip(begins, [*begins[1:], len(text)]):
            middle = begin + np.argmax(is_value[begin:end])
            key, value = tuple(text[begin:middle]), tuple(text[middle:end])
            assert len(set(key)) == len(key) and len(set(value)) == len(value) <= 3
            sizes.add(len(key))
            if key in answers:
                assert answers[key] == value
                expected[middle - 1 : end - 1] = 1
            answers[key] = value
        if training:
            expected = np.arange(len(text)) >= start - 1
            expected[-1] = False
        np.testing.assert_array_equal(found.weights[row], expected)
        assert found.weights[row, -2] == 1
        places = asked_places(found, row)
        np.testing.assert_array_equal(found.targets[row, places], text[places + 1])
    assert sizes == ({1, 2, 3} if training else {3})


def test_selective_copying():
    inputs, targets, weights = make("selective_copying")
    assert np.all(inputs[:, -7] == 15) and np.all(inputs[:, -6:] == 14)
    assert np.all(weights == (np.arange(32) >= 26))
    first = inputs[:, :25]
    assert np.all(np.sum(first != 14, axis=1) == 6)
    np.testing.assert_array_equal(first[first != 14].reshape(COUNT, 6), targets[:, -6:])
    # A blank is as likely before each of the tokens.
    before = np.cumsum(first != 14, axis=1)[first == 14]
    np.testing.assert_allclose(
        np.bincount(before, minlength=7) / before.size, [1 / 6] * 6 + [0], atol=0.03
    )


def test_compression_and_memorization():
    inputs, targets, weights = make("compression")
    assert np.all(inputs[:, -1] == 15) and inputs[:, :-1].max() == 14
    assert np.all(targets == inputs) and weights.all()

    learned, tested = make("memorization"), make("memorization", seed=1)
    assert np.all(learned.weights == np.arange(12) % 2)
    answers = {}
    for found in (learned, tested):
        keys, values = found.inputs[:, ::2], found.targets[:, 1::2]
        assert np.all(found.inputs[:, 1::2] == 255)
        assert keys.max() < 127 <= values.min() and values.max() < 255
        for key, value in zip(keys.ravel(), values.ravel()):
            assert answers.setdefault(key, value) == value
    assert len(set(answers.values())) == len(answers)
    other = make("memorization", map_seed=1)
    assert np.any(other.targets != learned.targets)


@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_needle_in_a_haystack(depth):
    found = make("needle_in_a_haystack", depth=depth)
    starts = []
    for row, (text, targets) in enumerate(zip(found.inputs, found.targets)):
        assert list(asked_places(found, row)) == [38, 39]
        keys = np.flatnonzero((text > 0) & (text <= 21))
        # Three needles and the question, each behind other places.
        assert len(keys) == 4 and text[37] == 0 and keys[-1] == 38
        assert len(set(text[keys[:3]])) == 3
        (start,) = [place for place in keys[:3] if text[place] == text[38]]
        np.testing.assert_array_equal(text[start + 1 : start + 3], targets[38:])
        assert text[39] == targets[38]
        assert np.all((targets[38:] > 21) & (targets[38:] <= 42))
        assert np.sum(text > 42) == 40 - 9 - 3
        starts.append(start)
    places = {None: (0, 34), 0.0: (0, 0), 0.5: (15, 19), 1.0: (34, 34)}[depth]
    assert (min(starts), max(starts)) == places or depth == 0.5
    assert places[0] <= min(starts) and max(starts) <= places[1]


def test_phone_book():
    found = make("phone_book", num_first_names=3, num_last_names=2)
    lines = found.inputs.reshape(COUNT, 8, 7)
    targets, asked = (x.reshape(COUNT, 8, 7) for x in found[1:])
    assert np.all(lines[..., 2] == 10) and np.all(lines[..., -1] == 11)
    assert np.all(asked[:, 6:] == [0, 0, 1, 1, 1, 0, 0]) and not asked[:, :6].any()
    np.testing.assert_array_equal(targets[:, 6:, 2:5], lines[:, 6:, 3:6])
    for book in lines:
        entries = {tuple(line[:2]): tuple(line[3:6]) for line in book[:6]}
        assert len(entries) == 6
        assert set(book[:, 0]) <= {12, 13, 14} and set(book[:, 1]) <= {15, 16}
        for line in book[6:]:
            assert entries[tuple(line[:2])] == tuple(line[3:6])
        assert tuple(book[6, :2]) != tuple(book[7, :2])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("multi_query_recall", {"length": 15}, "`length` must be even"),
        ("multi_query_recall", {"length": 14}, "`length` must be at least 16"),
        ("multi_query_recall", {"vocabulary_size": 9}, "must be at least 10"),
        ("multi_query_recall", {"power": 0}, "`power` must be positive"),
        ("multi_query_recall", {"num_examples": 0}, "`num_examples` must be a pos"),
        ("in_context_recall", {"length": 2}, "`length` must be even and at least 4"),
        ("in_context_recall", {"vocabulary_size": 1}, "`vocabulary_size` must be at"),
        ("noisy_in_context_recall", {"noise": 1.5}, "`noise` must be from 0 to 1"),
        ("noisy_in_context_recall", {"vocabulary_size": 17}, "must be at least 18"),
        ("fuzzy_in_context_recall", {"length": 11}, "`length` must be at least 12"),
        ("fuzzy_in_context_recall", {"key_length": 8}, "must be at least 17"),
        ("selective_copying", {"length": 13}, "`length` must be at least 14"),
        ("selective_copying", {"vocabulary_size": 2}, "`vocabulary_size` must be at"),
        ("compression", {"length": 1}, "`length` must be at least 2"),
        ("memorization", {"length": 5}, "`length` must be even"),
        ("memorization", {"vocabulary_size": 2}, "`vocabulary_size` must be at"),
        ("needle_in_a_haystack", {"length": 11}, "`length` must be at least 12"),
        ("needle_in_a_haystack", {"depth": 2}, "`depth` must be from 0 to 1"),
        ("needle_in_a_haystack", {"vocabulary_size": 9}, "must be at least 10"),
        ("phone_book", {"num_queries": 7}, "`num_entries` must be at least 7"),
        ("phone_book", {"num_first_names": 2, "num_last_names": 2}, "at least `num_en"),
    ],
)
def test_impossible_settings(name, changes, message):
    with pytest.raises(ValueError, match=message):
        changes = dict(changes)
        make(name, changes.pop("num_examples", 2), **changes)
