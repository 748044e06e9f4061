"""A token's routing by memory, as a Triton kernel."""

import triton
import triton.language as tl


@triton.jit
def spread_choices(
    weights,
    indices,
    mask,
    spread,
    active,
    choices,
    MEMORIES: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A program takes a batch row. Grid: B.

    MEMORIES counts the shared one, which is last.
    """
    row = tl.program_id(0).to(tl.int64)
    memory = tl.arange(0, BLOCK)
    inside = memory < MEMORIES
    weight = tl.zeros((BLOCK,), tl.float32)
    taken = tl.zeros((BLOCK,), tl.int32)
    if SHARED:
        taken = tl.where(memory == MEMORIES - 1, 1, 0)
        weight = taken.to(tl.float32)
    for choice in range(choices):
        chosen = memory == tl.load(indices + row * choices + choice)
        given = tl.load(weights + row * choices + choice).to(tl.float32)
        weight += tl.where(chosen, given, 0.0)
        taken = tl.where(chosen, 1, taken)
    if MASKED:
        taken *= (tl.load(mask + row) != 0).to(tl.int32)
    tl.store(spread + row * MEMORIES + memory, weight, mask=inside)
    tl.store(active + row * MEMORIES + memory, taken.to(tl.uint8), mask=inside)
