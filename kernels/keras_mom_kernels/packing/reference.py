"""Packing as lists: which tokens each memory receives, in time order."""


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
