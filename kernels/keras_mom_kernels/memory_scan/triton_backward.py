"""Backward Triton kernels of the memory scan.

`scan_gradients` hands the gradient of the state back from chunk to chunk, and
`row_gradients` then works on all chunks at once, BLOCK_K key channels a program; all
that it computes is linear in them. With the names of `triton_forward`, `N` the
gradient of the state behind a chunk, and `X` what the solve hands back to beta R:

    dU = P^T dO + (K exp(G_C - G)) N            X = (I + A)^-T dU
    dS = (Q exp(G))^T dO + exp(G_C) N - (K exp(G))^T beta X

The gradient of a log decay is a sum over what it decays alone: no large numbers
cancel, so that those of strong decays keep their digits.
"""

import triton
import triton.language as tl

from keras_mom_kernels.memory_scan.triton_common import (
    LOWEST_LOG_DECAY,
    channel_decays,
    chunk_rows,
    dot,
    dot_right,
    dot_square,
    head_decays,
    head_pairs,
    level_decays,
    level_mask,
    load_column,
    load_rows,
    lower,
    operand,
    reset_counts,
    segment_chunks,
    square_offsets,
    state_offsets,
    store_rows,
    tile_offsets,
)


@triton.jit
def scan_gradients(
    query,
    key,
    beta,
    coarse,
    fine,
    resets,
    inverse,
    attention,
    output_grad,
    final_grad,
    state_grads,
    write_grads,
    initial_grad,
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
    RAGGED: tl.constexpr,
    SEGMENTED: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BETA: tl.constexpr,
    RESETS: tl.constexpr,
    INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Writes N to `state_grads` `[chunks, H, K, V]` and X to `write_grads`.

    With INITIAL also the gradient of the initial state. BLOCK_K holds all key channels.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    start_v = (tl.program_id(0) % blocks) * BLOCK_V
    head = (tl.program_id(0) // blocks) % heads
    segment = tl.program_id(0) // (blocks * heads)
    begin, end = segment_chunks(segment, offsets, segments, chunks, SEGMENTED)
    place, held = state_offsets(
        segment, head, heads, 0, start_v, K, V, BLOCK_K, BLOCK_V
    )
    state_grad = tl.load(final_grad + place, mask=held, other=0.0)

    for step in tl.range(0, end - begin, num_stages=STAGES):
        chunk = end - 1 - step
        row, count = chunk_rows(chunk, table, length, chunks, ROWS, RAGGED)
        keys, inside = tile_offsets(row, count, head, heads, 0, K, BLOCK_K, C)
        values, filled = tile_offsets(row, count, head, heads, start_v, V, BLOCK_V, C)
        q = operand(load_rows(query, keys, inside), PRECISION)
        k = operand(load_rows(key, keys, inside), PRECISION)
        out = operand(load_rows(output_grad, values, filled), PRECISION)
        next_grad = operand(state_grad, PRECISION)
        kept, kept_mask = state_offsets(
            chunk, head, heads, 0, start_v, K, V, BLOCK_K, BLOCK_V
        )
        store_rows(state_grads, kept, kept_mask, state_grad)

        # 1. Decays, as in `scan_chunks`.
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
        reading_query, reading_key, ending_key = q, k, k
        if DECAY == "channel":
            query_in, key_in, key_out, channels = channel_decays(
                coarse, fine, row, count, head, heads, 0, C, K, BLOCK_K, EXCLUSIVE
            )
            wide = k.to(tl.float32)
            reading_query = operand(q.to(tl.float32) * query_in, PRECISION)
            reading_key = operand(wide * key_in, PRECISION)
            ending_key = operand(wide * key_out, PRECISION)

        # 2. Gradient of what each row writes, from the outputs and the state.
        square = square_offsets(chunk, head, heads, PARTS, C)
        grad = dot_square(
            attention, square, out.to(tl.float32), True, PARTS, False, PRECISION, C
        )
        grad = grad * scale
        grad += dot(ending_key, next_grad, PRECISION) * to_end[:, None]
        if DELTA:
            grad = dot_square(
                inverse, square, grad, True, PARTS, False, PRECISION, C
            )
        store_rows(write_grads, values, filled, grad)

        # 3. Gradient of the state before the chunk.
        state_grad *= whole
        if DECAY == "channel":
            state_grad *= channels[:, None]
        read = out.to(tl.float32) * (into_query * scale)[:, None]
        state_grad += dot_right(tl.trans(reading_query), read, PRECISION, False)
        if DELTA:
            if BETA:
                grad *= load_column(beta, row, count, head, heads, C)[:, None]
            grad *= into_key[:, None]
            state_grad -= dot_right(
                tl.trans(reading_key), grad, PRECISION, PARTS == 2
            )

    if INITIAL:
        tl.store(initial_grad + place, state_grad, mask=held)


@triton.jit
def _pairs_log_decay(products, C: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """Gradient of each log decay from a chunk's pairs `[t, j]`, moved up by one row.

    The pair (t, j) holds the log decays of j + 1 to t, to t - 1 with EXCLUSIVE.
    """
    t = tl.arange(0, C)
    later = t[:, None] > t[None, :]
    if EXCLUSIVE:
        later = t[:, None] > t[None, :] + 1
    return tl.sum(tl.where(later, tl.cumsum(products, axis=1), 0.0), axis=0)


@triton.jit
def row_gradients(
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
    beta_grad,
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
    RAGGED: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BETA: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a chunk's rows, without decay or with one a head.

    BLOCK_K channels of those of query and key, and the rest: those of `beta` and of
    the log decays go to float32 `[K blocks, rows, H]`, to be summed. With one K block
    and BETA, X in `write_grads` becomes the gradient of the values, beta X.
    """
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    block = tl.program_id(0) % blocks
    start = block * BLOCK_K
    head = (tl.program_id(0) // blocks) % heads
    chunk = tl.program_id(0) // (blocks * heads)
    row, count = chunk_rows(chunk, table, length, chunks, ROWS, RAGGED)
    t = tl.arange(0, C)
    keys, inside = tile_offsets(row, count, head, heads, start, K, BLOCK_K, C)

    # 1. Decays, as in `scan_chunks`.
    if DECAY == "head":
        into_query, into_key, to_end, whole = head_decays(
            coarse, fine, row, count, head, heads, C, EXCLUSIVE
        )
    else:
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

    # 2. Through the states before and behind the chunk.
    dq = tl.zeros((C, BLOCK_K), tl.float32)
    dk = tl.zeros((C, BLOCK_K), tl.float32)
    pairs = tl.zeros((C, C), tl.float32)
    pairs_t = tl.zeros((C, C), tl.float32)
    held = tl.zeros((BLOCK_K,), tl.float32)
    for start_v in range(0, V, BLOCK_V):
        values, filled = tile_offsets(row, count, head, heads, start_v, V, BLOCK_V, C)
        kept, kept_mask = state_offsets(
            chunk, head, heads, start, start_v, K, V, BLOCK_K, BLOCK_V
        )
        state = operand(load_rows(states, kept, kept_mask), PRECISION)
        next_grad = operand(load_rows(state_grads, kept, kept_mask), PRECISION)
        out = operand(load_rows(output_grad, values, filled), PRECISION)
        wrote = operand(load_rows(writes, values, filled), PRECISION)
        if DECAY == "head":
            held += tl.sum(state.to(tl.float32) * next_grad.to(tl.float32), axis=1)
        dq += dot(out, tl.trans(state), PRECISION)
        dk += dot(wrote, tl.trans(next_grad), PRECISION)
        pairs += dot(out, tl.trans(wrote), PRECISION)
        pairs_t += dot(wrote, tl.trans(out), PRECISION)
    q = operand(load_rows(query, keys, inside), PRECISION)
    k = operand(load_rows(key, keys, inside), PRECISION)
    dq *= (into_query * scale)[:, None]
    dk *= to_end[:, None]
    if DECAY == "head":
        # Each log decay has what lies before its row, or behind it.
        reads = tl.sum(q.to(tl.float32) * dq, axis=1)
        ends = tl.sum(k.to(tl.float32) * dk, axis=1)
        dg = tl.zeros((C,), tl.float32) + tl.sum(held, axis=0) * whole
        dg += tl.sum(tl.where(t[:, None] >= t[None, :], reads[:, None], 0.0), 0)
        dg += tl.sum(tl.where(t[:, None] < t[None, :], ends[:, None], 0.0), 0)

    # 3. Through the query-key products.
    pairs = tl.where(same, pairs, 0.0) * scale
    pairs_t = tl.where(same, pairs_t, 0.0) * scale
    moved = tl.zeros((C,), tl.float32)
    if DECAY == "head":
        pairs *= head_pairs(
            coarse, fine, row, count, head, heads, C, False, False, False
        )
        pairs_t *= head_pairs(
            coarse, fine, row, count, head, heads, C, False, False, True
        )
    else:
        pairs = tl.where(lower(t, False, False), pairs, 0.0)
        pairs_t = tl.where(lower(t, False, True), pairs_t, 0.0)
    dq += dot(operand(pairs, PRECISION), k, PRECISION)
    dk += dot(operand(pairs_t, PRECISION), q, PRECISION)
    store_rows(query_grad, keys, inside, dq)
    if DECAY == "head":
        pairs *= dot(q, tl.trans(k), PRECISION)
        moved += _pairs_log_decay(pairs, C, False)

    # 4. Through the solve.
    d_beta = tl.zeros((C,), tl.float32)
    reading = tl.zeros((C,), tl.float32)
    erase = tl.zeros((C, C), tl.float32)
    erase_t = tl.zeros((C, C), tl.float32)
    if DELTA or BETA:
        for start_v in range(0, V, BLOCK_V):
            values, filled = tile_offsets(
                row, count, head, heads, start_v, V, BLOCK_V, C
            )
            solved = load_rows(write_grads, values, filled)
            x = solved.to(tl.float32)
            if BETA:
                once = filled & (t < tl.where(block == 0, C, 0))[:, None]
                own = load_rows(value, values, once).to(tl.float32)
                d_beta += tl.sum(x * own, axis=1)
            if DELTA:
                kept, kept_mask = state_offsets(
                    chunk, head, heads, start, start_v, K, V, BLOCK_K, BLOCK_V
                )
                state = operand(load_rows(states, kept, kept_mask), PRECISION)
                wrote = operand(load_rows(writes, values, filled), PRECISION)
                solved = operand(solved, PRECISION)
                erase -= dot(solved, tl.trans(wrote), PRECISION)
                erase_t -= dot(wrote, tl.trans(solved), PRECISION)
                reading -= tl.sum(x * dot(k, state, PRECISION), axis=1)
                weighted = operand(x * (strength * into_key)[:, None], PRECISION)
                dk -= dot(weighted, tl.trans(state), PRECISION)
            if BETA and blocks == 1:
                tl.debug_barrier()
                store_rows(write_grads, values, filled, x * strength[:, None])
    if DELTA:
        reading *= into_key
        d_beta += reading
        erase = tl.where(same, erase, 0.0)
        erase_t = tl.where(same, erase_t, 0.0) * strength[None, :]
        if DECAY == "head":
            erase *= head_pairs(
                coarse, fine, row, count, head, heads, C, EXCLUSIVE, True, False
            )
            erase_t *= head_pairs(
                coarse, fine, row, count, head, heads, C, EXCLUSIVE, True, True
            )
        else:
            erase = tl.where(lower(t, True, False), erase, 0.0)
            erase_t = tl.where(lower(t, True, True), erase_t, 0.0)
        # One lies below the diagonal, the other above it.
        both = operand(erase * strength[:, None] + erase_t, PRECISION)
        dk += dot(both, k, PRECISION)
        if BETA or DECAY == "head":
            erase *= dot(k, tl.trans(k), PRECISION)
            d_beta += tl.sum(erase, axis=1)
        if DECAY == "head":
            later = t[:, None] >= t[None, :]
            if EXCLUSIVE:
                later = t[:, None] > t[None, :]
            reading *= strength
            dg += tl.sum(tl.where(later, reading[:, None], 0.0), 0)
            moved += _pairs_log_decay(erase * strength[:, None], C, EXCLUSIVE)
    store_rows(key_grad, keys, inside, dk)
    target = (block.to(tl.int64) * rows + row + t) * heads + head
    if BETA:
        tl.store(beta_grad + target, d_beta, mask=t < count)
    if DECAY == "head":
        down = t[:, None] + 1 == t[None, :]
        dg += tl.sum(tl.where(down, moved[:, None], 0.0), 0)
        counts_for = load_column(log_decay, row, count, head, heads, C)
        dg = tl.where(counts_for >= LOWEST_LOG_DECAY, dg, 0.0)
        tl.store(log_decay_grad + target, dg, mask=t < count)
