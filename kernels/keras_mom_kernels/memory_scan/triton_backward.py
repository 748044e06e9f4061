"""The backward Triton kernel of the memory scan that works chunk by chunk.

`scan_gradients` hands the gradient of the state back from chunk to chunk, and
`row_gradients` then works on all chunks at once. With the names of `triton_forward`,
`N` the gradient of the state behind a chunk, and `X` what the solve hands back:

    dU = P^T dO + (K exp(G_C - G)) N            X = (I + A)^-T dU
    dS = (Q exp(G))^T dO + exp(G_C) N - (K exp(G))^T beta X
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
def scan_gradients(
    reading_query,
    reading_key,
    ending_key,
    ending_rest,
    channels,
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
    LAYOUT: tl.constexpr,
    SEGMENTED: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BETA: tl.constexpr,
    RESETS: tl.constexpr,
    INITIAL: tl.constexpr,
    STATES: tl.constexpr,
    FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Hands the gradient of the state back, from `final_grad` with FINAL, else from 0.

    With STATES it writes N to `state_grads` `[chunks, H, K, V]` and X to
    `write_grads`, with INITIAL the gradient of the initial state. BLOCK_K holds all
    key channels.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    start_v = (tl.program_id(0) % blocks) * BLOCK_V
    head = (tl.program_id(0) // blocks) % heads
    segment = program_segment(blocks * heads, segments, SEGMENTED)
    begin, end = segment_chunks(segment, offsets, segments, chunks, SEGMENTED)
    place, held = state_offsets(
        segment, head, heads, 0, start_v, K, V, BLOCK_K, BLOCK_V
    )
    state_grad = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if FINAL:
        state_grad = tl.load(final_grad + place, mask=held, other=0.0)

    for step in tl.range(0, end - begin, num_stages=STAGES):
        chunk = end - 1 - step
        row, count = chunk_rows(chunk, table, length, chunks, ROWS, LAYOUT)
        keys, inside = tile_offsets(row, count, head, heads, 0, K, BLOCK_K, C)
        values, filled = tile_offsets(row, count, head, heads, start_v, V, BLOCK_V, C)
        out = operand(load_rows(output_grad, values, filled), PRECISION)
        next_grad = operand(state_grad, PRECISION)
        if STATES:
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

        # 2. Gradient of what each row writes, from the outputs and the state.
        square = square_offsets(chunk, head, heads, PARTS, C)
        grad = tl.zeros((C, BLOCK_V), tl.float32)
        grad = dot_square(
            grad,
            attention,
            square,
            out.to(tl.float32),
            True,
            PARTS,
            False,
            PRECISION,
            C,
        )
        grad = grad * scale
        k = operand(load_rows(ending_key, keys, inside), PRECISION)
        grad += dot(k, next_grad, PRECISION) * to_end[:, None]
        if DECAY == "channel" and PARTS == 2:
            k = operand(load_rows(ending_rest, keys, inside), PRECISION)
            grad += dot(k, next_grad, PRECISION) * to_end[:, None]
        if DELTA:
            none = tl.zeros((C, BLOCK_V), tl.float32)
            grad = dot_square(
                none, inverse, square, grad, True, PARTS, False, PRECISION, C
            )
        if STATES:
            store_rows(write_grads, values, filled, grad)

        # 3. Gradient of the state before the chunk.
        q = operand(load_rows(reading_query, keys, inside), PRECISION)
        state_grad *= whole
        if DECAY == "channel":
            column = tl.arange(0, BLOCK_K)
            decay = channels + (chunk.to(tl.int64) * heads + head) * K
            state_grad *= tl.load(decay + column, mask=column < K, other=0.0)[:, None]
            if DELTA:
                k = operand(load_rows(reading_key, keys, inside), PRECISION)
        read = out.to(tl.float32) * (into_query * scale)[:, None]
        state_grad = dot_right(state_grad, tl.trans(q), read, PRECISION, False)
        if DELTA:
            if BETA:
                grad *= load_column(beta, row, count, head, heads, C)[:, None]
            grad *= -into_key[:, None]
            state_grad = dot_right(state_grad, tl.trans(k), grad, PRECISION, PARTS == 2)

    if INITIAL:
        # Not known to be `start_v`: its offsets take no registers during the loop.
        start_v = tl.minimum(start_v, start_v + end - begin)
        place, held = state_offsets(
            segment, head, heads, 0, start_v, K, V, BLOCK_K, BLOCK_V
        )
        tl.store(initial_grad + place, state_grad, mask=held)
