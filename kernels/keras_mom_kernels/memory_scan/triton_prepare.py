"""Triton kernels that prepare the chunks of the memory scan, all at once.

With `G` the running sum of log decays in a chunk: `A`, the decayed key products below
the diagonal times the write strength, `(I + A)^-1`, and `P`, the decayed query-key
products. With a decay of each channel, also queries and keys as they meet the state, so
that the scans know of no channels.

Source: arXiv 2406.06484 and 2412.06464.
"""

import triton
import triton.language as tl

from keras_mom_kernels.memory_scan.triton_common import (
    chunk_rows,
    dot,
    dot_onto,
    load_column,
    load_rows,
    operand,
    remainder,
    square_offsets,
    store_parts,
    store_rows,
    tile_offsets,
)
from keras_mom_kernels.memory_scan.triton_decays import (
    LOWEST_LOG_DECAY,
    QUANTA,
    channel_decays,
    head_pairs,
    level_decays,
    level_mask,
    lower,
    reset_counts,
)


@triton.jit
def list_chunks(
    cu_seqlens,
    table,
    offsets,
    sequences,
    chunks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """First row and rows of each chunk, and the first chunk of each sequence.

    `table` int32 `[chunks, 2]`, of which a program writes BLOCK rows, `offsets` int32
    `[sequences + 1]`. Chunks that no sequence needs have no rows.
    """
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    total = 0
    for start in range(0, sequences, BLOCK_S):
        sequence = start + tl.arange(0, BLOCK_S)
        known = sequence < sequences
        row = tl.load(cu_seqlens + sequence, mask=known, other=0)
        length = tl.load(cu_seqlens + sequence + 1, mask=known, other=0) - row
        needed = (length + (ROWS - 1)) // ROWS
        end = total + tl.cumsum(needed, axis=0)
        if tl.program_id(0) == 0:
            tl.store(offsets + sequence + 1, end, mask=known)
        place = chunk[:, None] - (end - needed)[None, :]
        inside = (place >= 0) & (place < needed[None, :])
        first += tl.sum(tl.where(inside, row[None, :] + place * ROWS, 0), axis=1)
        left = tl.minimum(length[None, :] - place * ROWS, ROWS)
        count += tl.sum(tl.where(inside, left, 0), axis=1)
        total += tl.sum(needed, axis=0)
    if tl.program_id(0) == 0:
        tl.store(offsets, 0)
    tl.store(table + 2 * chunk, first, mask=chunk < chunks)
    tl.store(table + 2 * chunk + 1, count, mask=chunk < chunks)


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
def decay_rows(
    query,
    key,
    coarse,
    fine,
    table,
    reading_query,
    reading_key,
    ending_key,
    ending_rest,
    channels,
    length,
    chunks,
    heads,
    K: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAYOUT: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Queries and keys `[rows, H, K]` as they meet the state before and behind them.

    Keys on their way to the state behind them go in PARTS operands: correlated ones
    differ by little more than a rounding of each. The decay of each channel over a
    chunk goes to `channels`, float32 `[chunks, H, K]`.
    """
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    start = (tl.program_id(0) % blocks) * BLOCK_K
    head = (tl.program_id(0) // blocks) % heads
    chunk = tl.program_id(0) // (blocks * heads)
    row, count = chunk_rows(chunk, table, length, chunks, ROWS, LAYOUT)
    keys, inside = tile_offsets(row, count, head, heads, start, K, BLOCK_K, C)
    into_query, into_key, to_end, whole = channel_decays(
        coarse, fine, row, count, head, heads, start, C, K, BLOCK_K, EXCLUSIVE
    )
    q = load_rows(query, keys, inside).to(tl.float32)
    store_rows(reading_query, keys, inside, q * into_query)
    k = load_rows(key, keys, inside).to(tl.float32)
    store_rows(reading_key, keys, inside, k * into_key)
    k *= to_end
    rounded = operand(k, PRECISION)
    store_rows(ending_key, keys, inside, rounded)
    if PARTS == 2:
        store_rows(ending_rest, keys, inside, remainder(k, rounded, PRECISION))
    column = start + tl.arange(0, BLOCK_K)
    target = (chunk.to(tl.int64) * heads + head) * K + column
    tl.store(channels + target, whole, mask=column < K)
