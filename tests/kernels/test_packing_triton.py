"""The packing's Triton kernels against the reference, without Keras."""

import numpy as np
import pytest
import torch

from keras_mom_kernels.packing import reference

pytest.importorskip("triton")

from keras_mom_kernels.packing.torch import Tables, packing_tables  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(batch, length, memories, top_k, seed=0):
    """Different memories for each token; the first ones are more probable."""
    random = np.random.default_rng(seed)
    keys = random.gumbel(size=(batch, length, memories)) - np.arange(memories)
    return (-keys).argsort(-1)[..., :top_k].astype("int32")


def assert_equal(indices, mask, **sizes):
    tensors = [
        None if x is None else torch.tensor(x).to(DEVICE) for x in (indices, mask)
    ]
    tables = packing_tables(*tensors, **sizes)
    expected = reference.packing_tables(indices, mask, **sizes)
    assert set(Tables._fields) == set(expected)
    for name, x in tables._asdict().items():
        assert x.dtype == torch.int32
        np.testing.assert_array_equal(x.cpu(), expected[name], name)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize(
    "length, memories, top_k, history, chunk_size",
    ((1, 4, 2, 3, 16), (37, 4, 2, 3, 8), (50, 3, 3, 0, 16), (45, 9, 1, 1, 1)),
)
def test_tables(length, memories, top_k, history, chunk_size, shared, masked):
    indices = draw(2, length, memories, top_k)
    mask = None
    if masked:
        mask = np.random.default_rng(1).uniform(size=(2, length)) < 0.7
    rows = length * (top_k + shared) + (memories + shared) * (history + chunk_size)
    assert_equal(
        indices,
        mask,
        num_memories=memories,
        shared=shared,
        history=history,
        chunk_size=chunk_size,
        chunks=rows // chunk_size + 2,
    )


def test_more_tokens_than_a_block():
    sizes = dict(num_memories=2, shared=True, history=3, chunk_size=64, chunks=105)
    mask = np.ones((1, 2100), bool)
    mask[0, 1000:1500] = False
    assert_equal(draw(1, 2100, 2, 2), mask, **sizes)


def test_empty_memories_and_masked_rows():
    indices = np.full((2, 9, 1), 2, "int32")
    mask = np.ones((2, 9), bool)
    mask[1] = False
    for history in (0, 3):
        sizes = dict(num_memories=4, shared=False, chunk_size=4, chunks=8)
        assert_equal(indices, mask, history=history, **sizes)


def test_the_operator_keeps_its_promises_to_torch():
    indices = torch.tensor(draw(2, 5, 4, 2)).to(DEVICE)
    mask = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    operator = torch.ops.keras_mom_kernels.packing_tables.default
    for given in (mask, None):
        torch.library.opcheck(operator, (indices, given, 4, True, 3, 4, 12))


def test_what_no_kernel_serves_is_named():
    sizes = dict(num_memories=4, shared=False, history=0, chunk_size=4, chunks=8)
    indices = torch.tensor(draw(1, 5, 4, 2)).to(DEVICE)
    with pytest.raises(NotImplementedError, match="int64"):
        packing_tables(indices.long(), **sizes)
    with pytest.raises(NotImplementedError, match="1024"):
        packing_tables(indices, **{**sizes, "num_memories": 1024})
