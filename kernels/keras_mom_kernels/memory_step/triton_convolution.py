"""The short convolution of one token, in every memory, as a Triton kernel."""

import triton
import triton.language as tl

from keras_mom_kernels.memory_scan.triton_common import store_rows


@triton.jit
def convolve_token(
    query,
    key,
    value,
    query_kernel,
    key_kernel,
    value_kernel,
    window,
    active,
    new_query,
    new_key,
    new_value,
    new_window,
    heads,
    epsilon,
    SETS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HISTORY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CONVOLVED: tl.constexpr,
    QUERY_SILU: tl.constexpr,
    KEY_SILU: tl.constexpr,
    VALUE_SILU: tl.constexpr,
    NORMALIZED_QUERY: tl.constexpr,
    NORMALIZED_KEY: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """A program takes a head of the query, the key or the value of one memory.

    Grid: B * M * 3 * H. `SETS` is the projection set of each memory, and their number
    last. With IN_PLACE `new_window` is `window`.
    """
    program = tl.program_id(0)
    head = program % (3 * heads)
    index = (program // (3 * heads)).to(tl.int64)
    memories: tl.constexpr = len(SETS) - 1
    row = index // memories
    memory = (index % memories).to(tl.int32)
    of_sets = memory * 0
    for i in tl.static_range(memories):
        of_sets = tl.where(memory == i, SETS[i], of_sets)
    projected = row * SETS[memories] + of_sets
    taken = tl.load(active + index) != 0

    stride = heads * (2 * K + V)
    start = index * HISTORY * stride
    if head < heads:
        step_head(
            query + (row * heads + head) * K,
            query_kernel,
            window,
            new_query + (index * heads + head) * K,
            new_window,
            taken,
            start + head * K,
            head * K,
            stride,
            heads,
            epsilon,
            K,
            BLOCK_K,
            HISTORY,
            BLOCK_T,
            CONVOLVED,
            QUERY_SILU,
            NORMALIZED_QUERY,
            IN_PLACE,
        )
    elif head < 2 * heads:
        own = head - heads
        step_head(
            key + (projected * heads + own) * K,
            key_kernel,
            window,
            new_key + (index * heads + own) * K,
            new_window,
            taken,
            start + head * K,
            own * K,
            stride,
            heads,
            epsilon,
            K,
            BLOCK_K,
            HISTORY,
            BLOCK_T,
            CONVOLVED,
            KEY_SILU,
            NORMALIZED_KEY,
            IN_PLACE,
        )
    else:
        own = head - 2 * heads
        column = 2 * heads * K + own * V
        step_head(
            value + (projected * heads + own) * V,
            value_kernel,
            window,
            new_value + (index * heads + own) * V,
            new_window,
            taken,
            start + column,
            own * V,
            stride,
            heads,
            epsilon,
            V,
            BLOCK_V,
            HISTORY,
            BLOCK_T,
            CONVOLVED,
            VALUE_SILU,
            False,
            IN_PLACE,
        )


@triton.jit
def step_head(
    x,
    kernel,
    window,
    output,
    new_window,
    taken,
    start,
    column,
    stride,
    heads,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HISTORY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CONVOLVED: tl.constexpr,
    SILU: tl.constexpr,
    NORMALIZED: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """A head's row and its columns of the window, from WIDTH columns of `x`.

    They begin at `column` of the kernel, and at `start` of the window, whose rows are
    `stride` apart. A memory that does not take the token gets zeros and keeps its
    window, whatever lies there.
    """
    lane = tl.arange(0, BLOCK)
    inside = lane < WIDTH
    # A memory that does not take the token has no channels.
    used = lane < tl.where(taken, WIDTH, 0)
    if CONVOLVED:
        # Rows 0 to HISTORY - 1 are the window's, row HISTORY is the token's.
        t = tl.arange(0, BLOCK_T)
        t_column = t[:, None]
        lanes = tl.broadcast_to(lane[None, :], (BLOCK_T, BLOCK))
        held = inside[None, :] & (t_column < HISTORY)
        last = used[None, :] & (t_column == HISTORY)
        met = used[None, :] & (t_column <= HISTORY)
        places = t_column * stride + lanes
        tile = tl.load(window + start + places, mask=held, other=0.0)
        own = tl.load(x + lanes, mask=last, other=0.0).to(tl.float32)
        taps = kernel + column + t_column * (heads * WIDTH) + lanes
        taps = tl.load(taps, mask=met, other=0.0).to(tl.float32)
        tile = tl.where(t_column == HISTORY, own, tile)
        total = tl.sum(tl.where(met, tile * taps, 0.0), axis=0)
        # A memory that takes the token moves its rows one up.
        moved = t_column - taken.to(tl.int32)
        kept = inside[None, :] & (moved >= 0) & (moved < HISTORY)
        if IN_PLACE:
            # No other program has these columns; all rows are read before one is
            # written.
            tl.debug_barrier()
            kept = kept & (moved < tl.where(taken, HISTORY, 0))
        tl.store(new_window + start + moved * stride + lanes, tile, mask=kept)
    else:
        total = tl.load(x + lane, mask=used, other=0.0).to(tl.float32)
    if SILU:
        total = total / (1 + tl.exp(-total))
    if NORMALIZED:
        total = total * tl.rsqrt(tl.sum(total * total, axis=0) + epsilon)
    store_rows(output, lane, inside, total)
