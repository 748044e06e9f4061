"""Grouped projections against a product a row, without Keras."""

import numpy as np
import pytest
import torch

from keras_mom_kernels.grouped_projection import reference
from keras_mom_kernels.packing.reference import packing_tables

pytest.importorskip("triton")

from keras_mom_kernels.grouped_projection import torch as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, LENGTH, MEMORIES, TOP_K, WIDTH, CHANNELS = 2, 11, 5, 2, 16, 8


def tables_of(random, shared):
    """A packing of tokens, of which two are masked and one memory gets none."""
    order = random.random((BATCH, LENGTH, MEMORIES - 1)).argsort(-1)
    mask = np.ones((BATCH, LENGTH), bool)
    mask[0, 3] = mask[1, -1] = False
    return packing_tables(
        order[..., :TOP_K],
        mask,
        num_memories=MEMORIES,
        shared=shared,
        history=3,
        chunk_size=4,
        chunks=BATCH * LENGTH * 3,
    )


@pytest.mark.parametrize("shared", (False, True))
def test_values_and_gradients_are_those_of_the_reference(shared):
    random = np.random.default_rng(0)
    tables = tables_of(random, shared)
    memories = MEMORIES + shared
    inputs = random.normal(size=(BATCH, LENGTH, WIDTH))
    kernel = random.normal(size=(WIDTH, memories * CHANNELS))
    cotangent = random.normal(size=(*tables["token"].shape, CHANNELS))
    token, memory = tables["token"], tables["memory"]
    expected = reference.grouped_projection(inputs, kernel, token, memory)

    # What a product a row gives back, by hand.
    input_grad, kernel_grad = np.zeros_like(inputs), np.zeros_like(kernel)
    for b, r in zip(*np.nonzero(token >= 0)):
        own = slice(memory[b, r] * CHANNELS, (memory[b, r] + 1) * CHANNELS)
        input_grad[b, token[b, r]] += kernel[:, own] @ cotangent[b, r]
        kernel_grad[:, own] += np.outer(inputs[b, token[b, r]], cotangent[b, r])

    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    limit = 1e-2 if DEVICE == "cuda" else 1e-5
    names = ("targets", "token", "memory", "place", "count")
    ints = [torch.tensor(tables[x], dtype=torch.int32, device=DEVICE) for x in names]
    places = kernels.order_by_memory(*ints)
    leaves = [
        torch.tensor(x, dtype=dtype, device=DEVICE, requires_grad=True)
        for x in (inputs, kernel)
    ]
    rows = kernels.grouped_projection(*leaves, places)
    filled = places.source >= 0
    assert torch.equal(filled.cpu(), torch.tensor(token >= 0))
    output = rows[0][places.source.clamp(min=0).long()] * filled[..., None]
    output.backward(torch.tensor(cotangent).to(output))
    found = output.detach(), leaves[0].grad, leaves[1].grad
    for actual, wanted in zip(found, (expected, input_grad, kernel_grad)):
        difference = np.asarray(actual.cpu().double()) - wanted
        assert np.linalg.norm(difference) <= limit * np.linalg.norm(wanted)


def test_places_and_packed_rows_are_each_others_inverse():
    tables = tables_of(np.random.default_rng(1), True)
    names = ("targets", "token", "memory", "place", "count")
    ints = [torch.tensor(tables[x], dtype=torch.int32) for x in names]
    places = kernels.order_by_memory(*ints)
    source, targets = places.source.flatten(), places.targets.flatten()
    filled = (source >= 0).nonzero()[:, 0]
    assert torch.equal(targets[source[filled].long()].long(), filled)
    assert (targets >= 0).sum() == len(filled) == ints[4].sum()
    # By memory first, then by batch row, then in time order.
    assert places.ends.tolist() == ints[4].sum(0).cumsum(0).tolist()
    of_tokens = places.token[0]
    for t in range(BATCH * LENGTH):
        own = places.places[0, t]
        assert (of_tokens[own[own >= 0].long()] == t).all()


def test_what_no_kernel_serves_is_named():
    tensors = torch.ones(1, 3, 16), torch.ones(16, 12, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="float32 and torch.bfloat16"):
        kernels.check_served(*tensors, 3)
    with pytest.raises(NotImplementedError, match=r"16 bytes, not of \(16, 3\)"):
        kernels.check_served(tensors[0], torch.ones(16, 9), 3)
