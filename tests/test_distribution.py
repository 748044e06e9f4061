"""Layouts of the layer's weights, and eight devices that train as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_mom
from keras_mom.distribution import layout_map

SCRIPT = Path(__file__).with_name("distribution_devices.py")
# What is whole on each device.
WHOLE = ("norm_scale", "routing_share", "router_entropy", "router/kernel")
HEADS, KEY_DIM, MEMORIES = 5, 11, 3


def make_mesh(names=("batch", "model")):
    return keras.distribution.DeviceMesh((1, 1), list(names), ["cpu:0"])


# Keras distributes over devices on JAX.
if keras.backend.backend() == "jax":

    def test_devices_train_as_one():
        path = os.pathsep.join(x for x in sys.path if x)
        done = subprocess.run(
            [sys.executable, SCRIPT],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        # Replicas; 8 shards; and 2 replicas of 4 shards, with the layer's kernels.
        for how, shards in (("data", 1), ("heads", 8), ("kernels", 4)):
            for name, count in found.pop(how).items():
                assert count == (1 if name in WHOLE else shards), (how, name)
        assert not found


@pytest.mark.parametrize("rule", keras_mom.rules.names())
def test_what_has_heads_is_sharded(rule):
    layouts = layout_map(make_mesh())
    layer = keras_mom.MoMLayer(
        HEADS, KEY_DIM, num_memories=MEMORIES, update_rule=rule, name="mo_m_layer_3"
    )
    layer.build((2, 7, 2))
    layer.enable_lora(2)
    for weight in layer.weights:
        layout = layouts[weight.path]
        of_heads = [
            axis for axis, size in enumerate(weight.shape) if size % HEADS == 0 and size
        ]
        if not of_heads:
            assert layout is None, weight.path
            continue
        axes = {name: axis for axis, name in enumerate(layout.axes) if name}
        assert axes == {"model": of_heads[0]}, weight.path


def test_states_are_sharded():
    layouts = layout_map(make_mesh())
    layer = keras_mom.MoMLayer(HEADS, KEY_DIM, stateful=True, name="mo_m_layer")
    layer.build((2, 7, 2))
    found = {x.path.split("/")[-1]: layouts[x.path] for x in layer.weights}
    assert found["memories"].axes == (None, None, "model") and found["windows"] is None


def test_other_layers_are_left_alone():
    layouts = layout_map(make_mesh(("batch", "tensor")), model_axis="tensor")
    assert layouts["attention/query/kernel"] is None
    assert layouts["block/mo_m_layer/query/kernel"].axes == (None, "tensor")
    named = layout_map(make_mesh(), layer_names="memory_[a-z]+")
    assert named["mo_m_layer/query/kernel"] is None
    assert named["memory_first/output/kernel"].axes == ("model", None)
    named["dense/kernel"] = (None, "model")
    assert named["dense/kernel"].axes == (None, "model")


def test_bad_arguments():
    with pytest.raises(TypeError, match="`device_mesh` must be.*'mesh' of type str"):
        layout_map("mesh")
    with pytest.raises(ValueError, match="`model_axis`.*'batch', 'model'.*'heads'"):
        layout_map(make_mesh(), model_axis="heads")
    for wrong in ("(", None):
        with pytest.raises(ValueError, match="`layer_names` must be a regular"):
            layout_map(make_mesh(), layer_names=wrong)


def test_blocks_of_a_model_are_sharded():
    layouts = layout_map(make_mesh())
    backbone = keras_mom.models.MoMBackbone(
        13, 2, 10, HEADS, 4, attention_layers=[1], num_experts=3, shared_expert=True
    )
    found = {x.path: layouts[x.path] for x in backbone.weights}
    sharded = {path: x.axes for path, x in found.items() if x is not None}
    for path, axes in {
        "block_0/mom/value/kernel": (None, "model"),
        "block_0/mom/gated_delta_net/decay/kernel": (None, "model"),
        "block_0/mom/output/kernel": ("model", None),
        "block_1/attention/key/kernel": (None, "model"),
        "block_1/attention/output/kernel": ("model", None),
        "block_1/feed_forward/experts_up/kernel": (None, "model"),
        "block_1/feed_forward/experts_down/kernel": ("model", None),
        "block_1/feed_forward/shared_expert/gate/kernel": (None, "model"),
        "block_1/feed_forward/shared_expert/down/kernel": ("model", None),
    }.items():
        assert sharded.pop(path) == axes
    assert not any(
        word in path for path in sharded for word in ("norm", "router", "embedding")
    )
    whole = {path for path, x in found.items() if x is None}
    assert not any("kernel" in path for path in whole if "router" not in path)
