"""The routing's Triton kernels: a program takes TOKENS tokens with all M memories."""

import triton
import triton.language as tl

from keras_mom_kernels.memory_scan.triton_common import store_rows


@triton.jit
def row_places(tokens, M: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offsets and mask of `[TOKENS, BLOCK_M]` of a tensor `[tokens, M]`."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK_M)
    mask = (token < tokens)[:, None] & (column < M)[None, :]
    return (token * M)[:, None] + column[None, :], mask


@triton.jit
def project_tokens(
    x,
    kernel,
    tokens,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """float32 logits `[TOKENS, BLOCK_M]`: `x` `[tokens, WIDTH]` by `[WIDTH, M]`."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, BLOCK_D)
    memory = tl.arange(0, BLOCK_M)[None, :]
    sums = ()
    for _ in tl.static_range(M):
        sums += (tl.zeros((TOKENS, BLOCK_D), tl.float32),)
    for start in range(0, WIDTH, BLOCK_D):
        inside = start + channel < WIDTH
        places = (token * WIDTH)[:, None] + (start + channel)[None, :]
        mask = (token < tokens)[:, None] & inside[None, :]
        tile = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
        added = ()
        for m in tl.static_range(M):
            place = kernel + (start + channel) * M + m
            column = tl.load(place, mask=inside, other=0.0)
            added += (sums[m] + tile * column[None, :],)
        sums = added
    logits = tl.zeros((TOKENS, BLOCK_M), tl.float32)
    for m in tl.static_range(M):
        of_memory = tl.sum(sums[m], axis=1)[:, None]
        logits = tl.where(memory == m, of_memory, logits)
    return tl.where(memory < M, logits, float("-inf"))


@triton.jit
def choose(
    logits,
    mask,
    probabilities,
    weights,
    indices,
    tokens,
    M: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Stores softmax, the TOP_K largest in order, and their shares of their sum."""
    offsets, inside = row_places(tokens, M, TOKENS, BLOCK_M)
    memory = tl.arange(0, BLOCK_M)[None, :]
    # Tokens behind the last one would give infinities' differences.
    x = tl.where(mask | (memory >= M), logits, 0.0)
    exponential = tl.exp(x - tl.max(x, axis=1)[:, None])
    p = tl.div_rn(exponential, tl.sum(exponential, axis=1)[:, None])
    tl.store(probabilities + offsets, p, mask=inside)

    # What is no number comes behind all numbers, what is taken behind that, and
    # columns that are no memory last.
    rest = tl.where(p == p, p, -1.0)
    rest = tl.where(memory < M, rest, -3.0)
    slot = tl.arange(0, BLOCK_K)[None, :]
    picked = tl.zeros((TOKENS, BLOCK_K), tl.float32)
    chosen = tl.zeros((TOKENS, BLOCK_K), tl.int32)
    for j in tl.static_range(TOP_K):
        largest = tl.max(rest, axis=1)
        # Of equal ones the lowest index.
        index = tl.min(tl.where(rest == largest[:, None], memory, BLOCK_M), axis=1)
        here = memory == index[:, None]
        value = tl.sum(tl.where(here, p, 0.0), axis=1)
        rest = tl.where(here, -2.0, rest)
        picked = tl.where(slot == j, value[:, None], picked)
        chosen = tl.where(slot == j, index[:, None], chosen)
    offsets, inside = row_places(tokens, TOP_K, TOKENS, BLOCK_K)
    # Rounded to nearest, so that a single weight is 1.
    share = tl.div_rn(picked, tl.sum(picked, axis=1)[:, None])
    tl.store(weights + offsets, share, mask=inside)
    tl.store(indices + offsets, chosen, mask=inside)


@triton.jit
def route(
    logits,
    probabilities,
    weights,
    indices,
    tokens,
    M: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`choose` for logits `[tokens, M]`."""
    offsets, mask = row_places(tokens, M, TOKENS, BLOCK_M)
    x = tl.load(logits + offsets, mask=mask, other=float("-inf"))
    choose(
        x,
        mask,
        probabilities,
        weights,
        indices,
        tokens,
        M,
        TOP_K,
        TOKENS,
        BLOCK_M,
        BLOCK_K,
    )


@triton.jit(do_not_specialize=["tokens"])
def route_projected(
    x,
    kernel,
    probabilities,
    weights,
    indices,
    tokens,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`choose` for the products of tokens `[tokens, WIDTH]` and a kernel."""
    logits = project_tokens(x, kernel, tokens, WIDTH, M, TOKENS, BLOCK_M, BLOCK_D)
    _, mask = row_places(tokens, M, TOKENS, BLOCK_M)
    choose(
        logits,
        mask,
        probabilities,
        weights,
        indices,
        tokens,
        M,
        TOP_K,
        TOKENS,
        BLOCK_M,
        BLOCK_K,
    )


@triton.jit
def projection_gradients(
    logits_grad,
    x,
    kernel,
    x_grad,
    partials,
    tokens,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the tokens, and shares of the kernel's, `[programs, WIDTH, M]`.

    A program takes STEPS times TOKENS tokens, and BLOCK_D channels.
    """
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < WIDTH
    shares = ()
    for _ in tl.static_range(M):
        shares += (tl.zeros((TOKENS, BLOCK_D), tl.float32),)
    begin = tl.program_id(0).to(tl.int64) * (TOKENS * STEPS)
    for step in range(STEPS):
        token = begin + step * TOKENS + tl.arange(0, TOKENS)
        valid = token < tokens
        places = (token * WIDTH)[:, None] + channel[None, :]
        mask = valid[:, None] & inside[None, :]
        tile = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
        grad = tl.zeros((TOKENS, BLOCK_D), tl.float32)
        added = ()
        for m in tl.static_range(M):
            own = tl.load(logits_grad + token * M + m, mask=valid, other=0.0)
            column = tl.load(kernel + channel * M + m, mask=inside, other=0.0)
            grad += own[:, None] * column[None, :]
            added += (shares[m] + own[:, None] * tile,)
        shares = added
        store_rows(x_grad, places, mask, grad)
    partials += tl.program_id(0).to(tl.int64) * (WIDTH * M)
    for m in tl.static_range(M):
        tl.store(partials + channel * M + m, tl.sum(shares[m], axis=0), mask=inside)


@triton.jit
def route_gradients(
    probabilities_grad,
    weights_grad,
    probabilities,
    indices,
    logits_grad,
    tokens,
    M: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Gradient of the logits, from the probabilities and the choice."""
    offsets, mask = row_places(tokens, M, TOKENS, BLOCK_M)
    memory = tl.arange(0, BLOCK_M)[None, :]
    p = tl.load(probabilities + offsets, mask=mask, other=0.0)
    grad = tl.load(probabilities_grad + offsets, mask=mask, other=0.0)
    # The weight of a single memory is always 1, and has no gradient.
    if TOP_K > 1:
        # Each chosen memory's gradient of its weight, and which ones are chosen.
        token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        inside = token < tokens
        direct = tl.zeros((TOKENS, BLOCK_M), tl.float32)
        chosen = direct > 1.0
        for j in tl.static_range(TOP_K):
            index = tl.load(indices + token * TOP_K + j, mask=inside, other=0)
            own = tl.load(weights_grad + token * TOP_K + j, mask=inside, other=0.0)
            here = memory == index[:, None]
            direct = tl.where(here, own[:, None], direct)
            chosen |= here
        picked = tl.where(chosen, p, 0.0)
        total = tl.where(inside, tl.sum(picked, axis=1), 1.0)[:, None]
        along = tl.sum(direct * picked, axis=1)[:, None] / total
        grad += tl.where(chosen, (direct - along) / total, 0.0)
    grad = p * (grad - tl.sum(p * grad, axis=1)[:, None])
    tl.store(logits_grad + offsets, grad, mask=mask)
