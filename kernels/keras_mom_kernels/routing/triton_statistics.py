"""The Triton kernels of the routing statistics.

A program sums tiles of TOKENS tokens with all M memories. Sums are added in an order
that depends on the shapes alone.
"""

import triton
import triton.language as tl

from keras_mom_kernels.routing.triton_routing import row_places

# Smaller probabilities count as this in the entropy's logarithm.
_LEAST = tl.constexpr(1e-30)


@triton.jit
def store_statistics(
    routed,
    probability,
    entropy,
    count,
    share,
    mean_entropy,
    loss,
    tokens_counted,
    M: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The statistics, from sums over all tokens."""
    column = tl.arange(0, BLOCK_M)
    count = tl.maximum(count, 1.0)
    fraction = tl.div_rn(routed, tl.zeros((BLOCK_M,), tl.float32) + count)
    mean = probability / count
    tl.store(share + column, fraction / TOP_K, mask=column < M)
    tl.store(mean_entropy, entropy / count)
    tl.store(loss, M * tl.sum(fraction * mean, axis=0) / TOP_K)
    tl.store(tokens_counted, count)


@triton.jit
def sum_tokens(
    probabilities,
    indices,
    mask,
    partials,
    share,
    mean_entropy,
    loss,
    tokens_counted,
    tokens,
    steps,
    MASKED: tl.constexpr,
    ALONE: tl.constexpr,
    M: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sums over `steps` tiles: routed tokens and probability of each memory, entropy,
    number of tokens.

    They go to `partials`, float32 `[programs, 2 M + 2]`. A program that is ALONE
    stores the statistics.
    """
    memory = tl.arange(0, BLOCK_M)
    routed = tl.zeros((TOKENS, BLOCK_M), tl.float32)
    probability = tl.zeros((TOKENS, BLOCK_M), tl.float32)
    entropy = tl.zeros((TOKENS, BLOCK_M), tl.float32)
    count = tl.zeros((TOKENS,), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * steps
    for step in range(steps):
        token = (begin + step) * TOKENS + tl.arange(0, TOKENS)
        valid = token < tokens
        if MASKED:
            valid = valid & (tl.load(mask + token, mask=valid, other=0) != 0)
        inside = valid[:, None] & (memory < M)[None, :]
        p = tl.load(
            probabilities + (token * M)[:, None] + memory[None, :],
            mask=inside,
            other=0.0,
        )
        probability += p
        entropy -= p * tl.log(tl.where(p < _LEAST, _LEAST, p))
        count += tl.where(valid, 1.0, 0.0)
        for j in tl.static_range(TOP_K):
            index = tl.load(indices + token * TOP_K + j, mask=valid, other=-1)
            routed += tl.where(index[:, None] == memory[None, :], 1.0, 0.0)
    of_memory = tl.sum(routed, axis=0)
    mean = tl.sum(probability, axis=0)
    total = tl.sum(tl.sum(entropy, axis=1), axis=0)
    number = tl.sum(count, axis=0)
    if ALONE:
        store_statistics(
            of_memory,
            mean,
            total,
            number,
            share,
            mean_entropy,
            loss,
            tokens_counted,
            M,
            TOP_K,
            BLOCK_M,
        )
    else:
        partials += tl.program_id(0) * (2 * M + 2)
        tl.store(partials + memory, of_memory, mask=memory < M)
        tl.store(partials + M + memory, mean, mask=memory < M)
        tl.store(partials + 2 * M, total)
        tl.store(partials + 2 * M + 1, number)


@triton.jit
def add_partials(
    partials,
    share,
    mean_entropy,
    loss,
    tokens_counted,
    programs,
    M: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The statistics from `sum_tokens`' `partials`: one program."""
    memory = tl.arange(0, BLOCK_M)
    routed = tl.zeros((ROWS, BLOCK_M), tl.float32)
    probability = tl.zeros((ROWS, BLOCK_M), tl.float32)
    entropy = tl.zeros((ROWS,), tl.float32)
    count = tl.zeros((ROWS,), tl.float32)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)
        held = row < programs
        mask = held[:, None] & (memory < M)[None, :]
        place = partials + row * (2 * M + 2)
        tile = place[:, None] + memory[None, :]
        routed += tl.load(tile, mask=mask, other=0.0)
        probability += tl.load(tile + M, mask=mask, other=0.0)
        entropy += tl.load(place + 2 * M, mask=held, other=0.0)
        count += tl.load(place + 2 * M + 1, mask=held, other=0.0)
    store_statistics(
        tl.sum(routed, axis=0),
        tl.sum(probability, axis=0),
        tl.sum(entropy, axis=0),
        tl.sum(count, axis=0),
        share,
        mean_entropy,
        loss,
        tokens_counted,
        M,
        TOP_K,
        BLOCK_M,
    )


@triton.jit
def statistics_gradients(
    probabilities,
    entropy_grad,
    loss_grad,
    mask,
    share,
    tokens_counted,
    probabilities_grad,
    tokens,
    MASKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOSS: tl.constexpr,
    M: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Gradient of the probabilities; ENTROPY and LOSS say which gradients came."""
    offsets, inside = row_places(tokens, M, TOKENS, BLOCK_M)
    memory = tl.arange(0, BLOCK_M)
    count = tl.load(tokens_counted)
    grad = tl.zeros((TOKENS, BLOCK_M), tl.float32)
    if LOSS:
        # The share is the fraction over k.
        fraction = tl.load(share + memory, mask=memory < M, other=0.0)
        grad += (tl.load(loss_grad) * M * fraction / count)[None, :]
    if ENTROPY:
        p = tl.load(probabilities + offsets, mask=inside, other=1.0)
        small = p < _LEAST
        slope = tl.log(tl.where(small, _LEAST, p)) + tl.where(small, 0.0, 1.0)
        grad -= slope * (tl.load(entropy_grad) / count)
    if MASKED:
        token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        valid = tl.load(mask + token, mask=token < tokens, other=0) != 0
        grad = tl.where(valid[:, None], grad, 0.0)
    tl.store(probabilities_grad + offsets, grad, mask=inside)
