"""The memory scan of one token, over all memories, as a Triton kernel."""

import triton
import triton.language as tl


@triton.jit
def step_memories(
    query,
    key,
    value,
    log_decay,
    beta,
    weights,
    active,
    state,
    new_state,
    output,
    scale,
    heads,
    memories,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BETA: tl.constexpr,
    READ_FIRST: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """A program takes BLOCK_V channels of a head, and one memory after the other.

    Grid: B * H * blocks of V. A memory's state is read while the one before is
    computed. IN_PLACE leaves memories alone that do not take the token; otherwise
    they are copied.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    row = (program // (blocks * heads)).to(tl.int64)
    head = (program // blocks) % heads
    k = tl.arange(0, BLOCK_K)
    v = (program % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = v < V
    inside = (k < K)[:, None] & in_v[None, :]
    places = k[:, None] * V + v[None, :]
    stride = heads * (K * V)

    first = row * memories
    base = (first * heads + head) * (K * V)
    taken = tl.load(active + first) != 0
    needed = inside
    if IN_PLACE:
        needed = (k < tl.where(taken, K, 0))[:, None] & in_v[None, :]
    ahead = tl.load(state + base + places, mask=needed)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for memory in range(memories):
        index = first + memory
        used, old = taken, ahead
        more = memory + 1 < memories
        taken = tl.load(active + index + 1, mask=more, other=0) != 0
        end = tl.where(more, K, 0)
        if IN_PLACE:
            end = tl.where(taken, K, 0)
        needed = (k < end)[:, None] & in_v[None, :]
        ahead = tl.load(state + base + stride + places, mask=needed)

        # A memory that does not take the token has no channels.
        rows = index * heads + head
        of_k, of_v = k < tl.where(used, K, 0), v < tl.where(used, V, 0)
        tile = of_k[:, None] & of_v[None, :]
        q = tl.load(query + rows * K + k, mask=of_k, other=0.0).to(tl.float32)
        key_row = tl.load(key + rows * K + k, mask=of_k, other=0.0).to(tl.float32)
        written = tl.load(value + rows * V + v, mask=of_v, other=0.0).to(tl.float32)
        decayed = old
        if DECAY == "head":
            g = tl.load(log_decay + rows, mask=used, other=0.0).to(tl.float32)
            decayed = tl.exp(g) * old
        if DECAY == "channel":
            g = tl.load(log_decay + rows * K + k, mask=of_k, other=0.0)
            decayed = tl.exp(g.to(tl.float32))[:, None] * old
        if DELTA:
            read_from = old if EXCLUSIVE else decayed
            held = tl.where(tile, key_row[:, None] * read_from, 0.0)
            written -= tl.sum(held, axis=0)
        if BETA:
            written *= tl.load(beta + rows, mask=used, other=0.0).to(tl.float32)
        new = decayed + key_row[:, None] * written[None, :]
        read_from = old if READ_FIRST else new
        read = tl.where(tile, q[:, None] * read_from, 0.0)
        weight = tl.load(weights + index, mask=used, other=0.0).to(tl.float32)
        total += (scale * weight) * tl.sum(read, axis=0)

        kept = tile if IN_PLACE else inside
        tl.store(new_state + base + places, tl.where(tile, new, old), mask=kept)
        base += stride
    tl.store(output + (row * heads + head) * V + v, total, mask=in_v)
