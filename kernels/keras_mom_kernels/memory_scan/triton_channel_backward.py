"""Backward Triton kernel of the memory scan for a decay of each key channel.

As `row_gradients` of `triton_backward`. Pairs of rows meet through borders: at each
level a block's second half meets its first through the border between them, so that
every exponent stays at or below zero.
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
    state_offsets,
    store_rows,
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
def channel_row_gradients(
    query,
    key,
    value,
    log_decay,
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
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BETA: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a chunk's rows: BLOCK_K channels of query, key and log decay.

    Those of `beta` go to `partials`, float32 `[6, K blocks, rows, H]`, to be summed.
    With one K block and BETA, X in `write_grads` becomes the gradient of the values,
    beta X.
    """
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    block = tl.program_id(0) % blocks
    start = block * BLOCK_K
    head = (tl.program_id(0) // blocks) % heads
    chunk = tl.program_id(0) // (blocks * heads)
    row, count = chunk_rows(chunk, table, length, chunks, ROWS, LAYOUT)
    t = tl.arange(0, C)
    keys, inside = tile_offsets(row, count, head, heads, start, K, BLOCK_K, C)
    k = operand(load_rows(key, keys, inside), PRECISION)

    # 1. Decays, as in `scan_chunks`.
    into_query = tl.full((C,), 1.0, tl.float32)
    into_key, to_end, whole = into_query, into_query, 1.0
    same = tl.full((C, C), True, tl.int1)
    if RESETS:
        counts, last = reset_counts(resets, row, count, C)
        first = tl.where(counts == 0, 1.0, 0.0)
        into_query *= first
        into_key *= first
        to_end *= tl.where(counts == last, 1.0, 0.0)
        whole *= tl.where(last == 0, 1.0, 0.0)
        same = counts[:, None] == counts[None, :]
    strength = tl.full((C,), 1.0, tl.float32)
    if BETA:
        strength = load_column(beta, row, count, head, heads, C)
    query_in, key_in, key_out, channels = channel_decays(
        coarse, fine, row, count, head, heads, start, C, K, BLOCK_K, EXCLUSIVE
    )
    reading_key = operand(k.to(tl.float32) * key_in, PRECISION)

    # 2. Through the state before the chunk, and the solve.
    dq = tl.zeros((C, BLOCK_K), tl.float32)
    dk = tl.zeros((C, BLOCK_K), tl.float32)
    d_beta = tl.zeros((C,), tl.float32)
    held = tl.zeros((BLOCK_K,), tl.float32)
    erase = tl.zeros((C, C), tl.float32)
    erase_t = tl.zeros((C, C), tl.float32)
    for start_v in range(0, V, BLOCK_V):
        values, filled = tile_offsets(row, count, head, heads, start_v, V, BLOCK_V, C)
        kept, kept_mask = state_offsets(
            chunk, head, heads, start, start_v, K, V, BLOCK_K, BLOCK_V
        )
        state = operand(load_rows(states, kept, kept_mask), PRECISION)
        out = operand(load_rows(output_grad, values, filled), PRECISION)
        dq = dot_onto(dq, out, tl.trans(state), PRECISION)
        solved = load_rows(write_grads, values, filled)
        x = solved.to(tl.float32)
        next_grad = load_rows(state_grads, kept, kept_mask).to(tl.float32)
        held += tl.sum(state.to(tl.float32) * next_grad, axis=1)
        if BETA:
            once = filled & (t < tl.where(block == 0, C, 0))[:, None]
            own = load_rows(value, values, once).to(tl.float32)
            d_beta += tl.sum(x * own, axis=1)
        if DELTA:
            read = dot(reading_key, state, PRECISION) * into_key[:, None]
            d_beta -= tl.sum(x * read, axis=1)
            wrote = operand(load_rows(writes, values, filled), PRECISION)
            solved = operand(solved, PRECISION)
            erase = dot_onto(erase, solved, tl.trans(wrote), PRECISION)
            erase_t = dot_onto(erase_t, wrote, tl.trans(solved), PRECISION)
            weighted = operand(x * (strength * -into_key)[:, None], PRECISION)
            dk = dot_onto(dk, weighted, tl.trans(state), PRECISION)
        if BETA and blocks == 1:
            tl.debug_barrier()
            store_rows(write_grads, values, filled, x * strength[:, None])

    # 3. Through the state behind the chunk, and the pairs of rows.
    ending = tl.zeros((C, BLOCK_K), tl.float32)
    pairs = tl.zeros((C, C), tl.float32)
    pairs_t = tl.zeros((C, C), tl.float32)
    for start_v in range(0, V, BLOCK_V):
        values, filled = tile_offsets(row, count, head, heads, start_v, V, BLOCK_V, C)
        kept, kept_mask = state_offsets(
            chunk, head, heads, start, start_v, K, V, BLOCK_K, BLOCK_V
        )
        next_grad = operand(load_rows(state_grads, kept, kept_mask), PRECISION)
        out = operand(load_rows(output_grad, values, filled), PRECISION)
        wrote = operand(load_rows(writes, values, filled), PRECISION)
        ending = dot_onto(ending, wrote, tl.trans(next_grad), PRECISION)
        pairs = dot_onto(pairs, out, tl.trans(wrote), PRECISION)
        pairs_t = dot_onto(pairs_t, wrote, tl.trans(out), PRECISION)
    pairs = tl.where(same, pairs, 0.0) * scale
    pairs_t = tl.where(same, pairs_t, 0.0) * scale
    erase = tl.where(same, -erase, 0.0)
    erase_t = tl.where(same, -erase_t, 0.0)

    q = operand(load_rows(query, keys, inside), PRECISION)
    wide_q, wide_k = q.to(tl.float32), k.to(tl.float32)
    dq *= (into_query * scale)[:, None]
    ending *= to_end[:, None]
    # 4. Of log decays, one a key channel: what crosses the chunk's borders, then
    # the pairs of each level.
    dq *= query_in
    dk *= key_in
    ending *= key_out
    since = operand(tl.where(t[None, :] >= t[:, None], 1.0, 0.0), PRECISION)
    after = operand(tl.where(t[None, :] > t[:, None], 1.0, 0.0), PRECISION)
    until = operand(tl.where(t[None, :] < t[:, None], 1.0, 0.0), PRECISION)
    dg = tl.zeros((C, BLOCK_K), tl.float32) + (held * channels * whole)[None, :]
    dg = dot_right(dg, until, wide_k * ending, PRECISION, False)
    if EXCLUSIVE:
        dg = dot_right(dg, since, wide_q * dq, PRECISION, False)
        dg = dot_right(dg, after, wide_k * dk, PRECISION, False)
    else:
        dg = dot_right(dg, since, wide_q * dq + wide_k * dk, PRECISION, False)
    dk += ending
    diagonal = tl.sum(tl.where(t[:, None] == t[None, :], pairs, 0.0), axis=1)
    dq += diagonal[:, None] * wide_k
    dk += diagonal[:, None] * wide_q
    half = 1
    while half < C:
        decay = level_decays(
            coarse, fine, row, count, head, heads, start, half, C, K, BLOCK_K, 0
        )
        keep = level_mask(half, C, False)
        keep_t = level_mask(half, C, True)
        columns = operand(wide_k * decay, PRECISION)
        of_query = operand(tl.where(keep, pairs, 0.0), PRECISION)
        left = dot(of_query, columns, PRECISION) * decay
        of_query = operand(tl.where(keep_t, pairs_t, 0.0), PRECISION)
        right = dot(of_query, operand(wide_q * decay, PRECISION), PRECISION)
        dq += left
        crossed = wide_q * left
        aligned = (t[:, None] & ~(half - 1)) == (t[None, :] & ~(half - 1))
        second = (t[:, None] & half) != 0
        if DELTA:
            key_decay = decay
            if EXCLUSIVE:
                key_decay = level_decays(
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
            of_key = operand(tl.where(keep, erase, 0.0), PRECISION)
            left = dot(of_key, columns, PRECISION) * key_decay
            d_beta += tl.sum(wide_k * left, axis=1)
            left *= strength[:, None]
            dk += left
            of_key = tl.where(keep_t, erase_t * strength[None, :], 0.0)
            shifted = operand(wide_k * key_decay, PRECISION)
            right += dot(operand(of_key, PRECISION), shifted, PRECISION)
            if EXCLUSIVE:
                mask = aligned & second & (t[None, :] > t[:, None])
                mask = operand(tl.where(mask, 1.0, 0.0), PRECISION)
                dg = dot_right(dg, mask, wide_k * left, PRECISION, False)
            else:
                crossed += wide_k * left
        right *= decay
        dk += right
        # Rows of a second half hold what lies behind them, those of a first half
        # what lies before them.
        held_by = tl.where(second, t[None, :] >= t[:, None], t[None, :] < t[:, None])
        mask = operand(tl.where(aligned & held_by, 1.0, 0.0), PRECISION)
        dg = dot_right(dg, mask, crossed + wide_k * right, PRECISION, False)
        half *= 2
    counts_for = load_rows(log_decay, keys, inside).to(tl.float32)
    dg = tl.where(counts_for >= LOWEST_LOG_DECAY, dg, 0.0)
    store_rows(log_decay_grad, keys, inside, dg)
    store_rows(query_grad, keys, inside, dq)
    store_rows(key_grad, keys, inside, dk)
    if BETA:
        target = partials + (block.to(tl.int64) * rows + row) * heads + head
        tl.store(target + t * heads, d_beta, mask=t < count)
