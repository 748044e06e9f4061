"""The forward Triton kernel of the memory scan that works chunk by chunk.

With what `triton_prepare` computes, and `S` the state before a chunk:

    U      = (I + A)^-1 beta (V - (K exp(G)) S)        what each row writes
    O      = scale ((Q exp(G)) S + P U)
    S_next = exp(G_C) S + (K exp(G_C - G))^T U

Source: arXiv 2406.06484 and 2412.06464; "erase before decay" reads with the decay of
the row before.
"""

import triton
import triton.language as tl

from keras_mom_kernels.memory_scan.triton_common import (
    chunk_rows,
    dot,
    dot_right,
    dot_square,
    load_column,
    load_rows,
    operand,
    program_segment,
    segment_chunks,
    square_offsets,
    state_offsets,
    store_rows,
    tile_offsets,
)
from keras_mom_kernels.memory_scan.triton_decays import (
    head_decays,
    reset_counts,
)


@triton.jit
def scan_chunks(
    reading_query,
    reading_key,
    ending_key,
    ending_rest,
    channels,
    value,
    beta,
    coarse,
    fine,
    resets,
    inverse,
    attention,
    initial,
    output,
    final,
    states,
    writes,
    table,
    offsets,
    length,
    chunks,
    segments,
    heads,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    LAYOUT: tl.constexpr,
    SEGMENTED: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BETA: tl.constexpr,
    RESETS: tl.constexpr,
    INITIAL: tl.constexpr,
    OUTPUT: tl.constexpr,
    STATES: tl.constexpr,
    FINAL: tl.constexpr,
    IDENTITY: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Hands the state of a segment's head from chunk to chunk, BLOCK_V channels.

    With OUTPUT it writes `output` `[rows, H, V]`; with STATES, for the gradients, the
    state before each chunk, `states` `[chunks, H, K, V]`, and what each row writes,
    `writes` `[rows, H, V]`; with FINAL the state behind the segment, `final`. With
    IDENTITY the state is a segment's transition instead, `[K, K]`: it begins as the
    identity, and all values are zeros. BLOCK_K holds all key channels.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    start_v = (tl.program_id(0) % blocks) * BLOCK_V
    head = (tl.program_id(0) // blocks) % heads
    segment = program_segment(blocks * heads, segments, SEGMENTED)
    begin, end = segment_chunks(segment, offsets, segments, chunks, SEGMENTED)
    place, held = state_offsets(
        segment, head, heads, 0, start_v, K, V, BLOCK_K, BLOCK_V
    )
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if INITIAL:
        state = tl.load(initial + place, mask=held, other=0.0)
    if IDENTITY:
        diagonal = start_v + tl.arange(0, BLOCK_V)[None, :]
        state = tl.where(tl.arange(0, BLOCK_K)[:, None] == diagonal, 1.0, 0.0)

    for step in tl.range(0, end - begin, num_stages=STAGES):
        chunk = begin + step
        row, count = chunk_rows(chunk, table, length, chunks, ROWS, LAYOUT)
        keys, inside = tile_offsets(row, count, head, heads, 0, K, BLOCK_K, C)
        values, filled = tile_offsets(row, count, head, heads, start_v, V, BLOCK_V, C)
        k = operand(load_rows(reading_key, keys, inside), PRECISION)
        before = operand(state, PRECISION)
        if STATES:
            kept, kept_mask = state_offsets(
                chunk, head, heads, 0, start_v, K, V, BLOCK_K, BLOCK_V
            )
            store_rows(states, kept, kept_mask, state)

        # 1. Decays on the way in, to the end of the chunk, and over all of it.
        if DECAY == "head":
            into_query, into_key, to_end, whole = head_decays(
                coarse, fine, row, count, head, heads, C, EXCLUSIVE
            )
        else:
            into_query = tl.full((C,), 1.0, tl.float32)
            into_key, to_end, whole = into_query, into_query, 1.0
        if RESETS:
            counts, last = reset_counts(resets, row, count, C)
            first = tl.where(counts == 0, 1.0, 0.0)
            into_query *= first
            into_key *= first
            to_end *= tl.where(counts == last, 1.0, 0.0)
            whole *= tl.where(last == 0, 1.0, 0.0)

        # 2. What each row writes.
        if IDENTITY:
            write = tl.zeros((C, BLOCK_V), tl.float32)
        else:
            write = load_rows(value, values, filled).to(tl.float32)
        if DELTA:
            write -= dot(k, before, PRECISION) * into_key[:, None]
        if BETA:
            write *= load_column(beta, row, count, head, heads, C)[:, None]
        if DELTA:
            square = square_offsets(chunk, head, heads, PARTS, C)
            none = tl.zeros((C, BLOCK_V), tl.float32)
            write = dot_square(
                none, inverse, square, write, False, PARTS, False, PRECISION, C
            )
        if STATES:
            store_rows(writes, values, filled, write)

        # 3. What each row reads.
        if OUTPUT:
            q = operand(load_rows(reading_query, keys, inside), PRECISION)
            out = dot(q, before, PRECISION) * into_query[:, None]
            square = square_offsets(chunk, head, heads, PARTS, C)
            out = dot_square(
                out,
                attention,
                square,
                write,
                False,
                PARTS,
                PARTS == 2,
                PRECISION,
                C,
            )
            store_rows(output, values, filled, out * scale)

        # 4. The state behind the chunk.
        state *= whole
        if DECAY == "channel":
            column = tl.arange(0, BLOCK_K)
            decay = channels + (chunk.to(tl.int64) * heads + head) * K
            state *= tl.load(decay + column, mask=column < K, other=0.0)[:, None]
            k = operand(load_rows(ending_key, keys, inside), PRECISION)
        write *= to_end[:, None]
        state = dot_right(state, tl.trans(k), write, PRECISION, PARTS == 2)
        if DECAY == "channel" and PARTS == 2:
            k = operand(load_rows(ending_rest, keys, inside), PRECISION)
            state = dot_right(state, tl.trans(k), write, PRECISION, False)

    if FINAL:
        # Not known to be `start_v`: its offsets take no registers during the loop.
        start_v = tl.minimum(start_v, start_v + end - begin)
        place, held = state_offsets(
            segment, head, heads, 0, start_v, K, V, BLOCK_K, BLOCK_V
        )
        tl.store(final + place, state, mask=held)
