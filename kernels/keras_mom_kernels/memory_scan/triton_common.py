"""What the Triton kernels of the memory scan share: chunks, tiles, products, decays.

A chunk is up to C consecutive rows of one segment. Tensors of rows are read as flat
rows `[B * T, H, width]`. A program works on one head; rows behind a chunk's count are
zeros, whatever lies there in memory.

`PRECISION` names how products are computed: `"bf16"`, or on float32 operands as
`"tf32"`, `"tf32x3"` or `"ieee"`. Sums, decays and states are float32 in all of them.
`SPLIT` computes a bf16 product's float32 operand in two bf16 parts: what correlated
keys write cancels from row to row, and a rounding of each row does not.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# exp(-1000) and everything below it is exactly 0 in float32.
LOWEST_LOG_DECAY = tl.constexpr(-1000.0)
# Sums of a chunk's coarse parts, multiples of 1 / 256, are exact in float32.
QUANTA = tl.constexpr(256.0)


# Where rows lie.


@triton.jit
def chunk_rows(chunk, table, length, chunks, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """First flat row of a chunk, and how many rows it holds.

    With RAGGED both stand in `table`, int32 `[chunks, 2]`. Otherwise each of the
    batch's rows of `length` has `chunks` chunks of ROWS rows.
    """
    if RAGGED:
        row = tl.load(table + 2 * chunk)
        count = tl.load(table + 2 * chunk + 1)
    else:
        place = (chunk % chunks) * ROWS
        row = (chunk // chunks) * length + place
        count = tl.minimum(ROWS, length - place)
    return row.to(tl.int64), count


@triton.jit
def segment_chunks(segment, offsets, segments, chunks, SEGMENTED: tl.constexpr):
    """First chunk of a segment, and the first behind it.

    With SEGMENTED, `offsets` is int32 `[B, segments + 1]`. Otherwise a segment is a
    batch row.
    """
    if SEGMENTED:
        row = segment // segments
        begin = tl.load(offsets + segment + row) + row * chunks
        end = tl.load(offsets + segment + row + 1) + row * chunks
    else:
        begin = segment * chunks
        end = begin + chunks
    return begin, end


@triton.jit
def tile_offsets(
    row, count, head, heads, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr, C
):
    """Offsets and mask of `[C, BLOCK]` of a tensor `[rows, H, WIDTH]`."""
    t = tl.arange(0, C)
    column = start + tl.arange(0, BLOCK)
    # 64-bit arithmetic stays out of the tile.
    inner = (t * (heads * WIDTH))[:, None] + column[None, :]
    offsets = (row * heads + head) * WIDTH + inner
    if WIDTH % BLOCK == 0:
        mask = tl.broadcast_to((t < count)[:, None], (C, BLOCK))
    else:
        mask = (t < count)[:, None] & (column < WIDTH)[None, :]
    return offsets, mask


@triton.jit
def load_rows(x, offsets, mask):
    return tl.load(x + offsets, mask=mask, other=0.0)


@triton.jit
def nearest(x):
    """`x` rounded to bfloat16; the interpreter's own conversion cuts digits off."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def store_rows(x, offsets, mask, tile):
    if INTERPRETED and x.dtype.element_ty == tl.bfloat16:
        tile = nearest(tile.to(tl.float32))
    tl.store(x + offsets, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_column(x, row, count, head, heads, C: tl.constexpr):
    """float32 `[C]` of a tensor `[rows, H]`."""
    t = tl.arange(0, C)
    column = x + row * heads + head
    return tl.load(column + t * heads, mask=t < count, other=0.0).to(tl.float32)


@triton.jit
def state_offsets(
    index,
    head,
    heads,
    start_k,
    start_v,
    K,
    V,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Offsets and mask of `[BLOCK_K, BLOCK_V]` of a tensor `[..., H, K, V]`."""
    k = start_k + tl.arange(0, BLOCK_K)
    v = start_v + tl.arange(0, BLOCK_V)
    base = (index.to(tl.int64) * heads + head) * (K * V)
    offsets = base + (k[:, None] * V + v[None, :])
    return offsets, (k < K)[:, None] & (v < V)[None, :]


@triton.jit
def square_offsets(chunk, head, heads, PARTS: tl.constexpr, C: tl.constexpr):
    """Offsets `[C, C]` of the first part of a tensor `[chunks, H, PARTS, C, C]`."""
    t = tl.arange(0, C)
    base = (chunk.to(tl.int64) * heads + head) * (PARTS * C * C)
    return base + (t[:, None] * C + t[None, :])


# Products.


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """`x` as a product takes it."""
    if PRECISION == "bf16":
        if INTERPRETED:
            # The interpreter cannot compute in bfloat16.
            x = nearest(x.to(tl.float32))
        else:
            x = x.to(tl.bfloat16)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """float32 product of two operands."""
    return dot_onto(tl.zeros((a.shape[0], b.shape[1]), tl.float32), a, b, PRECISION)


@triton.jit
def dot_onto(total, a, b, PRECISION: tl.constexpr):
    """`total` and the product of two operands."""
    if PRECISION != "bf16":
        total = tl.dot(a, b, acc=total, input_precision=PRECISION)
    elif INTERPRETED:
        total = tl.dot(a, b, acc=total, input_precision="ieee")
    else:
        total = tl.dot(a, b, acc=total)
    return total


@triton.jit
def remainder(x, rounded, PRECISION: tl.constexpr):
    """What rounding `x` to an operand left out, as an operand."""
    return operand(x - rounded.to(tl.float32), PRECISION)


@triton.jit
def store_parts(x, offsets, tile, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """Stores a float32 tile in PARTS operands, SIZE elements apart."""
    if PARTS == 2:
        rounded = operand(tile, "bf16")
        tl.store(x + offsets, rounded.to(x.dtype.element_ty))
        rest = remainder(tile, rounded, "bf16")
        tl.store(x + offsets + SIZE, rest.to(x.dtype.element_ty))
    else:
        store_rows(x, offsets, None, tile)


@triton.jit
def dot_right(total, a, x, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """`total` and the product of an operand and a float32 tile."""
    rounded = operand(x, PRECISION)
    total = dot_onto(total, a, rounded, PRECISION)
    if SPLIT:
        total = dot_onto(total, a, remainder(x, rounded, PRECISION), PRECISION)
    return total


@triton.jit
def dot_square(
    total,
    x,
    offsets,
    b,
    TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
):
    """`total` and the product of a square, or of its transpose, and `b`.

    The square is stored in PARTS operands; the float32 tile `b` goes in two parts
    with SPLIT.
    """
    square = operand(tl.load(x + offsets), PRECISION)
    if TRANSPOSED:
        square = tl.trans(square)
    rounded = operand(b, PRECISION)
    total = dot_onto(total, square, rounded, PRECISION)
    if SPLIT:
        total = dot_onto(total, square, remainder(b, rounded, PRECISION), PRECISION)
    if PARTS == 2:
        square = operand(tl.load(x + offsets + C * C), PRECISION)
        if TRANSPOSED:
            square = tl.trans(square)
        total = dot_onto(total, square, rounded, PRECISION)
    return total


# Decays. A running sum of log decays has a coarse and a fine part, so that
# differences keep their digits after many strong decays.


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
