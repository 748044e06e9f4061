"""What the Triton kernels of the memory scan share: chunks, tiles, products.

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

# Where rows lie.


@triton.jit
def wide(size):
    """A size in 64 bits; Triton hands on a 1 as a constant, which no cast takes."""
    return tl.zeros((), tl.int64) + size


@triton.jit
def chunk_rows(chunk, table, length, chunks, ROWS: tl.constexpr, LAYOUT: tl.constexpr):
    """First flat row of a chunk, and how many rows it holds.

    In a `"ragged"` LAYOUT both stand in `table`, int32 `[chunks, 2]`. In others each
    of the batch's rows of `length` has `chunks` chunks of ROWS rows; `"full"` ones
    all hold that many, the last of `"padded"` ones holds what is left.
    """
    if LAYOUT == "ragged":
        row = tl.load(table + 2 * chunk)
        count = tl.load(table + 2 * chunk + 1)
    else:
        place = (chunk % chunks) * ROWS
        row = (chunk // chunks) * length + place
        count = tl.minimum(ROWS, length - place)
        if LAYOUT == "full":
            count = ROWS
    return row.to(tl.int64), count


@triton.jit
def program_segment(programs, segments, SEGMENTED: tl.constexpr):
    """The segment that a program scans, of `programs` each, one a head and V block.

    The last segments of all batch rows come first: a layer's shared memory, which has
    more rows than any other, is the last of its batch row, and would be waited for.
    """
    place = tl.program_id(0) // programs
    if SEGMENTED:
        rows = (tl.num_programs(0) // programs) // segments
        place = (place % rows) * segments + (segments - 1 - place // rows)
    return place


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


@triton.jit
def strong_gradient(gradient, product, strength, block):
    """Gradients `[C]` of the write strengths, or a K block's share in them.

    Where a strength is not 0, `X U / beta` is the same, and keeps more digits when
    keys are correlated: `product` is `X U`, which only the first K block has to add.
    """
    positive = tl.where(strength > 0, strength, -strength) > 1e-20
    exact = product / tl.where(positive, strength, 1.0)
    first = tl.where(block == 0, 1.0, 0.0)
    return tl.where(positive, exact * first, gradient)
