"""Decodes with each update rule through the Triton kernels, in the interpreter.

Run by `test_layers.py`, in a process of its own, where Keras runs on torch.
"""

import random

import numpy as np
import torch

import keras_mom
from keras_mom.ops import triton_step
from keras_mom.ops.dispatch import dispatch
from keras_mom.rules.base import MemoryUpdateRule

RULES = ("gated_delta_net", "retention", "rwkv7", "gla", "rwkv6")
CALLED = []


def steps_by(implementation):
    """A `dispatch` that runs the steps by `implementation`, all else as it is."""

    def run(operation, name, *args, **kwargs):
        if operation in ("convolution_step", "memory_step", "spread_routing"):
            name = implementation
            CALLED.append((operation, name))
        return dispatch(operation, name, *args, **kwargs)

    return run


def decode(layer, inputs, mask, state):
    outputs = []
    for t in range(inputs.shape[1]):
        output, state = layer(
            inputs[:, t : t + 1], mask=mask[:, t : t + 1], initial_state=state
        )
        outputs.append(output)
    return [torch.cat(outputs, dim=1), *state]


def main():
    from keras_mom.ops import memory_step
    from keras_mom_kernels.memory_step import torch as kernels

    # The kernels run on a CPU in the interpreter alone.
    triton_step._kernels = lambda tensor: kernels
    generator = np.random.default_rng(0)
    inputs = torch.tensor(generator.normal(size=(2, 3, 12)), dtype=torch.float32)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]], dtype=torch.bool)
    for i, rule in enumerate(RULES):
        random.seed(i)  # Keras' own function would import TensorFlow.
        layer = keras_mom.MoMLayer(
            num_heads=1,
            key_dim=6,
            value_dim=5,
            num_memories=3,
            top_k=2,
            shared_memory=i != 1,
            per_memory_projections=i != 2,
            conv_width=None if i == 3 else 4,
            update_rule=rule,
            return_state=True,
        )
        layer.build(inputs.shape)
        state = [
            torch.tensor(generator.normal(size=x.shape), dtype=torch.float32)
            for x in layer.get_initial_state(2)
        ]
        found = []
        for implementation in ("portable", "triton"):
            memory_step.dispatch = steps_by(implementation)
            with torch.no_grad():
                found.append(decode(layer, inputs, mask, state))
        for x, y in zip(*found):
            error = ((x - y).norm() / y.norm()).item()
            assert error <= 2e-6, (rule, error)
        whole = type(layer.update_rule).scan is MemoryUpdateRule.scan
        assert (("memory_step", "triton") in CALLED) == whole, rule
        assert ("convolution_step", "triton") in CALLED, rule
        CALLED.clear()

    # A token that needs a gradient has no kernel.
    try:
        layer(inputs[:, :1], initial_state=state)
    except NotImplementedError as error:
        assert "no gradient" in str(error)
    else:
        raise AssertionError("no error")


if __name__ == "__main__":
    main()
