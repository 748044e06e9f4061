"""`MoMLayer` against a float64 transcription that runs token by token."""

import numpy as np
import pytest

from tests.layer_agreement import check_layer
from tests.layer_helpers import (
    assert_close,
    bfloat16_product,
    call,
    make_layer,
    relative_rms,
    round_to_bfloat16,
    to_bfloat16,
    tokens,
)
from tests.layer_reference import mom_layer, weights_of
from tests.selection import covering

VARIANTS = {
    "defaults": {},
    "no_shared_memory": {"shared_memory": False},
    "no_convolution": {"conv_width": None},
    "convolution_of_width_1": {"conv_width": 1},
    "no_gate": {"use_output_gate": False},
    "shared_projections": {"per_memory_projections": False},
    "shared_projections_alone": {
        "per_memory_projections": False,
        "shared_memory": False,
    },
    "value_dim_is_key_dim": {"value_dim": None, "num_heads": 1},
    "linear_attention": {"update_rule": "linear_attention"},
    "one_memory": {"num_memories": 1, "top_k": 1, "shared_memory": False},
    "every_memory": {"num_memories": 3, "top_k": 3, "norm_epsilon": 1e-3},
}

# Some come together where tests compile.
VARIANTS["shared_projections_and_narrow"] = {
    "per_memory_projections": False,
    "conv_width": 1,
    "use_output_gate": False,
}
VARIANTS["additive_alone"] = {
    "update_rule": "linear_attention",
    "shared_memory": False,
    "conv_width": None,
}

# Two chunks of the scan in the fuller memories, and rows left over.
BATCH, LENGTH, WIDTH = 2, 75, 12


def _mask():
    mask = np.random.default_rng(3).random((BATCH, LENGTH)) < 0.8
    mask[0, :4] = False
    mask[1, -5:] = False
    return mask


def _segments():
    # Documents of 9, 1, 30 and 35 tokens; an id is used again.
    lengths = [9, 1, 30, 35]
    ids = np.repeat([4, 9, 4, 2], lengths)
    return np.stack([ids, ids[::-1]]).astype("int32")


def _state(layer):
    shapes = [x.shape for x in layer.get_initial_state(BATCH)]
    return tuple(tokens(*shape, seed=7) for shape in shapes)


@pytest.mark.parametrize(
    "variant",
    covering(
        VARIANTS,
        [
            "defaults",
            "shared_projections_and_narrow",
            "shared_projections_alone",
            "every_memory",
        ],
    ),
)
def test_output_state_and_gradients(variant):
    layer = make_layer(return_state=True, **VARIANTS[variant])
    check_layer(layer, {})


@pytest.mark.parametrize(
    "variant",
    covering(
        ["defaults", "no_shared_memory", "linear_attention", "additive_alone"],
        ["defaults", "additive_alone"],
    ),
)
def test_with_mask_documents_and_state(variant):
    layer = make_layer(return_state=True, **VARIANTS[variant])
    given = {
        "mask": _mask(),
        "segment_ids": _segments(),
        "initial_state": _state(layer),
    }
    check_layer(layer, given)


@pytest.mark.parametrize("length", [1, 2])
def test_short_sequences(length):
    layer = make_layer(return_state=True)
    mask = np.array([[True] * length, [False] * length])
    check_layer(layer, {"mask": mask, "initial_state": _state(layer)}, length=length)


def test_go_backwards():
    layer = make_layer(return_state=True, go_backwards=True)
    inputs, mask, ids = tokens(BATCH, LENGTH, WIDTH), _mask(), _segments()
    expected = mom_layer(
        layer,
        weights_of(layer),
        inputs[:, ::-1].astype("float64"),
        mask=mask[:, ::-1],
        segment_ids=ids[:, ::-1],
    )
    assert_close(call(layer, inputs, mask=mask, segment_ids=ids), expected, 1e-5)


def test_route_is_the_routing_of_the_call():
    """The reference, routed as `route` tells, gives the layer's outputs."""
    layer = make_layer()
    inputs = tokens(BATCH, LENGTH, WIDTH)
    indices = np.asarray(layer.route(inputs)[1])
    expected, _ = mom_layer(
        layer, weights_of(layer), inputs.astype("float64"), indices=indices
    )
    assert relative_rms(call(layer, inputs), expected) < 1e-5


@pytest.mark.parametrize(
    "variant",
    covering(
        ["defaults", "no_convolution", "linear_attention", "additive_alone"],
        ["defaults", "additive_alone"],
    ),
)
def test_mixed_bfloat16(variant):
    """All that a bfloat16 layer adds to its bfloat16 projections stays below 5e-3.

    Inputs and kernels are bfloat16 numbers, and the reference projects with the
    framework's product of this dtype. The router is float32: the routing is the same.
    """
    layer = make_layer(dtype="mixed_bfloat16", return_state=True, **VARIANTS[variant])
    round_to_bfloat16(layer)
    inputs = to_bfloat16(tokens(BATCH, LENGTH, WIDTH))
    expected = mom_layer(
        layer, weights_of(layer), inputs.astype("float64"), product=bfloat16_product
    )
    assert_close(call(layer, inputs), expected, 5e-3)
