"""A layer through the Triton kernels against its portable form, in the interpreter.

Run by `test_layers.py`, in a process of its own, where Keras runs on torch. On a
GPU it runs there: `PYTHONPATH=.:kernels python tests/kernels/layer_whole.py`.
"""

import itertools
import random

import numpy as np
import torch

import keras_mom
from keras_mom.ops import gpu
from keras_mom_kernels.grouped_projection import torch as grouped_projection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {"float32": (2e-5, 1e-4), "bfloat16": (1e-2, 2e-2)}


def outputs_and_gradients(layer, inputs, cotangent, implementation, **options):
    keras_mom.config.set_implementation(implementation)
    leaf = inputs.detach().requires_grad_()
    output, state = layer(leaf, **options)
    weights = [v.value for v in layer.trainable_variables]
    results = output, sum(layer.losses)
    cotangents = cotangent, torch.ones((), device=DEVICE)
    found = torch.autograd.grad(results, [leaf, *weights], cotangents)
    outputs = output, *state, *layer.losses
    return [x.detach() for x in outputs], list(found)


def in_float32(layer, shape):
    """The same layer, with what a narrow type rounds left alone."""
    config = {**layer.get_config(), "dtype": "float32"}
    exact = keras_mom.MoMLayer.from_config(config)
    exact.build(shape)
    for new, old in zip(exact.trainable_variables, layer.trainable_variables):
        new.assign(old.value.float())
    return exact


def check(name, actual, expected, exact, limits):
    """Triton's results, and the portable form's, against those in float32.

    A few numbers that many cancelling terms add up to, such as a decay's gradient, have
    more rounding than others: there the kernels may err as the portable form does.
    """
    for found, portable, wanted, limit in zip(actual, expected, exact, limits):
        errors = [
            (error(x, z), error(y, z)) for x, y, z in zip(found, portable, wanted)
        ]
        worst, beside = max(errors)
        print(name, f"{worst:.1e}, the portable form {beside:.1e}", flush=True)
        for ours, theirs in errors:
            assert ours <= max(limit, 1.5 * theirs), (name, ours, theirs)


def error(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm().clamp(1e-30)).item()


@torch.no_grad()
def decode_in_place(layer, inputs, whole, limit):
    """A stateful layer writes tokens to the memories where they lie."""
    config = {**layer.get_config(), "stateful": True, "return_state": False}
    stateful = keras_mom.MoMLayer.from_config(config)
    stateful.build(inputs.shape)
    for new, old in zip(stateful.trainable_variables, layer.trainable_variables):
        new.assign(old.value)
    memories = stateful.states[0].value
    place, outputs = memories.data_ptr(), []
    for t in range(inputs.shape[1]):
        before = memories.clone()
        outputs.append(stateful(inputs[:, t : t + 1]))
        assert not torch.equal(memories, before)
    worst = error(torch.cat(outputs, 1), whole)
    assert worst <= limit, worst
    assert stateful.states[0].value.data_ptr() == place

    # A caller's own tensors stay as they are.
    trainable = [v.value for v in stateful.trainable_variables]
    others = [v.value.clone() for v in stateful.non_trainable_variables]
    kept = [x.clone() for x in others]
    _, after = stateful.stateless_call(trainable, others, inputs[:, :1])
    assert all(torch.equal(x, y) for x, y in zip(others, kept))
    assert not all(torch.equal(x, y) for x, y in zip(after, kept))


def main(sizes=(2, 12, 16, 2, 8), dtypes=("float32",), memories=4, top_k=2):
    batch, length, width, heads, head_dim = sizes
    if DEVICE == "cpu":
        # The kernels run on a CPU in the interpreter alone.
        gpu.check = lambda tensor: None
    generator = np.random.default_rng(0)
    for dtype in dtypes:
        random.seed(1)  # Keras' own function would import TensorFlow.
        layer = keras_mom.MoMLayer(
            heads,
            head_dim,
            num_memories=memories,
            top_k=top_k,
            balance_loss_weight=2.0,
            return_state=True,
            dtype=dtype,
        )
        inputs = generator.normal(size=(batch, length, width))
        inputs = torch.tensor(inputs, device=DEVICE, dtype=getattr(torch, dtype))
        layer.build(inputs.shape)
        cotangent = torch.tensor(generator.normal(size=inputs.shape)).to(inputs)
        mask = torch.ones((batch, length), dtype=torch.bool, device=DEVICE)
        mask[0, length // 3] = False
        segment_ids = torch.zeros((batch, length), dtype=torch.int32, device=DEVICE)
        segment_ids[:, length // 2 :] = 1
        masked = {"mask": mask, "segment_ids": segment_ids}
        # The interpreter is slow; pieces go without a mask below.
        for options in ({}, masked) if DEVICE == "cuda" else (masked,):
            call = layer, inputs, cotangent
            expected = outputs_and_gradients(*call, "portable", **options)
            actual = outputs_and_gradients(*call, "triton", **options)
            exact = expected
            if dtype != "float32":
                call = (
                    in_float32(layer, inputs.shape),
                    inputs.float(),
                    cotangent.float(),
                )
                exact = outputs_and_gradients(*call, "portable", **options)
            name = f"{dtype} {memories} {sorted(options)}"
            check(name, actual, expected, exact, TOLERANCES[dtype])
            keras_mom.config.set_implementation("triton")

        # Pieces and single tokens through the kernels.
        pieces = [*range(length // 2, length), length]
        if DEVICE == "cpu":
            pieces = [length // 2, length - 2, length - 1, length]
        if memories > 4:
            pieces = [length // 2, length]
        with torch.no_grad():
            whole, _ = layer(inputs)
            first, state = layer(inputs[:, : length // 2])
            outputs = [first]
            for begin, end in itertools.pairwise(pieces):
                output, state = layer(inputs[:, begin:end], initial_state=state)
                outputs.append(output)
        worst = error(torch.cat(outputs, 1), whole)
        print(dtype, "in pieces", f"{worst:.1e}", flush=True)
        assert worst <= TOLERANCES[dtype][0], (dtype, worst)
        if memories <= 4:
            some = slice(None) if DEVICE == "cuda" else slice(4)
            few = inputs[:, some], whole[:, some]
            decode_in_place(layer, *few, TOLERANCES[dtype][0])


def main_of_many_memories(*arguments, **options):
    """Tokens are projected by memory, in grouped products, where there are many."""
    calls, project = [], grouped_projection.grouped_projection

    def counted(inputs, *rest):
        calls.append(inputs.dtype)
        return project(inputs, *rest)

    grouped_projection.grouped_projection = counted
    main(*arguments, **options, memories=9, top_k=1)
    assert calls
    grouped_projection.grouped_projection = project


if __name__ == "__main__":
    if DEVICE == "cuda":
        main(dtypes=("float32", "bfloat16"))
        main((2, 300, 256, 2, 128), dtypes=("float32", "bfloat16"))
        main_of_many_memories((2, 300, 256, 2, 128), dtypes=("bfloat16",))
    else:
        main()
        main_of_many_memories((1, 6, 16, 1, 8))
