"""Gradients of the memory scan's rows in Triton, for a decay of each key channel.

As in `triton_row_gradients`, but pairs of rows meet through borders: at each level a
block's second half meets its first through the border between them, so that every
exponent stays at or below zero.
"""

import triton
import triton.language as tl

from keras_mom_kernels.memory_scan.triton_common import (
    chunk_rows,
    dot,
    dot_onto,
    dot_right,
    load_column,
    load_rows,
    operand,
    remainder,
    square_offsets,
    state_offsets,
    store_parts,
    store_rows,
    strong_gradient,
    tile_offsets,
)
from keras_mom_kernels.memory_scan.triton_decays import (
    LOWEST_LOG_DECAY,
    channel_decays,
    level_decays,
    level_mask,
    reset_counts,
)


@triton.jit
def square_gradients(
    resets,
    writes,
    write_grads,
    output_grad,
    squares,
    table,
    length,
    chunks,
    heads,
    scale,
    V: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LAYOUT: tl.constexpr,
    DELTA: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Gradients of a chunk's products of rows.

    They go to `squares`, `[chunks, H, 1 + PARTS, C, C]`: first those of queries with
    keys, then of keys with keys, and last the second operand of the first.
    """
    head = tl.program_id(0) % heads
    chunk = tl.program_id(0) // heads
    row, count = chunk_rows(chunk, table, length, chunks, ROWS, LAYOUT)
    pairs = tl.zeros((C, C), tl.float32)
    erase = tl.zeros((C, C), tl.float32)
    for start_v in range(0, V, BLOCK_V):
        values, filled = tile_offsets(row, count, head, heads, start_v, V, BLOCK_V, C)
        out = operand(load_rows(output_grad, values, filled), PRECISION)
        written = load_rows(writes, values, filled)
        wrote = operand(written, PRECISION)
        pairs = dot_onto(pairs, out, tl.trans(wrote), PRECISION)
        if PARTS == 2:
            rest = remainder(written, wrote, PRECISION)
            pairs = dot_onto(pairs, out, tl.trans(rest), PRECISION)
        if DELTA:
            solved = operand(load_rows(write_grads, values, filled), PRECISION)
            erase = dot_onto(erase, solved, tl.trans(wrote), PRECISION)
    pairs *= scale
    erase = -erase
    if RESETS:
        counts, _ = reset_counts(resets, row, count, C)
        same = counts[:, None] == counts[None, :]
        pairs = tl.where(same, pairs, 0.0)
        erase = tl.where(same, erase, 0.0)
    square = square_offsets(chunk, head, heads, 1 + PARTS, C)
    store_parts(squares, square, pairs, PARTS, 2 * C * C)
    if DELTA:
        store_rows(squares, square + C * C, None, erase)


@triton.jit
def crossing_gradients(
    query,
    key,
    value,
    beta,
    coarse,
    fine,
    resets,
    states,
    state_grads,
    writes,
    write_grads,
    output_grad,
    query_grad,
    key_grad,
    log_decay_grad,
    partials,
    table,
    length,
    chunks,
    heads,
    rows,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LAYOUT: tl.constexpr,
    DELTA: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BETA: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Gradients of a chunk's rows from all that crosses its borders.

    BLOCK_K channels of those of query, key and log decay; those of `beta` go to the
    first plane of `partials`, `[3, K blocks, rows, H]`. With one K block and BETA, X
    in `write_grads` becomes the gradient of the values, beta X.
    """
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    block = tl.program_id(0) % blocks
    start = block * BLOCK_K
    head = (tl.program_id(0) // blocks) % heads
    chunk = tl.program_id(0) // (blocks * heads)
    row, count = chunk_rows(chunk, table, length, chunks, ROWS, LAYOUT)
    t = tl.arange(0, C)
    keys, inside = tile_offsets(row, count, head, heads, start, K, BLOCK_K, C)

    into_query = tl.full((C,), 1.0, tl.float32)
    into_key, to_end, whole = into_query, into_query, 1.0
    if RESETS:
        counts, last = reset_counts(resets, row, count, C)
        first = tl.where(counts == 0, 1.0, 0.0)
        into_query *= first
        into_key *= first
        to_end *= tl.where(counts == last, 1.0, 0.0)
        whole *= tl.where(last == 0, 1.0, 0.0)
    strength = tl.full((C,), 1.0, tl.float32)
    if BETA:
        strength = load_column(beta, row, count, head, heads, C)

    # 1. Through the states.
    dq = tl.zeros((C, BLOCK_K), tl.float32)
    dk = tl.zeros((C, BLOCK_K), tl.float32)
    ending = tl.zeros((C, BLOCK_K), tl.float32)
    d_beta = tl.zeros((C,), tl.float32)
    strong = tl.zeros((C,), tl.float32)
    held = tl.zeros((BLOCK_K,), tl.float32)
    # What needs the writes has a loop of its own: in one, more registers are spilled.
    for start_v in range(0, V, BLOCK_V):
        values, filled = tile_offsets(row, count, head, heads, start_v, V, BLOCK_V, C)
        kept, kept_mask = state_offsets(
            chunk, head, heads, start, start_v, K, V, BLOCK_K, BLOCK_V
        )
        next_grad = operand(load_rows(state_grads, kept, kept_mask), PRECISION)
        written = load_rows(writes, values, filled)
        wrote = operand(written, PRECISION)
        ending = dot_onto(ending, wrote, tl.trans(next_grad), PRECISION)
        if PARTS == 2:
            rest = remainder(written, wrote, PRECISION)
            ending = dot_onto(ending, rest, tl.trans(next_grad), PRECISION)
        if DELTA:
            x = load_rows(write_grads, values, filled).to(tl.float32)
            strong += tl.sum(x * written, axis=1)
    tl.debug_barrier()
    for start_v in range(0, V, BLOCK_V):
        values, filled = tile_offsets(row, count, head, heads, start_v, V, BLOCK_V, C)
        kept, kept_mask = state_offsets(
            chunk, head, heads, start, start_v, K, V, BLOCK_K, BLOCK_V
        )
        state = operand(load_rows(states, kept, kept_mask), PRECISION)
        next_grad = operand(load_rows(state_grads, kept, kept_mask), PRECISION)
        held += tl.sum(state.to(tl.float32) * next_grad.to(tl.float32), axis=1)
        out = operand(load_rows(output_grad, values, filled), PRECISION)
        dq = dot_onto(dq, out, tl.trans(state), PRECISION)
        x = load_rows(write_grads, values, filled).to(tl.float32)
        if BETA:
            once = filled & (t < tl.where(block == 0, C, 0))[:, None]
            own = load_rows(value, values, once).to(tl.float32)
            d_beta += tl.sum(x * own, axis=1)
        if DELTA:
            dk = dot_onto(dk, operand(x, PRECISION), tl.trans(state), PRECISION)
        if BETA and blocks == 1:
            tl.debug_barrier()
            store_rows(write_grads, values, filled, x * strength[:, None])

    # 2. Through the decays: a log decay has what is read at its row and behind it, and
    # what is written before it.
    query_in, key_in, key_out, channels = channel_decays(
        coarse, fine, row, count, head, heads, start, C, K, BLOCK_K, EXCLUSIVE
    )
    dg = tl.zeros((C, BLOCK_K), tl.float32) + (held * channels * whole)[None, :]
    k = load_rows(key, keys, inside).to(tl.float32)
    ending *= key_out * to_end[:, None]
    until = operand(tl.where(t[None, :] < t[:, None], 1.0, 0.0), PRECISION)
    dg = dot_right(dg, until, k * ending, PRECISION, False)
    if DELTA:
        dk *= key_in * -into_key[:, None]
        d_beta += tl.sum(k * dk, axis=1)
        dk *= strength[:, None]
        later = t[None, :] >= t[:, None]
        if EXCLUSIVE:
            later = t[None, :] > t[:, None]
        later = operand(tl.where(later, 1.0, 0.0), PRECISION)
        dg = dot_right(dg, later, k * dk, PRECISION, False)
        dk += ending
    else:
        dk = ending
    store_rows(key_grad, keys, inside, dk)
    dq *= query_in * (into_query * scale)[:, None]
    store_rows(query_grad, keys, inside, dq)
    q = load_rows(query, keys, inside).to(tl.float32)
    since = operand(tl.where(t[None, :] >= t[:, None], 1.0, 0.0), PRECISION)
    dg = dot_right(dg, since, q * dq, PRECISION, False)
    store_rows(log_decay_grad, keys, inside, dg)
    if BETA:
        if DELTA:
            d_beta = strong_gradient(d_beta, strong, strength, block)
        target = partials + (block.to(tl.int64) * rows + row) * heads + head
        tl.store(target + t * heads, d_beta, mask=t < count)


@triton.jit
def level_gradients(
    query,
    key,
    log_decay,
    beta,
    coarse,
    fine,
    squares,
    query_grad,
    key_grad,
    log_decay_grad,
    level_partials,
    table,
    length,
    chunks,
    heads,
    rows,
    K: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAYOUT: tl.constexpr,
    DELTA: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BETA: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Gradients of a chunk's rows from its products of rows, level by level.

    They are added to those of query, key and log decay; those of `beta` go to
    `level_partials`, `[K blocks, rows, H]`.
    """
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    block = tl.program_id(0) % blocks
    start = block * BLOCK_K
    head = (tl.program_id(0) // blocks) % heads
    chunk = tl.program_id(0) // (blocks * heads)
    row, count = chunk_rows(chunk, table, length, chunks, ROWS, LAYOUT)
    t = tl.arange(0, C)
    keys, inside = tile_offsets(row, count, head, heads, start, K, BLOCK_K, C)
    square = squares + square_offsets(chunk, head, heads, 1 + PARTS, C)
    first = squares + (chunk.to(tl.int64) * heads + head) * ((1 + PARTS) * C * C)
    turned = first + (t[None, :] * C + t[:, None])
    strength = tl.full((C,), 1.0, tl.float32)
    if BETA:
        strength = load_column(beta, row, count, head, heads, C)
    q = load_rows(query, keys, inside).to(tl.float32)
    k = load_rows(key, keys, inside).to(tl.float32)
    diagonal = tl.load(first + t * (C + 1)).to(tl.float32)
    dq = load_rows(query_grad, keys, inside).to(tl.float32) + diagonal[:, None] * k
    dk = load_rows(key_grad, keys, inside).to(tl.float32) + diagonal[:, None] * q
    dg = load_rows(log_decay_grad, keys, inside).to(tl.float32)
    d_beta = tl.zeros((C,), tl.float32)
    half = 1
    while half < C:
        decay = level_decays(
            coarse, fine, row, count, head, heads, start, half, C, K, BLOCK_K, 0
        )
        keep = level_mask(half, C, False)
        keep_t = level_mask(half, C, True)
        columns = operand(k * decay, PRECISION)
        pairs = operand(tl.load(square, mask=keep, other=0.0), PRECISION)
        left = tl.zeros((C, BLOCK_K), tl.float32)
        if PARTS == 2:
            # What correlated keys add up to nearly cancels.
            rest = remainder(k * decay, columns, PRECISION)
            left = dot_onto(left, pairs, rest, PRECISION)
            rest = tl.load(square + 2 * C * C, mask=keep, other=0.0)
            left = dot_onto(left, operand(rest, PRECISION), columns, PRECISION)
        left = dot_onto(left, pairs, columns, PRECISION)
        left *= decay
        dq += left
        crossed = q * left
        pairs = operand(tl.load(turned, mask=keep_t, other=0.0), PRECISION)
        right = dot(pairs, operand(q * decay, PRECISION), PRECISION)
        aligned = (t[:, None] & ~(half - 1)) == (t[None, :] & ~(half - 1))
        second = (t[:, None] & half) != 0
        if DELTA:
            key_decay = decay
            if EXCLUSIVE:
                key_decay = level_decays(
                    coarse, fine, row, count, head, heads, start, half, C, K, BLOCK_K, 1
                )
            erase = operand(tl.load(square + C * C, mask=keep, other=0.0), PRECISION)
            left = dot(erase, columns, PRECISION) * key_decay
            d_beta += tl.sum(k * left, axis=1)
            left *= strength[:, None]
            dk += left
            erase = tl.load(turned + C * C, mask=keep_t, other=0.0).to(tl.float32)
            erase = operand(erase * strength[None, :], PRECISION)
            shifted = operand(k * key_decay, PRECISION)
            right = dot_onto(right, erase, shifted, PRECISION)
            if EXCLUSIVE:
                mask = aligned & second & (t[None, :] > t[:, None])
                mask = operand(tl.where(mask, 1.0, 0.0), PRECISION)
                dg = dot_right(dg, mask, k * left, PRECISION, False)
            else:
                crossed += k * left
        right *= decay
        dk += right
        # Rows of a second half hold what lies behind them, those of a first half
        # what lies before them.
        held_by = tl.where(second, t[None, :] >= t[:, None], t[None, :] < t[:, None])
        mask = operand(tl.where(aligned & held_by, 1.0, 0.0), PRECISION)
        dg = dot_right(dg, mask, crossed + k * right, PRECISION, False)
        half *= 2
    counts_for = load_rows(log_decay, keys, inside).to(tl.float32)
    dg = tl.where(counts_for >= LOWEST_LOG_DECAY, dg, 0.0)
    store_rows(log_decay_grad, keys, inside, dg)
    store_rows(query_grad, keys, inside, dq)
    store_rows(key_grad, keys, inside, dk)
    if BETA:
        # `crossing_gradients` has all of the others.
        d_beta = strong_gradient(d_beta, d_beta * 0.0, strength, block)
        target = (block.to(tl.int64) * rows + row) * heads + head
        target = level_partials + target
        tl.store(target + t * heads, d_beta, mask=t < count)
