"""Forward Triton kernels of the memory scan.

`sum_decays`, `pair_rows` and `solve_pairs` work on all chunks at once, `scan_chunks`
on a segment's chunks one after the other. With `G` the running sum of log decays in
a chunk, `S` the state before it, and `A` the decayed key products below the diagonal
times the write strength:

    U      = (I + A)^-1 beta (V - (K exp(G)) S)        what each row writes
    O      = scale ((Q exp(G)) S + P U)                P: decayed query-key products
    S_next = exp(G_C) S + (K exp(G_C - G))^T U

Source: arXiv 2406.06484 and 2412.06464; "erase before decay" reads with the decay of
the row before.
"""

import triton
import triton.language as tl

from keras_mom_kernels.memory_scan.triton_common import (
    chunk_rows,
    dot,
    dot_onto,
    dot_right,
    dot_square,
    load_column,
    load_rows,
    operand,
    segment_chunks,
    square_offsets,
    state_offsets,
    store_parts,
    store_rows,
    tile_offsets,
)
from keras_mom_kernels.memory_scan.triton_decays import (
    LOWEST_LOG_DECAY,
    QUANTA,
    head_decays,
    head_pairs,
    level_decays,
    level_mask,
    lower,
    reset_counts,
)


@triton.jit
def sum_decays(
    log_decay,
    coarse,
    fine,
    table,
    length,
    chunks,
    width,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Running sums of log decays `[rows, width]` in each chunk, in two parts."""
    row, count = chunk_rows(tl.program_id(0), table, length, chunks, ROWS, LAYOUT)
    t = tl.arange(0, C)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets = (row + t)[:, None] * width + column[None, :]
    mask = (t < count)[:, None] & (column < width)[None, :]
    step = tl.load(log_decay + offsets, mask=mask, other=0.0).to(tl.float32)
    step = tl.maximum(step, LOWEST_LOG_DECAY, propagate_nan=tl.PropagateNan.ALL)
    part = tl.floor(step * QUANTA) / QUANTA
    tl.store(coarse + offsets, tl.cumsum(part, axis=0), mask=mask)
    tl.store(fine + offsets, tl.cumsum(step - part, axis=0), mask=mask)


@triton.jit
def pair_rows(
    query,
    key,
    beta,
    coarse,
    fine,
    resets,
    table,
    pairs,
    attention,
    length,
    chunks,
    heads,
    K: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAYOUT: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BETA: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
    LEVEL_PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    ATTENTION: tl.constexpr,
):
    """Decayed products of a chunk's rows.

    For the delta rule `A` goes to `pairs`, float32 `[chunks, H, C, C]`; with ATTENTION
    the query-key products `P` go to `attention`, `[chunks, H, PARTS, C, C]`.
    """
    head = tl.program_id(0) % heads
    chunk = tl.program_id(0) // heads
    row, count = chunk_rows(chunk, table, length, chunks, ROWS, LAYOUT)
    t = tl.arange(0, C)
    target = square_offsets(chunk, head, heads, PARTS, C)
    same = tl.full((C, C), True, tl.int1)
    if RESETS:
        counts, _ = reset_counts(resets, row, count, C)
        same = counts[:, None] == counts[None, :]
    erase = tl.zeros((C, C), tl.float32)
    read = tl.zeros((C, C), tl.float32)
    if DECAY == "channel":
        for start in range(0, K, BLOCK_K):
            offsets, mask = tile_offsets(row, count, head, heads, start, K, BLOCK_K, C)
            q = load_rows(query, offsets, mask).to(tl.float32)
            k = load_rows(key, offsets, mask).to(tl.float32)
            own = tl.sum(q * k, axis=1)
            read += tl.where(t[:, None] == t[None, :], own[:, None], 0.0)
            half = 1
            while half < C:
                decay = level_decays(
                    coarse, fine, row, count, head, heads, start, half, C, K, BLOCK_K, 0
                )
                keep = level_mask(half, C, False)
                right = tl.trans(operand(k * decay, LEVEL_PRECISION))
                product = dot(
                    operand(q * decay, LEVEL_PRECISION), right, LEVEL_PRECISION
                )
                read += tl.where(keep, product, 0.0)
                if DELTA:
                    if EXCLUSIVE:
                        decay = level_decays(
                            coarse,
                            fine,
                            row,
                            count,
                            head,
                            heads,
                            start,
                            half,
                            C,
                            K,
                            BLOCK_K,
                            1,
                        )
                    product = dot(
                        operand(k * decay, LEVEL_PRECISION), right, LEVEL_PRECISION
                    )
                    erase += tl.where(keep, product, 0.0)
                half *= 2
    else:
        for start in range(0, K, BLOCK_K):
            offsets, mask = tile_offsets(row, count, head, heads, start, K, BLOCK_K, C)
            k = operand(load_rows(key, offsets, mask), PRECISION)
            if DELTA:
                erase = dot_onto(erase, k, tl.trans(k), PRECISION)
            if ATTENTION:
                q = operand(load_rows(query, offsets, mask), PRECISION)
                read = dot_onto(read, q, tl.trans(k), PRECISION)
        if DECAY == "head":
            if ATTENTION:
                read *= head_pairs(
                    coarse, fine, row, count, head, heads, C, False, False, False
                )
            if DELTA:
                erase *= head_pairs(
                    coarse, fine, row, count, head, heads, C, EXCLUSIVE, True, False
                )
        else:
            read = tl.where(lower(t, False, False), read, 0.0)
            erase = tl.where(lower(t, True, False), erase, 0.0)
    if ATTENTION:
        store_parts(attention, target, tl.where(same, read, 0.0), PARTS, C * C)
    if DELTA:
        erase = tl.where(same, erase, 0.0)
        if BETA:
            erase *= load_column(beta, row, count, head, heads, C)[:, None]
        tl.store(pairs + square_offsets(chunk, head, heads, 1, C), erase)


@triton.jit
def _block(pairs, base, i: tl.constexpr, j: tl.constexpr, C: tl.constexpr):
    """Block (i, j) of 16 rows and 16 columns."""
    t = tl.arange(0, 16)
    return tl.load(pairs + base + (16 * i + t)[:, None] * C + 16 * j + t[None, :])


@triton.jit
def _store_block(
    x,
    base,
    i: tl.constexpr,
    j: tl.constexpr,
    block,
    PARTS: tl.constexpr,
    C: tl.constexpr,
):
    t = tl.arange(0, 16)
    offsets = base * PARTS + (16 * i + t)[:, None] * C + 16 * j + t[None, :]
    store_parts(x, offsets, block, PARTS, C * C)


@triton.jit
def solve_pairs(
    pairs, inverse, C: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr
):
    """`(I + A)^-1` of `pairs`, float32 `[chunks * H, C, C]`, in PARTS operands.

    Substitution row by row in the diagonal blocks of 16, then blocks are merged: a
    Neumann series loses every digit where keys are correlated.
    """
    tl.static_assert(C == 64)
    base = tl.program_id(0).to(tl.int64) * C * C
    n = tl.arange(0, 4)
    t = tl.arange(0, 16)
    diagonal = base + n[:, None, None] * (16 * C + 16)
    diagonal += t[None, :, None] * C + t[None, None, :]
    below = (t[:, None] > t[None, :])[None, :, :]
    solved = -tl.where(below, tl.load(pairs + diagonal), 0.0)
    for i in range(2, 16):
        source = base + n[:, None] * (16 * C + 16) + i * C + t[None, :]
        line = tl.where((t < i)[None, :], -tl.load(pairs + source), 0.0)
        line += tl.sum(line[:, :, None] * solved, axis=1)
        solved = tl.where((t == i)[None, :, None], line[:, None, :], solved)
    solved += tl.where(t[:, None] == t[None, :], 1.0, 0.0)[None, :, :]

    index = n[:, None, None]
    x0 = tl.sum(tl.where(index == 0, solved, 0.0), axis=0)
    x1 = tl.sum(tl.where(index == 1, solved, 0.0), axis=0)
    x2 = tl.sum(tl.where(index == 2, solved, 0.0), axis=0)
    x3 = tl.sum(tl.where(index == 3, solved, 0.0), axis=0)
    _store_block(inverse, base, 0, 0, x0, PARTS, C)
    _store_block(inverse, base, 1, 1, x1, PARTS, C)
    _store_block(inverse, base, 2, 2, x2, PARTS, C)
    _store_block(inverse, base, 3, 3, x3, PARTS, C)
    none = tl.zeros((16, 16), tl.float32)
    _store_block(inverse, base, 0, 1, none, PARTS, C)
    _store_block(inverse, base, 0, 2, none, PARTS, C)
    _store_block(inverse, base, 0, 3, none, PARTS, C)
    _store_block(inverse, base, 1, 2, none, PARTS, C)
    _store_block(inverse, base, 1, 3, none, PARTS, C)
    _store_block(inverse, base, 2, 3, none, PARTS, C)
    x10 = -dot(x1, dot(_block(pairs, base, 1, 0, C), x0, PRECISION), PRECISION)
    _store_block(inverse, base, 1, 0, x10, PARTS, C)
    a21 = _block(pairs, base, 2, 1, C)
    x21 = -dot(x2, dot(a21, x1, PRECISION), PRECISION)
    _store_block(inverse, base, 2, 1, x21, PARTS, C)
    total = dot(_block(pairs, base, 2, 0, C), x0, PRECISION)
    x20 = -dot(x2, total + dot(a21, x10, PRECISION), PRECISION)
    _store_block(inverse, base, 2, 0, x20, PARTS, C)
    a30, a31 = _block(pairs, base, 3, 0, C), _block(pairs, base, 3, 1, C)
    a32 = _block(pairs, base, 3, 2, C)
    total = dot(a30, x0, PRECISION) + dot(a31, x10, PRECISION)
    x30 = -dot(x3, total + dot(a32, x20, PRECISION), PRECISION)
    _store_block(inverse, base, 3, 0, x30, PARTS, C)
    total = dot(a31, x1, PRECISION) + dot(a32, x21, PRECISION)
    _store_block(inverse, base, 3, 1, -dot(x3, total, PRECISION), PARTS, C)
    x32 = -dot(x3, dot(a32, x2, PRECISION), PRECISION)
    _store_block(inverse, base, 3, 2, x32, PARTS, C)


@triton.jit
def scan_chunks(
    reading_query,
    reading_key,
    ending_key,
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
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Hands the state of a segment's head from chunk to chunk, BLOCK_V channels.

    With OUTPUT it writes `output` `[rows, H, V]` and the `final` state. Otherwise, for
    the gradients, the state before each chunk, `states` `[chunks, H, K, V]`, and what
    each row writes, `writes` `[rows, H, V]`. BLOCK_K holds all key channels.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    start_v = (tl.program_id(0) % blocks) * BLOCK_V
    head = (tl.program_id(0) // blocks) % heads
    segment = tl.program_id(0) // (blocks * heads)
    begin, end = segment_chunks(segment, offsets, segments, chunks, SEGMENTED)
    place, held = state_offsets(
        segment, head, heads, 0, start_v, K, V, BLOCK_K, BLOCK_V
    )
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if INITIAL:
        state = tl.load(initial + place, mask=held, other=0.0)

    for step in tl.range(0, end - begin, num_stages=STAGES):
        chunk = begin + step
        row, count = chunk_rows(chunk, table, length, chunks, ROWS, LAYOUT)
        keys, inside = tile_offsets(row, count, head, heads, 0, K, BLOCK_K, C)
        values, filled = tile_offsets(row, count, head, heads, start_v, V, BLOCK_V, C)
        k = operand(load_rows(reading_key, keys, inside), PRECISION)
        before = operand(state, PRECISION)
        if not OUTPUT:
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
        if DELTA:
            read = dot(k, before, PRECISION) * into_key[:, None]
            write = load_rows(value, values, filled).to(tl.float32) - read
        else:
            write = load_rows(value, values, filled).to(tl.float32)
        if BETA:
            write *= load_column(beta, row, count, head, heads, C)[:, None]
        if DELTA:
            square = square_offsets(chunk, head, heads, PARTS, C)
            none = tl.zeros((C, BLOCK_V), tl.float32)
            write = dot_square(
                none, inverse, square, write, False, PARTS, False, PRECISION, C
            )
        if not OUTPUT:
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

    if OUTPUT:
        # Not known to be `start_v`: its offsets take no registers during the loop.
        start_v = tl.minimum(start_v, start_v + end - begin)
        place, held = state_offsets(
            segment, head, heads, 0, start_v, K, V, BLOCK_K, BLOCK_V
        )
        tl.store(final + place, state, mask=held)
