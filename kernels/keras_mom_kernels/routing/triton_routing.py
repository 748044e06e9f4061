"""The routing's Triton kernels: a program takes TOKENS tokens with all M memories."""

import triton
import triton.language as tl


@triton.jit
def row_places(tokens, M: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offsets and mask of `[TOKENS, BLOCK_M]` of a tensor `[tokens, M]`."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK_M)
    mask = (token < tokens)[:, None] & (column < M)[None, :]
    return (token * M)[:, None] + column[None, :], mask


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
    """Softmax, the TOP_K largest in order, and their shares of their sum."""
    offsets, mask = row_places(tokens, M, TOKENS, BLOCK_M)
    memory = tl.arange(0, BLOCK_M)[None, :]
    x = tl.load(logits + offsets, mask=mask, other=float("-inf"))
    # Tokens behind the last one would give infinities' differences.
    x = tl.where(mask | (memory >= M), x, 0.0)
    exponential = tl.exp(x - tl.max(x, axis=1)[:, None])
    p = tl.div_rn(exponential, tl.sum(exponential, axis=1)[:, None])
    tl.store(probabilities + offsets, p, mask=mask)

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
    offsets, mask = row_places(tokens, TOP_K, TOKENS, BLOCK_K)
    # Rounded to nearest, so that a single weight is 1.
    share = tl.div_rn(picked, tl.sum(picked, axis=1)[:, None])
    tl.store(weights + offsets, share, mask=mask)
    tl.store(indices + offsets, chosen, mask=mask)


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
