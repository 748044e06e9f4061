"""Packing against plain lists, over shapes, routings, masks and documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_mom.ops.packing import Documents, Packing
from keras_mom_kernels.packing.reference import packed_tokens, packing_tables

settings.register_profile("packing", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("packing")

array = ops.convert_to_numpy


@st.composite
def routings(draw):
    """Sizes, indices `[B, T, k]` and a mask, from even to everything in one memory."""
    length = draw(st.sampled_from([1, 2, 9, 33]))
    memories = draw(st.sampled_from([1, 2, 4]))
    top_k = draw(st.integers(1, memories))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    skew = draw(st.sampled_from([0.0, 1.0, 50.0]))
    scores = random.normal(size=(2, length, memories)) - skew * np.arange(memories)
    indices = np.argsort(-scores, axis=-1)[..., :top_k].astype("int32")
    valid = draw(st.sampled_from([None, 0.0, 0.6, 1.0]))
    mask = None if valid is None else random.uniform(size=(2, length)) < valid
    return memories, indices, mask


@given(routings(), st.booleans(), st.sampled_from([0, 3]), st.sampled_from([1, 4, 16]))
def test_rows_are_the_memories_tokens_in_time_order(routing, shared, history, size):
    memories, indices, mask = routing
    packing = Packing(indices, memories, shared, mask, history, size, block_size=2)
    expected = packed_tokens(indices, memories, shared, mask)
    token, slot, memory = array(packing.token), array(packing.slot), packing.memory
    start, targets = array(packing.start), array(packing.targets)
    position, memory = array(packing.position), array(memory)
    rows, slots = token.shape[1], targets.shape[2]
    assert rows % (2 * size) == 0
    for b, of_memories in enumerate(expected):
        filled = np.zeros(rows, bool)
        for m, tokens in enumerate(of_memories):
            assert start[b, m] % size == 0
            assert array(packing.count)[b, m] == len(tokens)
            first = start[b, m] + history
            region = slice(first, first + len(tokens))
            assert first + len(tokens) <= rows
            assert token[b, region].tolist() == tokens
            assert (memory[b, region] == m).all()
            assert not filled[start[b, m] : region.stop].any()
            filled[region] = True
            assert position[b, tokens, m].tolist() == list(
                range(first, first + len(tokens))
            )
            unrouted = np.setdiff1d(np.arange(indices.shape[1]), tokens)
            assert (position[b, unrouted, m] == -1).all()
        assert (token[b][~filled] == -1).all() and (slot[b][~filled] == -1).all()
        # Slots and targets are each other's inverse.
        for row in np.flatnonzero(filled):
            t, j = divmod(slot[b, row], slots)
            assert t == token[b, row] and targets[b, t, j] == row
        assert (targets[b] >= 0).sum() == filled.sum()


@given(routings(), st.booleans(), st.sampled_from([0, 3]), st.sampled_from([1, 4, 16]))
def test_tables_are_those_of_the_reference(routing, shared, history, size):
    memories, indices, mask = routing
    packing = Packing(indices, memories, shared, mask, history, size, block_size=2)
    expected = packing_tables(
        indices,
        mask,
        num_memories=memories,
        shared=shared,
        history=history,
        chunk_size=size,
        chunks=packing.rows // size,
    )
    for name, table in expected.items():
        np.testing.assert_array_equal(array(getattr(packing, name)), table, name)


@given(routings(), st.booleans())
def test_the_chunk_table_covers_every_row_once(routing, shared):
    memories, indices, mask = routing
    packing = Packing(indices, memories, shared, mask, history=3, chunk_size=4)
    offsets = array(packing.chunk_offsets)
    assert (offsets[:, 0] == 0).all() and (np.diff(offsets) >= 0).all()
    assert (offsets[:, -1] * 4 == packing.rows).all()
    assert (offsets[:, :-1] * 4 == array(packing.start)).all()


@pytest.mark.parametrize("sets", ["query", "each", "routed and shared"])
def test_sources_and_targets_are_inverse(sets):
    random = np.random.default_rng(0)
    indices = np.argsort(random.normal(size=(2, 20, 3)), -1)[..., :2].astype("int32")
    packing = Packing(indices, 3, True, None, history=3, chunk_size=4)
    of_memory = {
        "query": [0, 0, 0, 0],
        "each": [0, 1, 2, 3],
        "routed and shared": [0, 0, 0, 1],
    }[sets]
    count = max(of_memory) + 1
    source, targets = (array(x) for x in packing.source(count))
    expected = {}
    for b, row in np.argwhere(array(packing.token) >= 0):
        place = array(packing.token)[b, row] * count
        place += of_memory[array(packing.memory)[b, row]]
        assert source[b, row] == place
        expected.setdefault((b, place), set()).add(row)
    for b, place in np.ndindex(*targets.shape[:2]):
        rows = set(targets[b, place].tolist()) - {-1}
        assert rows == expected.get((b, place), set())


@given(routings(), st.integers(0, 10**6))
def test_documents_begin_where_the_last_valid_id_changes(routing, seed):
    memories, indices, mask = routing
    batch, length = indices.shape[:2]
    random = np.random.default_rng(seed)
    ids = random.integers(0, 3, size=(batch, length)).astype("int32")
    packing = Packing(indices, memories, True, mask, history=3, chunk_size=4)
    documents = Documents(
        packing,
        ops.convert_to_tensor(ids),
        None if mask is None else ops.convert_to_tensor(mask),
    )
    token, resets = array(packing.token), array(documents.resets)
    for b in range(batch):
        numbers, number, last = {}, 0, None
        for t in range(length):
            if mask is None or mask[b, t]:
                number += last is not None and ids[b, t] != last
                numbers[t], last = number, ids[b, t]
        assert array(documents.last)[b] == number
        for m, tokens in enumerate(packed_tokens(indices, memories, True, mask)[b]):
            seen = [numbers[t] for t in tokens]
            first = array(packing.start)[b, m] + 3
            region = slice(first, first + len(tokens))
            assert token[b, region].tolist() == tokens
            assert array(documents.of_rows)[b, region].tolist() == seen
            assert resets[b, region].tolist() == [
                int(now != before) for now, before in zip(seen, [0, *seen])
            ]
            stale = (seen[-1] if seen else 0) < number
            assert array(documents.stale)[b, m] == stale
        assert (resets[b][token[b] < 0] == 0).all()
