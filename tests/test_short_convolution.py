import numpy as np
import pytest
from contracts.short_convolution import ShortConvolutionContract

from keras_mom.ops import short_convolution


class TestPortable(ShortConvolutionContract):
    implementation = "portable"


X, KERNEL = np.zeros((2, 5, 6), "float32"), np.zeros((4, 6), "float32")


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("inputs", dict(inputs=X[0])),
        ("kernel", dict(kernel=KERNEL[:, :5])),
        ("activation", dict(activation="relu")),
        ("segment_ids", dict(segment_ids=np.zeros((2, 4), "int32"))),
        ("initial_state", dict(initial_state=np.zeros((2, 4, 6), "float32"))),
        ("cu_seqlens", dict(cu_seqlens=[0, 3])),
        ("cu_seqlens", dict(inputs=X[:1], cu_seqlens=[0, 3, 2])),
        ("cu_seqlens", dict(inputs=X[:1], cu_seqlens=[0, 6])),
        (
            "cu_seqlens",
            dict(
                inputs=X[:1], cu_seqlens=[0, 5], segment_ids=np.zeros((1, 5), "int32")
            ),
        ),
        (
            "initial_state",
            dict(
                inputs=X[:1],
                cu_seqlens=[0, 5],
                initial_state=np.zeros((2, 3, 6), "float32"),
            ),
        ),
        ("implementation", dict(implementation="fastest")),
    ],
)
def test_bad_input_is_named(name, arguments):
    with pytest.raises(ValueError, match=f"`{name}`"):
        short_convolution(**{"inputs": X, "kernel": KERNEL, **arguments})
