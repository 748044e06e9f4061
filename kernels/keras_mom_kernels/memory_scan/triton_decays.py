"""Decays of the memory scan's Triton kernels.

A running sum of log decays has a coarse and a fine part, so that differences keep
their digits after many strong decays. Every exponent that is taken is at or below 0.
"""

import triton
import triton.language as tl

# exp(-1000) and everything below it is exactly 0 in float32.
LOWEST_LOG_DECAY = tl.constexpr(-1000.0)
# Sums of a chunk's coarse parts, multiples of 1 / 256, are exact in float32.
QUANTA = tl.constexpr(256.0)


@triton.jit
def head_sums(
    coarse, fine, row, count, head, heads, C: tl.constexpr, SHIFT: tl.constexpr
):
    """Both parts of the sums of a chunk's rows, `[C]`; of the rows before with SHIFT.

    Rows behind the last repeat its sums.
    """
    t = tl.minimum(tl.arange(0, C) - SHIFT, count - 1)
    offsets = row * heads + head + t * heads
    # Without rows all of `t` is negative.
    inside = t >= 0
    return (
        tl.load(coarse + offsets, mask=inside, other=0.0),
        tl.load(fine + offsets, mask=inside, other=0.0),
    )


@triton.jit
def head_decays(
    coarse, fine, row, count, head, heads, C: tl.constexpr, EXCLUSIVE: tl.constexpr
):
    """Decays `[C]` of a state on its way to each row's query, key, and to the end.

    Returns:
        `into_query`, `into_key`, `to_end`, and the scalar decay of the whole chunk.
    """
    c, f = head_sums(coarse, fine, row, count, head, heads, C, 0)
    into_query = tl.exp(c + f)
    into_key = into_query
    if EXCLUSIVE:
        before_c, before_f = head_sums(coarse, fine, row, count, head, heads, C, 1)
        into_key = tl.exp(before_c + before_f)
    last = (row + count - 1) * heads + head
    end_c = tl.load(coarse + last, mask=count > 0, other=0.0)
    end_f = tl.load(fine + last, mask=count > 0, other=0.0)
    return (
        into_query,
        into_key,
        tl.exp((end_c - c) + (end_f - f)),
        tl.exp(end_c + end_f),
    )


@triton.jit
def head_pairs(
    coarse,
    fine,
    row,
    count,
    head,
    heads,
    C: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    STRICT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """`exp(G_t - G_j)` at and below the diagonal (below it with STRICT), else 0.

    EXCLUSIVE takes the sum of the row before for `t`. `[t, j]`, or `[j, t]` with
    TRANSPOSED.
    """
    index = tl.arange(0, C)
    if EXCLUSIVE:
        row_c, row_f = head_sums(coarse, fine, row, count, head, heads, C, 1)
    else:
        row_c, row_f = head_sums(coarse, fine, row, count, head, heads, C, 0)
    column_c, column_f = head_sums(coarse, fine, row, count, head, heads, C, 0)
    if TRANSPOSED:
        difference = (row_c[None, :] - column_c[:, None]) + (
            row_f[None, :] - column_f[:, None]
        )
    else:
        difference = (row_c[:, None] - column_c[None, :]) + (
            row_f[:, None] - column_f[None, :]
        )
    keep = lower(index, STRICT, TRANSPOSED)
    return tl.exp(tl.where(keep, difference, float("-inf")))


@triton.jit
def lower(index, STRICT: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Whether `j <= t` (`j < t` with STRICT): `[t, j]`, or `[j, t]` with TRANSPOSED."""
    if TRANSPOSED:
        t, j = index[None, :], index[:, None]
    else:
        t, j = index[:, None], index[None, :]
    if STRICT:
        keep = t > j
    else:
        keep = t >= j
    return keep


@triton.jit
def channel_sums(
    coarse,
    fine,
    row,
    rows,
    inside,
    head,
    heads,
    start,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Both parts of the sums of the given rows from `row` on, `[_, BLOCK_K]`."""
    k = start + tl.arange(0, BLOCK_K)
    inner = (rows * (heads * K))[:, None] + k[None, :]
    offsets = (row * heads + head) * K + inner
    mask = inside[:, None] & (k < K)[None, :]
    return (
        tl.load(coarse + offsets, mask=mask, other=0.0),
        tl.load(fine + offsets, mask=mask, other=0.0),
    )


@triton.jit
def channel_decays(
    coarse,
    fine,
    row,
    count,
    head,
    heads,
    start,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
):
    """As `head_decays`, `[C, BLOCK_K]` each; that of the whole chunk is `[BLOCK_K]`."""
    last = tl.minimum(tl.arange(0, C), count - 1)
    c, f = channel_sums(
        coarse, fine, row, last, last >= 0, head, heads, start, K, BLOCK_K
    )
    into_query = tl.exp(c + f)
    into_key = into_query
    if EXCLUSIVE:
        last = tl.minimum(tl.arange(0, C) - 1, count - 1)
        before_c, before_f = channel_sums(
            coarse, fine, row, last, last >= 0, head, heads, start, K, BLOCK_K
        )
        into_key = tl.exp(before_c + before_f)
    k = start + tl.arange(0, BLOCK_K)
    end = ((row + count - 1) * heads + head) * K + k
    end_c = tl.load(coarse + end, mask=(k < K) & (k < count * K), other=0.0)
    end_f = tl.load(fine + end, mask=(k < K) & (k < count * K), other=0.0)
    to_end = tl.exp((end_c[None, :] - c) + (end_f[None, :] - f))
    return into_query, into_key, to_end, tl.exp(end_c + end_f)


@triton.jit
def level_decays(
    coarse,
    fine,
    row,
    count,
    head,
    heads,
    start,
    half,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Decays between each row and the border in the middle of its block.

    Blocks have `2 * half` rows, and the border lies behind the first half. Rows of the
    second half meet rows of the first through it: every exponent stays at or below 0.
    With SHIFT a second half's rows take the sums of the rows before. `[C, BLOCK_K]`.
    """
    t = tl.arange(0, C)
    second = (t & half) != 0
    last = t
    border = tl.minimum((t & ~(2 * half - 1)) + half - 1, count - 1)
    if SHIFT:
        last = tl.where(second, t - 1, t)
    last = tl.minimum(last, count - 1)
    inside = last >= 0
    c, f = channel_sums(coarse, fine, row, last, inside, head, heads, start, K, BLOCK_K)
    border_c, border_f = channel_sums(
        coarse, fine, row, border, inside, head, heads, start, K, BLOCK_K
    )
    difference = (c - border_c) + (f - border_f)
    return tl.exp(tl.where(second[:, None], difference, -difference))


@triton.jit
def level_mask(half, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pairs of rows of a block's second half and its first: `[t, j]` or `[j, t]`."""
    index = tl.arange(0, C)
    if TRANSPOSED:
        t, j = index[None, :], index[:, None]
    else:
        t, j = index[:, None], index[None, :]
    together = (t & ~(2 * half - 1)) == (j & ~(2 * half - 1))
    return together & ((t & half) != 0) & ((j & half) == 0)


# Resets: rows between which a reset lies do not see each other.


@triton.jit
def reset_counts(resets, row, count, C: tl.constexpr):
    """Resets in the chunk up to each row, `[C]`, and up to its last row."""
    t = tl.minimum(tl.arange(0, C), count - 1)
    counts = tl.load(resets + row + t, mask=t >= 0, other=0)
    return counts, tl.load(resets + row + count - 1, mask=count > 0, other=0)
