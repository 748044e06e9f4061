"""Array algebra inside one chunk: decays, decayed products, the triangular inverse.

Shapes: any leading axes `...`, C rows a chunk (a power of two), K key channels.
All arithmetic is float32, and every exponent that is taken is at or below zero, so
nothing here overflows, at decays of exp(-20) a step as at decays of 1.
"""

import numpy as np
from keras import ops

from keras_mom import backend
from keras_mom.ops.padding import pad

# exp(-1000) and everything below it is exactly 0 in float32.
LOWEST_LOG_DECAY = -1000.0
# Sums of a chunk's coarse parts, multiples of this quantum, are exact in float32.
_QUANTUM = 2.0**-8


def transposed(x):
    """Swaps the last two axes."""
    return ops.swapaxes(x, -1, -2)


def optional_product(x, factor):
    """`x * factor`, or `x` where the factor is None."""
    return x if factor is None else x * factor


def split_chunks(x, size):
    """`[B, T, H, ...]` to `[B, T / C, H, C, ...]`."""
    batch, length, heads, *rest = ops.shape(x)
    chunks = length // size
    x = ops.swapaxes(ops.reshape(x, (batch, chunks, size, heads, *rest)), 2, 3)
    # Torch copies here, once, and not at every product that follows.
    x = ops.reshape(x, (batch * chunks * heads, size, *rest))
    return ops.reshape(x, (batch, chunks, heads, size, *rest))


def merge_chunks(x):
    """`[B, T / C, H, C, ...]` to `[B, T, H, ...]`."""
    x = ops.swapaxes(x, 2, 3)
    shape = ops.shape(x)
    return ops.reshape(x, (shape[0], shape[1] * shape[2], *shape[3:]))


def lower_mask(size, diagonal=0):
    """float32 `[size, size]`: 1 at and below `diagonal`, 0 above it."""
    return ops.convert_to_tensor(np.tril(np.ones((size, size), "float32"), diagonal))


class CumulativeDecay:
    """Running sum of log decays, kept in two parts so that differences are exact.

    After a few hundred steps of -20, a running float32 sum no longer resolves a
    later step of -0.001. The coarse part is a multiple of 1/256 and sums without
    rounding; the fine part stays below 1/8.
    """

    def __init__(self, coarse, fine):
        self.coarse = coarse
        self.fine = fine

    @classmethod
    def of(cls, log_decay, axis):
        log_decay = ops.maximum(log_decay, LOWEST_LOG_DECAY)
        coarse = ops.floor(log_decay / _QUANTUM) * _QUANTUM
        return cls(
            ops.cumsum(coarse, axis=axis),
            ops.cumsum(log_decay - coarse, axis=axis),
        )

    def map(self, function):
        """Applies `function`, which only moves elements, to both parts."""
        return CumulativeDecay(function(self.coarse), function(self.fine))

    def minus(self, other):
        """Difference of the two sums, as one tensor."""
        return (self.coarse - other.coarse) + (self.fine - other.fine)

    def exp(self):
        return ops.exp(self.coarse + self.fine)


def shift_down(x, axis):
    """Moves rows one place down along `axis`; zeros enter at the top."""
    axis = axis % len(x.shape)
    head = [slice(None)] * len(x.shape)
    head[axis] = slice(0, -1)
    return pad(x[tuple(head)], axis, before=1)


# Products with one decay a head: `left_t . right_j * decay_tj`.


def head_decay_matrix(cumulative):
    """`exp(G_t - G_j)` for `j <= t`, else 0: `[..., C]` to `[..., C, C]`."""
    size = cumulative.coarse.shape[-1]
    rows = cumulative.map(lambda x: x[..., :, None])
    columns = cumulative.map(lambda x: x[..., None, :])
    keep = lower_mask(size) > 0
    return ops.exp(ops.where(keep, rows.minus(columns), -np.inf))


