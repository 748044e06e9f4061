"""Gradients of a chunk's rows, for the memory scan without decay or with one a head.

All chunks at once, BLOCK_K key channels a program; all that is computed is linear in
them. The gradient of a log decay is a sum over what it decays alone: no large numbers
cancel, so that those of strong decays keep their digits.
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
    state_offsets,
    store_rows,
    strong_gradient,
    tile_offsets,
    wide,
)
from keras_mom_kernels.memory_scan.triton_decays import (
    LOWEST_LOG_DECAY,
    head_decays,
    head_pairs,
    lower,
    reset_counts,
)


@triton.jit
def _pairs_log_decay(
    products, C: tl.constexpr, EXCLUSIVE: tl.constexpr, PRECISION: tl.constexpr
):
    """Gradient of each log decay from a chunk's pairs `[t, j]`.

    The pair (t, j) holds the log decays of j + 1 to t, to t - 1 with EXCLUSIVE.
    """
    t = tl.arange(0, C)
    earlier = operand(tl.where(t[:, None] < t[None, :], 1.0, 0.0), PRECISION)
    rounded = operand(products, PRECISION)
    total = dot(rounded, earlier, PRECISION)
    if PRECISION == "bf16":
        # Products of correlated keys nearly cancel in their sums.
        rest = remainder(products, rounded, PRECISION)
        total = dot_onto(total, rest, earlier, PRECISION)
    later = t[:, None] >= t[None, :]
    if EXCLUSIVE:
        later = t[:, None] > t[None, :]
    return tl.sum(tl.where(later, total, 0.0), axis=0)


@triton.jit
def row_gradients(
    query,
    key,
    coarse,
    fine,
    resets,
    states,
    state_grads,
    writes,
    output_grad,
    query_grad,
    key_grad,
    row_partials,
    squares,
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
    STAGES: tl.constexpr,
    LAYOUT: tl.constexpr,
    DECAY: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a chunk's rows but for what comes through the solve.

    Without decay or with one a head; BLOCK_K channels of those of query and key. What
    those of log decays are sums of goes to `row_partials`, `[3, K blocks, rows, H]`.
    """
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    block = tl.program_id(0) % blocks
    start = block * BLOCK_K
    head = (tl.program_id(0) // blocks) % heads
    chunk = tl.program_id(0) // (blocks * heads)
    row, count = chunk_rows(chunk, table, length, chunks, ROWS, LAYOUT)
    t = tl.arange(0, C)
    keys, inside = tile_offsets(row, count, head, heads, start, K, BLOCK_K, C)

    # 1. Decays, as in `scan_chunks`.
    if DECAY == "head":
        into_query, _, to_end, whole = head_decays(
            coarse, fine, row, count, head, heads, C, False
        )
    else:
        into_query = tl.full((C,), 1.0, tl.float32)
        to_end, whole = into_query, 1.0
    same = tl.full((C, C), True, tl.int1)
    if RESETS:
        counts, last = reset_counts(resets, row, count, C)
        first = tl.where(counts == 0, 1.0, 0.0)
        into_query *= first
        to_end *= tl.where(counts == last, 1.0, 0.0)
        whole *= tl.where(last == 0, 1.0, 0.0)
        same = counts[:, None] == counts[None, :]

    # 2. Through the states before and behind the chunk.
    dq = tl.zeros((C, BLOCK_K), tl.float32)
    dk = tl.zeros((C, BLOCK_K), tl.float32)
    pairs = tl.zeros((C, C), tl.float32)
    held = tl.zeros((BLOCK_K,), tl.float32)
    for start_v in tl.range(0, V, BLOCK_V, num_stages=STAGES):
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
        dq = dot_onto(dq, out, tl.trans(state), PRECISION)
        dk = dot_onto(dk, wrote, tl.trans(next_grad), PRECISION)
        pairs = dot_onto(pairs, out, tl.trans(wrote), PRECISION)
    q = operand(load_rows(query, keys, inside), PRECISION)
    k = operand(load_rows(key, keys, inside), PRECISION)
    dq *= (into_query * scale)[:, None]
    dk *= to_end[:, None]
    if DECAY == "head":
        plane = wide(rows) * heads * blocks
        target = row_partials + (block.to(tl.int64) * rows + row) * heads + head
        reads = tl.sum(q.to(tl.float32) * dq, axis=1)
        tl.store(target + t * heads, reads, mask=t < count)
        ends = tl.sum(k.to(tl.float32) * dk, axis=1)
        tl.store(target + plane + t * heads, ends, mask=t < count)
        moved = tl.zeros((C,), tl.float32) + tl.sum(held, axis=0) * whole

    # 3. Through the query-key products. A square is stored and read again where it is
    # needed transposed: Triton up to 3.7 miscompiles products of a transposed
    # accumulator on Hopper.
    square = square_offsets(chunk * heads + head, block, blocks, 1, C)
    pairs = tl.where(same, pairs, 0.0) * scale
    if DECAY == "head":
        pairs *= head_pairs(
            coarse, fine, row, count, head, heads, C, False, False, False
        )
    else:
        pairs = tl.where(lower(t, False, False), pairs, 0.0)
    store_rows(squares, square, None, pairs)
    tl.debug_barrier()
    if PRECISION == "bf16":
        # What correlated keys add up to nearly cancels. Read again, operands are not
        # spilled.
        rounded = operand(tl.load(squares + square), PRECISION)
        dq = dot_onto(dq, rounded, k, PRECISION)
        dq = dot_onto(dq, remainder(pairs, rounded, PRECISION), k, PRECISION)
    else:
        dq = dot_onto(dq, operand(pairs, PRECISION), k, PRECISION)
    store_rows(query_grad, keys, inside, dq)
    if DECAY == "head":
        pairs *= dot(q, tl.trans(k), PRECISION)
        moved += _pairs_log_decay(pairs, C, False, PRECISION)
    pairs_t = tl.trans(operand(tl.load(squares + square), PRECISION))
    dk = dot_onto(dk, pairs_t, q, PRECISION)

    store_rows(key_grad, keys, inside, dk)
    if DECAY == "head":
        tl.store(target + 2 * plane + t * heads, moved, mask=t < count)


@triton.jit
def solve_gradients(
    key,
    value,
    beta,
    coarse,
    fine,
    resets,
    states,
    writes,
    write_grads,
    key_grad,
    partials,
    squares,
    table,
    length,
    chunks,
    heads,
    rows,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    LAYOUT: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BETA: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a chunk's rows through the solve, and of `beta` and the values.

    Those of keys are added to `key_grad`; `partials` is like `row_partials`. With one
    K block and BETA, X in `write_grads` becomes the gradient of the values, beta X.
    """
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    block = tl.program_id(0) % blocks
    start = block * BLOCK_K
    head = (tl.program_id(0) // blocks) % heads
    chunk = tl.program_id(0) // (blocks * heads)
    row, count = chunk_rows(chunk, table, length, chunks, ROWS, LAYOUT)
    t = tl.arange(0, C)
    keys, inside = tile_offsets(row, count, head, heads, start, K, BLOCK_K, C)

    # 1. Decays, as in `scan_chunks`.
    if DECAY == "head":
        _, into_key, _, _ = head_decays(
            coarse, fine, row, count, head, heads, C, EXCLUSIVE
        )
    else:
        into_key = tl.full((C,), 1.0, tl.float32)
    same = tl.full((C, C), True, tl.int1)
    if RESETS:
        counts, _ = reset_counts(resets, row, count, C)
        into_key *= tl.where(counts == 0, 1.0, 0.0)
        same = counts[:, None] == counts[None, :]
    strength = tl.full((C,), 1.0, tl.float32)
    if BETA:
        strength = load_column(beta, row, count, head, heads, C)

    # 2. Through the solve.
    dk = tl.zeros((C, BLOCK_K), tl.float32)
    d_beta = tl.zeros((C,), tl.float32)
    strong = tl.zeros((C,), tl.float32)
    erase = tl.zeros((C, C), tl.float32)
    k = operand(load_rows(key, keys, inside), PRECISION)
    for start_v in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        values, filled = tile_offsets(row, count, head, heads, start_v, V, BLOCK_V, C)
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
            strong += tl.sum(x * wrote.to(tl.float32), axis=1)
            solved = operand(solved, PRECISION)
            erase = dot_onto(erase, solved, tl.trans(wrote), PRECISION)
            dk = dot_onto(dk, solved, tl.trans(state), PRECISION)
        if BETA and blocks == 1:
            tl.debug_barrier()
            store_rows(write_grads, values, filled, x * strength[:, None])
    if DELTA:
        reading = -into_key * tl.sum(k.to(tl.float32) * dk, axis=1)
        d_beta += reading
        dk *= (strength * -into_key)[:, None]
        erase = tl.where(same, -erase, 0.0)
        if DECAY == "head":
            erase *= head_pairs(
                coarse, fine, row, count, head, heads, C, EXCLUSIVE, True, False
            )
        else:
            erase = tl.where(lower(t, True, False), erase, 0.0)
        weighted = erase * strength[:, None]
        square = square_offsets(chunk * heads + head, block, blocks, 1, C)
        store_rows(squares, square, None, weighted)
        tl.debug_barrier()
        dk += load_rows(key_grad, keys, inside).to(tl.float32)
        dk = dot_onto(dk, operand(weighted, PRECISION), k, PRECISION)
        erase_t = tl.trans(operand(tl.load(squares + square), PRECISION))
        dk = dot_onto(dk, erase_t, k, PRECISION)
        store_rows(key_grad, keys, inside, dk)
        plane = wide(rows) * heads * blocks
        target = partials + (block.to(tl.int64) * rows + row) * heads + head
        if BETA or DECAY == "head":
            weighted = erase * dot(k, tl.trans(k), PRECISION)
            d_beta += tl.sum(weighted, axis=1)
        if DECAY == "head":
            reading *= strength
            tl.store(target + plane + t * heads, reading, mask=t < count)
            weighted *= strength[:, None]
            moved = _pairs_log_decay(weighted, C, EXCLUSIVE, PRECISION)
            tl.store(target + 2 * plane + t * heads, moved, mask=t < count)
    if BETA:
        if DELTA:
            d_beta = strong_gradient(d_beta, strong, strength, block)
        target = partials + (block.to(tl.int64) * rows + row) * heads + head
        tl.store(target + t * heads, d_beta, mask=t < count)


@triton.jit
def _partial(partials, plane, rows, heads, offsets, mask, BLOCKS: tl.constexpr):
    """A plane of `partials`, summed over K blocks."""
    size = wide(rows) * heads
    total = tl.load(partials + plane * BLOCKS * size + offsets, mask=mask, other=0.0)
    for block in tl.static_range(1, BLOCKS):
        source = partials + (plane * BLOCKS + block) * size
        total += tl.load(source + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def sum_partials(
    row_partials,
    partials,
    level_partials,
    log_decay,
    beta_grad,
    log_decay_grad,
    table,
    length,
    chunks,
    heads,
    rows,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LEVELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BETA: tl.constexpr,
):
    """Gradients of `beta` and of one log decay a head, `[rows, H]`."""
    row, count = chunk_rows(tl.program_id(0), table, length, chunks, ROWS, LAYOUT)
    t = tl.arange(0, C)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets = row * heads + (t[:, None] * heads + head[None, :])
    mask = (t < count)[:, None] & (head < heads)[None, :]
    if BETA:
        total = _partial(partials, 0, rows, heads, offsets, mask, BLOCKS)
        if DECAY == "channel" and DELTA:
            total += _partial(level_partials, 0, rows, heads, offsets, mask, LEVELS)
        store_rows(beta_grad, offsets, mask, total)
    if DECAY == "head":
        # A log decay decays what is read at its row and behind it, and what is
        # written before it.
        later = _partial(row_partials, 0, rows, heads, offsets, mask, ROW_BLOCKS)
        before = mask & (t > 0)[:, None]
        ends = _partial(
            row_partials, 1, rows, heads, offsets - heads, before, ROW_BLOCKS
        )
        total = tl.cumsum(ends, axis=0)
        if DELTA:
            reading, present = offsets, mask
            if EXCLUSIVE:
                reading, present = offsets + heads, mask & (t + 1 < count)[:, None]
            later += _partial(partials, 1, rows, heads, reading, present, BLOCKS)
        total += tl.cumsum(later, axis=0, reverse=True)
        total += _partial(row_partials, 2, rows, heads, offsets, mask, ROW_BLOCKS)
        if DELTA:
            total += _partial(partials, 2, rows, heads, offsets, mask, BLOCKS)
        step = tl.load(log_decay + offsets, mask=mask, other=0.0).to(tl.float32)
        total = tl.where(step >= LOWEST_LOG_DECAY, total, 0.0)
        store_rows(log_decay_grad, offsets, mask, total)
