"""The Triton kernels of the gates: tiles of ROWS rows with all H heads."""

import triton
import triton.language as tl

from keras_mom_kernels.memory_scan.triton_common import store_rows


@triton.jit
def tile_places(
    first, rows, H: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Offsets and mask of a tile of a tensor `[rows, H]`."""
    row = first + tl.arange(0, ROWS)
    head = tl.arange(0, BLOCK_H)
    mask = (row < rows)[:, None] & (head < H)[None, :]
    return (row * H)[:, None] + head[None, :], mask


@triton.jit
def softplus(x):
    """`log(1 + exp(x))`, to the last bits also where it is tiny."""
    # log(1 + u) = 2 artanh(u / (2 + u)); u is at most 1. A GPU's logarithm is only
    # good to 1e-7 in all, which is much of a small result.
    u = tl.exp(-tl.abs(x))
    z = u / (2.0 + u)
    square = z * z
    series = 1 / 11 + square * (1 / 13)
    series = 1 / 9 + square * series
    series = 1 / 7 + square * series
    series = 1 / 5 + square * series
    series = 1 / 3 + square * series
    rest = 2.0 * z * (1.0 + square * series)
    return tl.maximum(x, 0.0) + rest


@triton.jit
def gates(
    decay,
    write_strength,
    dt_bias,
    a_log,
    log_decay,
    beta,
    rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Log decay and beta, float32 `[rows, H]`: a program a tile."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    offsets, mask = tile_places(first, rows, H, ROWS, BLOCK_H)
    head = tl.arange(0, BLOCK_H)
    bias = tl.load(dt_bias + head, mask=head < H, other=0.0)[None, :]
    rate = tl.exp(tl.load(a_log + head, mask=head < H, other=0.0))[None, :]
    x = tl.load(decay + offsets, mask=mask, other=0.0).to(tl.float32) + bias
    tl.store(log_decay + offsets, -rate * softplus(x), mask=mask)
    w = tl.load(write_strength + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(beta + offsets, tl.sigmoid(w), mask=mask)


@triton.jit
def gate_gradients(
    log_decay_grad,
    beta_grad,
    decay,
    write_strength,
    dt_bias,
    a_log,
    decay_grad,
    write_strength_grad,
    partials,
    rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Gradients of all inputs: a program takes STEPS tiles.

    Those of `dt_bias` and `a_log` are left as float32 `partials` `[programs, 2, H]`.
    A gradient of 0 has none behind it, whatever its row holds.
    """
    head = tl.arange(0, BLOCK_H)
    bias = tl.load(dt_bias + head, mask=head < H, other=0.0)[None, :]
    rate = tl.exp(tl.load(a_log + head, mask=head < H, other=0.0))[None, :]
    bias_grad = tl.zeros((ROWS, BLOCK_H), tl.float32)
    rate_grad = tl.zeros((ROWS, BLOCK_H), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * (ROWS * STEPS)
    for step in range(STEPS):
        offsets, mask = tile_places(begin + step * ROWS, rows, H, ROWS, BLOCK_H)
        x = tl.load(decay + offsets, mask=mask, other=0.0).to(tl.float32) + bias
        grad = tl.load(log_decay_grad + offsets, mask=mask, other=0.0)
        along = tl.where(grad == 0.0, 0.0, -rate * tl.sigmoid(x) * grad)
        bias_grad += along
        rate_grad += tl.where(grad == 0.0, 0.0, -rate * softplus(x) * grad)
        store_rows(decay_grad, offsets, mask, along)
        w = tl.load(write_strength + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(beta_grad + offsets, mask=mask, other=0.0)
        slope = tl.sigmoid(w)
        slope = slope * (1.0 - slope)
        along = tl.where(grad == 0.0, 0.0, slope * grad)
        store_rows(write_strength_grad, offsets, mask, along)
    place = partials + tl.program_id(0).to(tl.int64) * (2 * H) + head
    tl.store(place, tl.sum(bias_grad, axis=0), mask=head < H)
    tl.store(place + H, tl.sum(rate_grad, axis=0), mask=head < H)
