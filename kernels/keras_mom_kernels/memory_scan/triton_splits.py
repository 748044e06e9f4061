"""Triton kernels that join the splits of long segments.

A segment's state is linear in the one before it, `S_next = M S + B`, so its splits
can be scanned at once: first for `M`, the transition, and `B`, what a split leaves
in an empty state; then, with the states before each split joined here, for the rest.
"""

import triton
import triton.language as tl

from keras_mom_kernels.memory_scan.triton_common import dot_onto, state_offsets


@triton.jit
def join_splits(
    transitions,
    ends,
    start,
    befores,
    last,
    first,
    segments,
    splits,
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STEP: tl.constexpr,
    START: tl.constexpr,
    LAST: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state before each split, or with BACKWARD the gradient of the one behind it.

    All float32. `transitions` `[splits, H, K, K]`, `ends` `[splits, H, K, V]`, `start`
    `[segments, H, K, V]` with START (else zeros), `first` int32 `[B, segments + 1]`
    the first split of each segment; `befores` `[splits, H, K, V]` and, with LAST,
    `last` `[segments, H, K, V]` are written. Splits and segments count through all
    batch rows. BLOCK_K holds all key channels.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    start_v = (tl.program_id(0) % blocks) * BLOCK_V
    head = (tl.program_id(0) // blocks) % heads
    segment = tl.program_id(0) // (blocks * heads)
    row = segment // segments
    begin = tl.load(first + segment + row) + row * splits
    end = tl.load(first + segment + row + 1) + row * splits
    place, held = state_offsets(
        segment, head, heads, 0, start_v, K, V, BLOCK_K, BLOCK_V
    )
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if START:
        state = tl.load(start + place, mask=held, other=0.0)
    k = tl.arange(0, BLOCK_K)
    for step in range(0, end - begin):
        split = begin + step
        if BACKWARD:
            split = end - 1 - step
        kept, inside = state_offsets(
            split, head, heads, 0, start_v, K, V, BLOCK_K, BLOCK_V
        )
        tl.store(befores + kept, state, mask=inside)
        # Rows of the state are read back, since a product takes no part of a tile.
        tl.debug_barrier()
        state = tl.load(ends + kept, mask=inside, other=0.0)
        base = transitions + (split.to(tl.int64) * heads + head) * (K * K)
        for channel in range(0, K, STEP):
            column = channel + tl.arange(0, STEP)
            matrix = k[:, None] * K + column[None, :]
            if BACKWARD:
                matrix = column[None, :] * K + k[:, None]
            known = (k < K)[:, None] & (column < K)[None, :]
            part, there = state_offsets(
                split, head, heads, channel, start_v, K, V, STEP, BLOCK_V
            )
            state = dot_onto(
                state,
                tl.load(base + matrix, mask=known, other=0.0),
                tl.load(befores + part, mask=there, other=0.0),
                PRECISION,
            )
    if LAST:
        tl.store(last + place, state, mask=held)
