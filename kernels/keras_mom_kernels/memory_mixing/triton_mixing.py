"""The memory mixing's Triton kernels.

A tile is TOKENS tokens by HEADS heads, ROWS of them, by BLOCK_V channels; HEADS is a
power of two, and a program goes through all H heads of its tokens. A row of a tile is
one token's head: what it takes from the packed rows, its normalization and its gate
need no other row. A memory that a token is not in, and a token in no memory, are not
read.
"""

import triton
import triton.language as tl

from keras_mom_kernels.memory_scan.triton_common import load_rows, store_rows


@triton.jit
def tile_places(
    first,
    start,
    tokens,
    H: tl.constexpr,
    V: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Token, head, offsets in `[T, H, V]` and mask of a tile's rows, and channels."""
    row = tl.arange(0, TOKENS * HEADS)
    token = first + row // HEADS
    head = start + row % HEADS
    column = tl.arange(0, BLOCK_V)
    offsets = ((token * H + head) * V)[:, None] + column[None, :]
    return token, head, offsets, (token < tokens) & (head < H), column < V


@triton.jit
def slot_rows(
    weights,
    targets,
    token,
    valid,
    slot,
    WEIGHTED: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Packed row of each row's token in a slot, whether there is one, its weight."""
    target = tl.load(targets + token * SLOTS + slot, mask=valid, other=-1)
    filled = target >= 0
    weight = tl.where(filled, 1.0, 0.0)
    if slot < WEIGHTED:
        weight = tl.load(weights + token * WEIGHTED + slot, mask=filled, other=0.0)
    return target, filled, weight


@triton.jit
def mixed_rows(
    outputs,
    weights,
    targets,
    token,
    head,
    valid,
    inside,
    H: tl.constexpr,
    V: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The weighted sums of a tile, the packed rows in them, and which rows have any."""
    column = tl.arange(0, BLOCK_V)
    mixed = tl.zeros((token.shape[0], BLOCK_V), tl.float32)
    present = token < 0
    taken = ()
    for slot in tl.static_range(SLOTS):
        target, filled, weight = slot_rows(
            weights, targets, token, valid, slot, WEIGHTED, SLOTS
        )
        offsets = ((target * H + head) * V)[:, None] + column[None, :]
        x = load_rows(outputs, offsets, filled[:, None] & inside[None, :])
        mixed += x.to(tl.float32) * weight[:, None]
        present |= filled
        taken = taken + (x,)
    return mixed, taken, present


@triton.jit
def inverse_norms(mixed, epsilon, V: tl.constexpr):
    return tl.rsqrt(tl.sum(mixed * mixed, axis=1) / V + epsilon)


@triton.jit
def row_products(a, b):
    return tl.sum(a * b.to(tl.float32), axis=1)


@triton.jit
def mix(
    outputs,
    weights,
    targets,
    scale,
    gate,
    result,
    tokens,
    rows,
    epsilon,
    H: tl.constexpr,
    V: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SLOTS: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The result `[B, T, H, V]`: a program a tile of tokens."""
    blocks = tl.cdiv(tokens, TOKENS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * TOKENS
    outputs += batch * rows * (H * V)
    weights += batch * tokens * WEIGHTED
    targets += batch * tokens * SLOTS
    base = batch * tokens * (H * V)
    column = tl.arange(0, BLOCK_V)
    factor = tl.load(scale + column, mask=column < V, other=0.0).to(tl.float32)
    for start in range(0, H, HEADS):
        token, head, offsets, valid, inside = tile_places(
            first, start, tokens, H, V, TOKENS, HEADS, BLOCK_V
        )
        mixed, _, present = mixed_rows(
            outputs,
            weights,
            targets,
            token,
            head,
            valid,
            inside,
            H,
            V,
            WEIGHTED,
            SLOTS,
            BLOCK_V,
        )
        y = mixed * inverse_norms(mixed, epsilon, V)[:, None] * factor[None, :]
        if GATED:
            mask = present[:, None] & inside[None, :]
            g = load_rows(gate + base, offsets, mask).to(tl.float32)
            y *= g * tl.sigmoid(g)
        store_rows(result + base, offsets, valid[:, None] & inside[None, :], y)


@triton.jit
def mix_gradients(
    output_grad,
    outputs,
    weights,
    targets,
    scale,
    gate,
    outputs_grad,
    weights_grad,
    gate_grad,
    partials,
    written,
    tokens,
    rows,
    epsilon,
    H: tl.constexpr,
    V: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SLOTS: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Gradients of all inputs: a program takes STEPS tiles of tokens.

    The scale's gradient is left as float32 `partials` `[programs, V]`. Packed rows
    without a token are not written; `written`, uint8 `[B, R]` of zeros, gets ones for
    the others.
    """
    blocks = tl.cdiv(tokens, TOKENS * STEPS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (tl.program_id(0) % blocks) * (TOKENS * STEPS)
    outputs += batch * rows * (H * V)
    outputs_grad += batch * rows * (H * V)
    written += batch * rows
    weights += batch * tokens * WEIGHTED
    weights_grad += batch * tokens * WEIGHTED
    targets += batch * tokens * SLOTS
    base = batch * tokens * (H * V)
    column = tl.arange(0, BLOCK_V)
    slots = tl.arange(0, BLOCK_SLOTS)
    factor = tl.load(scale + column, mask=column < V, other=0.0).to(tl.float32)
    scale_grad = tl.zeros((TOKENS * HEADS, BLOCK_V), tl.float32)
    for step in range(STEPS):
        first = begin + step * TOKENS
        weight_grads = tl.zeros((TOKENS, BLOCK_SLOTS), tl.float32)
        for start in range(0, H, HEADS):
            token, head, offsets, valid, inside = tile_places(
                first, start, tokens, H, V, TOKENS, HEADS, BLOCK_V
            )
            mixed, taken, present = mixed_rows(
                outputs,
                weights,
                targets,
                token,
                head,
                valid,
                inside,
                H,
                V,
                WEIGHTED,
                SLOTS,
                BLOCK_V,
            )
            mask = present[:, None] & inside[None, :]
            grad = load_rows(output_grad + base, offsets, mask).to(tl.float32)

            # 1. Through the gate.
            inverse = inverse_norms(mixed, epsilon, V)[:, None]
            normalized = mixed * inverse
            if GATED:
                g = load_rows(gate + base, offsets, mask).to(tl.float32)
                sigmoid = tl.sigmoid(g)
                slope = sigmoid * (1 + g * (1 - sigmoid))
                gate_tile = grad * normalized * factor[None, :] * slope
                whole = valid[:, None] & inside[None, :]
                store_rows(gate_grad + base, offsets, whole, gate_tile)
                grad *= g * sigmoid

            # 2. Through the normalization.
            scale_grad += grad * normalized
            grad *= factor[None, :]
            along = tl.sum(grad * normalized, axis=1) / V
            grad = inverse * (grad - normalized * along[:, None])

            # 3. Through the sum.
            for slot in tl.static_range(SLOTS):
                target, filled, weight = slot_rows(
                    weights, targets, token, valid, slot, WEIGHTED, SLOTS
                )
                places = ((target * H + head) * V)[:, None] + column[None, :]
                own = filled[:, None] & inside[None, :]
                store_rows(outputs_grad, places, own, grad * weight[:, None])
                one = tl.full((TOKENS * HEADS,), 1, tl.uint8)
                tl.store(written + target, one, mask=filled & (head == 0))
                if slot < WEIGHTED:
                    product = row_products(grad, taken[slot])
                    product = tl.sum(tl.reshape(product, (TOKENS, HEADS)), axis=1)
                    weight_grads += tl.where(
                        (slots == slot)[None, :], product[:, None], 0.0
                    )
        token = first + tl.arange(0, TOKENS)
        places = (token * WEIGHTED)[:, None] + slots[None, :]
        mask = (token < tokens)[:, None] & (slots < WEIGHTED)[None, :]
        tl.store(weights_grad + places, weight_grads, mask=mask)
    place = tl.program_id(0).to(tl.int64) * V
    total = tl.sum(scale_grad, axis=0)
    tl.store(partials + place + column, total, mask=column < V)


@triton.jit
def clear_rows(
    x, written, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Zeros in the rows of `[rows, WIDTH]` that are not `written`: a program ROWS."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    empty = tl.load(written + first + row, mask=first + row < rows, other=1) == 0
    x += first * WIDTH
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        offsets = (row * WIDTH)[:, None] + column[None, :]
        zero = tl.zeros((ROWS, BLOCK), x.dtype.element_ty)
        tl.store(x + offsets, zero, mask=empty[:, None] & (column < WIDTH)[None, :])
