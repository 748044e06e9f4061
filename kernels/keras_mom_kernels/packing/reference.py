"""Packing as lists: which tokens each memory receives, in time order."""

import numpy as np


def packed_tokens(indices, num_memories, shared=False, mask=None):
    """Lists the tokens of each memory.

    Args:
        indices: integers `[B, T, k]`, the memories each token is routed to.
        num_memories: number of routed memories.
        shared: whether one more memory, the last, receives every token.
        mask: booleans `[B, T]`, False at tokens that go nowhere, or None.

    Returns:
        `tokens[b][m]`, a list of times.
    """
    batch = []
    for b, row in enumerate(indices):
        tokens = [[] for _ in range(num_memories + shared)]
        for t, memories in enumerate(row):
            if mask is not None and not mask[b][t]:
                continue
            for memory in memories:
                tokens[memory].append(t)
            if shared:
                tokens[num_memories].append(t)
        batch.append(tokens)
    return batch


def packing_tables(
    indices, mask=None, *, num_memories, shared, history, chunk_size, chunks
):
    """The tables of a packing, row by row.

    Arguments and results are those of `keras_mom_kernels.packing.torch`, as integers
    and NumPy arrays by name.
    """
    batch, length, top_k = indices.shape
    memories, rows = num_memories + shared, chunks * chunk_size
    tables = {
        "position": np.full((batch, length, memories), -1),
        "targets": np.full((batch, length, top_k + shared), -1),
        "slot": np.full((batch, rows), -1),
        "token": np.full((batch, rows), -1),
        "memory": np.full((batch, rows), memories - 1),
        "place": np.zeros((batch, rows), int),
        "start": np.zeros((batch, memories), int),
        "count": np.zeros((batch, memories), int),
        "chunk_offsets": np.full((batch, memories + 1), chunks),
    }
    packed = packed_tokens(indices, num_memories, shared, mask)
    for b in range(batch):
        # 1. Regions: history, tokens, and empty rows up to a whole chunk.
        chunk = 0
        for m in range(memories):
            tokens = packed[b][m]
            start = chunk * chunk_size
            tables["start"][b, m], tables["count"][b, m] = start, len(tokens)
            tables["chunk_offsets"][b, m] = chunk
            chunk += -(-(history + len(tokens)) // chunk_size)
            # The last region has all rows that are left.
            end = chunk * chunk_size if m < memories - 1 else rows
            tables["memory"][b, start:end] = m
            tables["place"][b, start:end] = np.arange(end - start) - history
            # 2. The tokens in them.
            for rank, t in enumerate(tokens):
                row = start + history + rank
                j = top_k if m == num_memories else list(indices[b][t]).index(m)
                tables["position"][b, t, m] = tables["targets"][b, t, j] = row
                tables["slot"][b, row] = t * (top_k + shared) + j
                tables["token"][b, row] = t
    return tables
