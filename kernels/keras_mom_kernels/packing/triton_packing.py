"""The packing's Triton kernels: ranks of tokens in their memories, then all tables."""

import triton
import triton.language as tl


@triton.jit
def rank_tokens(
    indices,
    mask,
    position,
    count,
    length,
    ROUTED: tl.constexpr,
    MEMORIES: tl.constexpr,
    TOP_K: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many earlier tokens a memory has, -1 for tokens that are not in it.

    A program takes a batch row and a memory, in blocks of BLOCK tokens. The ranks go
    to `position` `[B, T, MEMORIES]`, the memories' sizes to `count` `[B, MEMORIES]`.
    """
    row = (tl.program_id(0) // MEMORIES).to(tl.int64)
    memory = tl.program_id(0) % MEMORIES
    indices += row * length * TOP_K
    position += row * length * MEMORIES + memory
    before = 0
    for begin in range(0, length, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        inside = token < length
        routed = tl.zeros((BLOCK,), tl.int32) + memory >= ROUTED
        for j in tl.static_range(TOP_K):
            index = tl.load(indices + token * TOP_K + j, mask=inside, other=-1)
            routed |= index == memory
        routed &= inside
        if MASKED:
            valid = tl.load(mask + row * length + token, mask=inside, other=0)
            routed &= valid != 0
        one = routed.to(tl.int32)
        rank = before + tl.cumsum(one, axis=0) - one
        tl.store(position + token * MEMORIES, tl.where(routed, rank, -1), mask=inside)
        before += tl.sum(one, axis=0)
    tl.store(count + row * MEMORIES + memory, before)


@triton.jit
def place_rows(
    indices,
    count,
    position,
    targets,
    slot,
    token,
    memory,
    place,
    start,
    chunk_offsets,
    length,
    rows,
    chunks,
    ROUTED: tl.constexpr,
    MEMORIES: tl.constexpr,
    TOP_K: tl.constexpr,
    HISTORY: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """All tables: a program takes BLOCK tokens or BLOCK packed rows of a batch row.

    Tokens write the entries of the rows that hold them, rows those of rows that hold
    none. `position` comes with the ranks of `rank_tokens`.
    """
    SLOTS: tl.constexpr = TOP_K + MEMORIES - ROUTED
    token_blocks = tl.cdiv(length, BLOCK)
    programs = token_blocks + tl.cdiv(rows, BLOCK)
    row = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    m = tl.arange(0, BLOCK_M)
    of_memory = m < MEMORIES
    held = tl.load(count + row * MEMORIES + m, mask=of_memory, other=0)
    needed = tl.where(of_memory, (held + (HISTORY + CHUNK - 1)) // CHUNK, 0)
    offset = tl.cumsum(needed, axis=0) - needed
    first = offset * CHUNK
    slot += row * rows
    token += row * rows
    if part < token_blocks:
        t = part * BLOCK + tl.arange(0, BLOCK)
        inside = t < length
        tile = (row * length + t)[:, None] * MEMORIES + m[None, :]
        mask = inside[:, None] & of_memory[None, :]
        rank = tl.load(position + tile, mask=mask, other=-1)
        target = tl.where(rank >= 0, rank + (first + HISTORY)[None, :], -1)
        tl.store(position + tile, target, mask=mask)
        for j in tl.static_range(SLOTS):
            chosen = tl.zeros((BLOCK,), tl.int32) + ROUTED
            if j < TOP_K:
                base = indices + row * length * TOP_K + j
                chosen = tl.load(base + t * TOP_K, mask=inside, other=-1)
            own = tl.where(m[None, :] == chosen[:, None], target, -1)
            own = tl.max(own, axis=1)
            tl.store(targets + (row * length + t) * SLOTS + j, own, mask=inside)
            tl.store(slot + own, t * SLOTS + j, mask=own >= 0)
            tl.store(token + own, t, mask=own >= 0)
    else:
        r = (part - token_blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = r < rows
        behind = (r[:, None] >= first[None, :]) & ((m > 0) & of_memory)[None, :]
        of_row = tl.sum(behind.to(tl.int32), axis=1)
        here = m[None, :] == of_row[:, None]
        begin = tl.sum(tl.where(here, first[None, :], 0), axis=1)
        tokens = tl.sum(tl.where(here, held[None, :], 0), axis=1)
        of_region = r - begin - HISTORY
        tl.store(memory + row * rows + r, of_row, mask=inside)
        tl.store(place + row * rows + r, of_region, mask=inside)
        empty = inside & ((of_region < 0) | (of_region >= tokens))
        nothing = tl.zeros((BLOCK,), tl.int32) - 1
        tl.store(slot + r, nothing, mask=empty)
        tl.store(token + r, nothing, mask=empty)
        if part == token_blocks:
            tl.store(start + row * MEMORIES + m, first, mask=of_memory)
            # Chunks behind all regions count as the last one's.
            border = tl.where(of_memory, offset, chunks)
            borders = chunk_offsets + row * (MEMORIES + 1)
            tl.store(borders + m, border, mask=m <= MEMORIES)