def head_pair_log_decay_gradient(products, exclusive_rows):
    """Gradient of each log decay from a chunk's pairs, `[..., C, C]` to `[..., C]`.

    `products` holds, for each pair, its value times its gradient. The pair (t, j)
    holds the decays of j + 1 to t (to t - 1 for `exclusive_rows`). Only these are
    summed: nothing cancels, so that gradients of strong decays keep their digits.
    """
    size = products.shape[-1]
    earlier = ops.matmul(products, transposed(lower_mask(size, -1)))
    return ops.sum(
        earlier * lower_mask(size, -1 if exclusive_rows else 0),
        axis=-2,
    )


# Products with one decay a key channel: sum_c left_tc right_jc exp(Gl_tc - Gr_jc).
#
# A chunk is halved again and again. Rows of a second half meet rows of the first
# half through the decay at the border between them, so that both factors stay at
# or below one, and each level is a plain batched product.


def _halves(x, size):
    """`[..., C, K]` to first and second halves of blocks: 2 x `[..., n, size, K]`."""
    shape = ops.shape(x)
    blocks = ops.reshape(x, (*shape[:-2], shape[-2] // (2 * size), 2, size, shape[-1]))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _join_halves(first, second):
    """Inverse of `_halves`."""
    joined = ops.stack([first, second], axis=-3)
    shape = ops.shape(joined)
    rows = shape[-4] * 2 * shape[-2]
    return ops.reshape(joined, (*shape[:-4], rows, shape[-1]))


def _level_factors(left_decay, right_decay, size):
    """Decay from the border to each second-half row, and from first-half rows to it."""
    border = right_decay.map(lambda x: _halves(x, size)[0][..., -1:, :])
    rows = left_decay.map(lambda x: _halves(x, size)[1])
    columns = right_decay.map(lambda x: _halves(x, size)[0])
    return ops.exp(rows.minus(border)), ops.exp(border.minus(columns))


def _levels(size):
    return [2**level for level in range(size.bit_length() - 1)]


def channel_pairs(left, right, left_decay, right_decay, inclusive):
    """Decayed products of all row pairs, `[..., C, K]` twice to `[..., C, C]`.

    Args:
        left, right: `[..., C, K]`.
        left_decay, right_decay: `CumulativeDecay` of `[..., C, K]`.
        inclusive: whether the diagonal, which never decays, counts.
    """
    blocks = ops.sum(left * right, axis=-1)[..., None, None]
    if not inclusive:
        blocks = ops.zeros_like(blocks)
    for size in _levels(left.shape[-2]):
        row_factor, column_factor = _level_factors(left_decay, right_decay, size)
        corner = ops.matmul(
            _halves(left, size)[1] * row_factor,
            transposed(_halves(right, size)[0] * column_factor),
        )
        blocks = _join_blocks(blocks, corner)
    return blocks[..., 0, :, :]


def _join_blocks(diagonal, corner):
    """Pairs of diagonal blocks and the blocks below them: blocks of twice the size."""
    top, bottom = diagonal[..., 0::2, :, :], diagonal[..., 1::2, :, :]
    return ops.concatenate(
        [
            ops.concatenate([top, ops.zeros_like(top)], axis=-1),
            ops.concatenate([corner, bottom], axis=-1),
        ],
        axis=-2,
    )


def channel_sums(weights, rows, decay):
    """Weighted sums of decayed rows: `sum_j weights_tj rows_jc exp(G_tc - G_jc)`.

    Args:
        weights: `[..., C, C]`; only what is at and below the diagonal counts.
        rows: `[..., C, K]`.
        decay: `CumulativeDecay` of `[..., C, K]`.
    """
    sums = ops.diagonal(weights, axis1=-2, axis2=-1)[..., None] * rows
    for size in _levels(rows.shape[-2]):
        row_factor, column_factor = _level_factors(decay, decay, size)
        columns = _halves(rows, size)[0] * column_factor
        later = ops.matmul(corner_blocks(weights, size), columns) * row_factor
        sums += _join_halves(ops.zeros_like(later), later)
    return sums


def channel_sums_gradient(weights, gradient, decay):
    """Gradient of the rows of `channel_sums` from that of the sums."""
    rows_gradient = ops.diagonal(weights, axis1=-2, axis2=-1)[..., None] * gradient
    for size in _levels(gradient.shape[-2]):
        row_factor, column_factor = _level_factors(decay, decay, size)
        later = _halves(gradient, size)[1] * row_factor
        corner = transposed(corner_blocks(weights, size))
        earlier = ops.matmul(corner, later) * column_factor
        rows_gradient += _join_halves(earlier, ops.zeros_like(earlier))
    return rows_gradient


def channel_pairs_gradient(
    gradient, left, right, left_decay, right_decay, inclusive, exclusive_rows
):
    """Gradients of `channel_pairs`.

    Returns:
        Gradients of left, right, and of the log decays of each row, `[..., C, K]`.
        With `exclusive_rows` the left decay excludes the row's own log decay.
    """
    if inclusive:
        diagonal = ops.diagonal(gradient, axis1=-2, axis2=-1)[..., None]
        left_gradient, right_gradient = diagonal * right, diagonal * left
    else:
        left_gradient, right_gradient = ops.zeros_like(left), ops.zeros_like(right)
    log_decay_gradient = ops.zeros_like(left)
    for size in _levels(left.shape[-2]):
        row_factor, column_factor = _level_factors(left_decay, right_decay, size)
        rows = _halves(left, size)[1] * row_factor
        columns = _halves(right, size)[0] * column_factor
        corner = corner_blocks(gradient, size)
        rows_gradient = ops.matmul(corner, columns)
        columns_gradient = ops.matmul(transposed(corner), rows)
        zeros = ops.zeros_like(rows)
        left_gradient += _join_halves(zeros, rows_gradient * row_factor)
        right_gradient += _join_halves(columns_gradient * column_factor, zeros)
        later = transposed(lower_mask(size, -1 if exclusive_rows else 0))
        log_decay_gradient += _join_halves(
            ops.matmul(lower_mask(size, -1), columns * columns_gradient),
            ops.matmul(later, rows * rows_gradient),
        )
    return left_gradient, right_gradient, log_decay_gradient


def corner_blocks(matrix, size):
    """`[..., C, C]` to the lower left blocks of its diagonal blocks of `2 * size`."""
    shape = ops.shape(matrix)
    count = shape[-1] // (2 * size)
    if count == 1:
        return matrix[..., None, size:, :size]
    # TensorFlow slices no more than 8 axes.
    blocks = ops.reshape(matrix, (-1, count, 2, size, count, 2, size))
    blocks = blocks[:, :, 1, :, :, 0]
    own = np.eye(count, dtype="float32")[:, None, :, None]
    blocks = ops.sum(blocks * ops.convert_to_tensor(own), axis=-2)
    return ops.reshape(blocks, (*shape[:-2], count, size, size))


def unit_lower_inverse(strict):
    """`(I + A)^-1` of a strictly lower triangular `A`, `[..., C, C]`, C a power of 2.

    The inverses of two neighbouring diagonal blocks give that of their union, from
    single entries up. This keeps float32 accuracy when keys are correlated; a Neumann
    series over the whole chunk does not.
    """
    if backend.unit_lower_inverse is not None:
        return backend.unit_lower_inverse(strict)
    size = strict.shape[-1]
    if size == 1:
        return ops.ones_like(strict)
    identity = ops.convert_to_tensor(np.eye(size, dtype="float32"))
    inverse = identity - strict * _corner_mask(size, 1)
    for half in _levels(size)[1:]:
        corner = ops.matmul(strict * _corner_mask(size, half), inverse)
        inverse = inverse - ops.matmul(inverse, corner)
    return inverse


def _corner_mask(size, half):
    """float32 `[size, size]`: 1 in the lower left quarters of blocks of `2 * half`."""
    block = np.zeros((2 * half, 2 * half), "float32")
    block[half:, :half] = 1
    return ops.convert_to_tensor(np.kron(np.eye(size // (2 * half)), block), "float32")
