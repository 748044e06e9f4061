"""Routing against the float64 reference: ties, weights, balance, what is masked."""

import numpy as np
import pytest
from agreement import assert_close
from keras import ops

from keras_mom.ops import routing_statistics, top_k_routing
from keras_mom_kernels.routing.reference import route, softmax

array = ops.convert_to_numpy


def probabilities(seed=0, shape=(2, 30, 5)):
    random = np.random.default_rng(seed)
    return softmax(random.normal(size=shape)).astype("float32")


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_reference(top_k, masked):
    p = probabilities()
    mask = np.random.default_rng(1).uniform(size=p.shape[:2]) < 0.6 if masked else None
    expected = route(p, top_k, mask)
    weights, indices = top_k_routing(p, top_k)
    assert (array(indices) == expected.indices).all()
    assert_close(array(weights), expected.weights, 1e-6, "weights")
    statistics = routing_statistics(
        ops.convert_to_tensor(p), indices, None if mask is None else np.array(mask)
    )
    for name in ("share", "entropy", "balance_loss"):
        actual = array(getattr(statistics, name))
        assert_close(actual, getattr(expected, name), 1e-6, name)


def test_ties_go_to_the_lowest_index():
    p = np.array([[[0.2] * 5, [0.1, 0.3, 0.3, 0.0, 0.3], [0, 0, 0, 0, 1.0]]], "float32")
    _, indices = top_k_routing(p, 2)
    assert array(indices).tolist() == [[[0, 1], [1, 2], [4, 0]]]


def test_a_token_that_is_not_a_number_still_goes_to_k_memories():
    p = probabilities()
    p[0, 3] = np.nan
    weights, indices = top_k_routing(p, 2)
    assert array(indices)[0, 3].tolist() == [0, 1]
    others = np.ones(p.shape[:2], bool)
    others[0, 3] = False
    assert np.isfinite(array(weights)[others]).all()


def test_even_routing_has_a_balance_loss_of_one():
    p = np.full((1, 4, 4), 0.25, "float32")
    indices = np.array([[[0, 1], [2, 3], [1, 2], [3, 0]]], "int32")
    loss = routing_statistics(ops.convert_to_tensor(p), indices).balance_loss
    assert abs(float(array(loss)) - 1) < 1e-6


def test_nothing_counts_where_everything_is_masked():
    p = probabilities()
    _, indices = top_k_routing(p, 2)
    mask = np.zeros(p.shape[:2], bool)
    statistics = routing_statistics(ops.convert_to_tensor(p), indices, mask)
    assert (array(statistics.share) == 0).all()
    assert float(array(statistics.balance_loss)) == 0


@pytest.mark.parametrize("top_k", [0, 6])
def test_top_k_out_of_range(top_k):
    with pytest.raises(ValueError, match="`top_k`"):
        top_k_routing(probabilities(), top_k)
