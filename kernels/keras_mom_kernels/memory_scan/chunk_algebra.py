"""Array algebra inside one chunk: decays, decayed products, the triangular inverse.

Shapes: any leading axes `...`, C rows a chunk (a power of two), K key channels.
All arithmetic is float32, and every exponent that is taken is at or below zero, so
nothing here overflows, at decays of exp(-20) a step as at decays of 1.

A framework is reached through `arrays` alone, a namespace of array functions with the
names and the meaning of `keras.ops`; and beside those

- `scan(step, carry, length, shapes, reverse=False)`: a loop, whose `step` takes a
  carry and an index and returns a carry and a tuple of tensors of its dtype and of
  these shapes, which are joined along their second axis, in index order;
- `full_precision()`: a context in which float32 products are float32 products;
- `unit_lower_inverse(strict)`: `(I + A)^-1` of strictly lower triangular matrices
  `[..., C, C]`, by substitution; None where the framework's own is slow. It may
  return None where a call cannot have it.
"""

import numpy as np

# exp(-1000) and everything below it is exactly 0 in float32.
LOWEST_LOG_DECAY = -1000.0
# Sums of a chunk's coarse parts, multiples of this quantum, are exact in float32.
_QUANTUM = 2.0**-8


class CumulativeDecay:
    """Running sum of log decays, kept in two parts so that differences are exact.

    After a few hundred steps of -20, a running float32 sum no longer resolves a
    later step of -0.001. The coarse part is a multiple of 1/256 and sums without
    rounding; the fine part stays below 1/8.
    """

    def __init__(self, arrays, coarse, fine):
        self.arrays = arrays
        self.coarse = coarse
        self.fine = fine

    @classmethod
    def of(cls, arrays, log_decay, axis):
        log_decay = arrays.maximum(log_decay, LOWEST_LOG_DECAY)
        coarse = arrays.floor(log_decay / _QUANTUM) * _QUANTUM
        return cls(
            arrays,
            arrays.cumsum(coarse, axis=axis),
            arrays.cumsum(log_decay - coarse, axis=axis),
        )

    def map(self, function):
        """Applies `function`, which only moves elements, to both parts."""
        return CumulativeDecay(self.arrays, function(self.coarse), function(self.fine))

    def minus(self, other):
        """Difference of the two sums, as one tensor."""
        return (self.coarse - other.coarse) + (self.fine - other.fine)

    def exp(self):
        return self.arrays.exp(self.coarse + self.fine)


class ChunkAlgebra:
    """The algebra on the arrays of one framework.

    Args:
        arrays: namespace of array functions.
    """

    def __init__(self, arrays):
        self.arrays = arrays

    def transposed(self, x):
        """Swaps the last two axes."""
        return self.arrays.swapaxes(x, -1, -2)

    @staticmethod
    def optional_product(x, factor):
        """`x * factor`, or `x` where the factor is None."""
        return x if factor is None else x * factor

    def split_chunks(self, x, size):
        """`[B, T, H, ...]` to `[B, T / C, H, C, ...]`."""
        batch, length, heads, *rest = self.arrays.shape(x)
        chunks = length // size
        x = self.arrays.swapaxes(
            self.arrays.reshape(x, (batch, chunks, size, heads, *rest)), 2, 3
        )
        # Torch copies here, once, and not at every product that follows.
        x = self.arrays.reshape(x, (batch * chunks * heads, size, *rest))
        return self.arrays.reshape(x, (batch, chunks, heads, size, *rest))

    def merge_chunks(self, x):
        """`[B, T / C, H, C, ...]` to `[B, T, H, ...]`."""
        x = self.arrays.swapaxes(x, 2, 3)
        shape = self.arrays.shape(x)
        return self.arrays.reshape(x, (shape[0], shape[1] * shape[2], *shape[3:]))

    def lower_mask(self, size, diagonal=0):
        """float32 `[size, size]`: 1 at and below `diagonal`, 0 above it."""
        return self.arrays.convert_to_tensor(
            np.tril(np.ones((size, size), "float32"), diagonal)
        )

    def shift_down(self, x, axis):
        """Moves rows one place down along `axis`; zeros enter at the top."""
        axis = axis % len(x.shape)
        index = [slice(None)] * len(x.shape)
        index[axis] = slice(0, -1)
        kept = x[tuple(index)]
        index[axis] = slice(0, 1)
        return self.arrays.concatenate(
            [self.arrays.zeros_like(x[tuple(index)]), kept], axis=axis
        )

    # Products with one decay a head: `left_t . right_j * decay_tj`.

    def head_decay_matrix(self, cumulative):
        """`exp(G_t - G_j)` for `j <= t`, else 0: `[..., C]` to `[..., C, C]`."""
        size = cumulative.coarse.shape[-1]
        rows = cumulative.map(lambda x: x[..., :, None])
        columns = cumulative.map(lambda x: x[..., None, :])
        keep = self.lower_mask(size) > 0
        return self.arrays.exp(self.arrays.where(keep, rows.minus(columns), -np.inf))

    def head_pair_log_decay_gradient(self, products, exclusive_rows):
        """Gradient of each log decay from a chunk's pairs, `[..., C, C]` to `[..., C]`.

        `products` holds, for each pair, its value times its gradient. The pair (t, j)
        holds the decays of j + 1 to t (to t - 1 for `exclusive_rows`). Only these are
        summed: nothing cancels, so that gradients of strong decays keep their digits.
        """
        size = products.shape[-1]
        earlier = self.arrays.matmul(
            products, self.transposed(self.lower_mask(size, -1))
        )
        return self.arrays.sum(
            earlier * self.lower_mask(size, -1 if exclusive_rows else 0),
            axis=-2,
        )

    # Products with one decay a key channel: sum_c left_tc right_jc exp(Gl_tc - Gr_jc).
    #
    # A chunk is halved again and again. Rows of a second half meet rows of the first
    # half through the decay at the border between them, so that both factors stay at
    # or below one, and each level is a plain batched product. Leading axes are made
    # one on the way in, N: some compilers slice few axes only.

    def _flat(self, x):
        """`[..., C, K]` to `[N, C, K]`."""
        return self.arrays.reshape(x, (-1, *x.shape[-2:]))

    def _restored(self, x, like):
        """`[N, ...]` with the leading axes of `like`, `[..., C, K]`."""
        return self.arrays.reshape(x, (*self.arrays.shape(like)[:-2], *x.shape[1:]))

    def _half(self, x, size, which):
        """First or second (0, 1) halves of blocks: `[N, n, size, K]` of `[N, C, K]`."""
        rows, width = x.shape[-2:]
        blocks = self.arrays.reshape(x, (-1, rows // (2 * size), 2, size, width))
        return blocks[:, :, which]

    def _join_halves(self, first, second):
        """Inverse of `_half` of both."""
        joined = self.arrays.stack([first, second], axis=2)
        _, count, _, size, width = joined.shape
        return self.arrays.reshape(joined, (-1, count * 2 * size, width))

    def _level_factors(self, left_decay, right_decay, size):
        """Decay from the border to second-half rows, and from first-half rows to it."""
        rows = left_decay.map(lambda x: self._half(x, size, 1))
        columns = right_decay.map(lambda x: self._half(x, size, 0))
        border = columns.map(lambda x: x[..., -1:, :])
        return self.arrays.exp(rows.minus(border)), self.arrays.exp(
            border.minus(columns)
        )

    @staticmethod
    def _levels(size):
        return [2**level for level in range(size.bit_length() - 1)]

    def channel_pairs(self, left, right, left_decay, right_decay, inclusive):
        """Decayed products of all row pairs, `[..., C, K]` twice to `[..., C, C]`.

        Args:
            left, right: `[..., C, K]`.
            left_decay, right_decay: `CumulativeDecay` of `[..., C, K]`.
            inclusive: whether the diagonal, which never decays, counts.
        """
        lead = left
        left, right = self._flat(left), self._flat(right)
        left_decay = left_decay.map(self._flat)
        right_decay = right_decay.map(self._flat)
        blocks = self.arrays.sum(left * right, axis=-1)[..., None, None]
        if not inclusive:
            blocks = self.arrays.zeros_like(blocks)
        for size in self._levels(left.shape[-2]):
            row_factor, column_factor = self._level_factors(
                left_decay, right_decay, size
            )
            corner = self.arrays.matmul(
                self._half(left, size, 1) * row_factor,
                self.transposed(self._half(right, size, 0) * column_factor),
            )
            blocks = self._join_blocks(blocks, corner)
        return self._restored(blocks[:, 0], lead)

    def _join_blocks(self, diagonal, corner):
        """Diagonal blocks and the blocks below them, as blocks of twice the size."""
        top, bottom = diagonal[:, 0::2], diagonal[:, 1::2]
        return self.arrays.concatenate(
            [
                self.arrays.concatenate([top, self.arrays.zeros_like(top)], axis=-1),
                self.arrays.concatenate([corner, bottom], axis=-1),
            ],
            axis=-2,
        )

    def channel_sums(self, weights, rows, decay):
        """Weighted sums of decayed rows: `sum_j weights_tj rows_jc exp(G_tc - G_jc)`.

        Args:
            weights: `[..., C, C]`; only what is at and below the diagonal counts.
            rows: `[..., C, K]`.
            decay: `CumulativeDecay` of `[..., C, K]`.
        """
        lead = rows
        weights, rows = self._flat(weights), self._flat(rows)
        decay = decay.map(self._flat)
        sums = self.arrays.diagonal(weights, axis1=-2, axis2=-1)[..., None] * rows
        for size in self._levels(rows.shape[-2]):
            row_factor, column_factor = self._level_factors(decay, decay, size)
            columns = self._half(rows, size, 0) * column_factor
            later = (
                self.arrays.matmul(self.corner_blocks(weights, size), columns)
                * row_factor
            )
            sums += self._join_halves(self.arrays.zeros_like(later), later)
        return self._restored(sums, lead)

    def channel_sums_gradient(self, weights, gradient, decay):
        """Gradient of the rows of `channel_sums` from that of the sums."""
        lead = gradient
        weights, gradient = self._flat(weights), self._flat(gradient)
        decay = decay.map(self._flat)
        rows_gradient = (
            self.arrays.diagonal(weights, axis1=-2, axis2=-1)[..., None] * gradient
        )
        for size in self._levels(gradient.shape[-2]):
            row_factor, column_factor = self._level_factors(decay, decay, size)
            later = self._half(gradient, size, 1) * row_factor
            corner = self.transposed(self.corner_blocks(weights, size))
            earlier = self.arrays.matmul(corner, later) * column_factor
            rows_gradient += self._join_halves(earlier, self.arrays.zeros_like(earlier))
        return self._restored(rows_gradient, lead)

    def channel_pairs_gradient(
        self, gradient, left, right, left_decay, right_decay, inclusive, exclusive_rows
    ):
        """Gradients of `channel_pairs`.

        Returns:
            Gradients of left, right, and of the log decays of each row, `[..., C, K]`.
            With `exclusive_rows` the left decay excludes the row's own log decay.
        """
        lead = left
        gradient, left, right = map(self._flat, (gradient, left, right))
        left_decay = left_decay.map(self._flat)
        right_decay = right_decay.map(self._flat)
        if inclusive:
            diagonal = self.arrays.diagonal(gradient, axis1=-2, axis2=-1)[..., None]
            left_gradient, right_gradient = diagonal * right, diagonal * left
        else:
            left_gradient, right_gradient = (
                self.arrays.zeros_like(left),
                self.arrays.zeros_like(right),
            )
        log_decay_gradient = self.arrays.zeros_like(left)
        for size in self._levels(left.shape[-2]):
            row_factor, column_factor = self._level_factors(
                left_decay, right_decay, size
            )
            rows = self._half(left, size, 1) * row_factor
            columns = self._half(right, size, 0) * column_factor
            corner = self.corner_blocks(gradient, size)
            rows_gradient = self.arrays.matmul(corner, columns)
            columns_gradient = self.arrays.matmul(self.transposed(corner), rows)
            zeros = self.arrays.zeros_like(rows)
            left_gradient += self._join_halves(zeros, rows_gradient * row_factor)
            right_gradient += self._join_halves(columns_gradient * column_factor, zeros)
            later = self.transposed(self.lower_mask(size, -1 if exclusive_rows else 0))
            log_decay_gradient += self._join_halves(
                self.arrays.matmul(
                    self.lower_mask(size, -1), columns * columns_gradient
                ),
                self.arrays.matmul(later, rows * rows_gradient),
            )
        gradients = (left_gradient, right_gradient, log_decay_gradient)
        return tuple(self._restored(x, lead) for x in gradients)

    def corner_blocks(self, matrix, size):
        """Lower left blocks of the diagonal blocks of `2 * size` of `[N, C, C]`."""
        count = matrix.shape[-1] // (2 * size)
        if count == 1:
            return matrix[:, None, size:, :size]
        shape = (-1, count, 2 * size, count, 2 * size)
        blocks = self.arrays.reshape(matrix, shape)[:, :, size:, :, :size]
        own = np.eye(count, dtype="float32")[:, None, :, None]
        return self.arrays.sum(blocks * self.arrays.convert_to_tensor(own), axis=-2)

    def unit_lower_inverse(self, strict):
        """`(I + A)^-1` of strictly lower triangular `A`, `[..., C, C]`, C a power of 2.

        The inverses of two neighbouring diagonal blocks give that of their union, from
        single entries up. This keeps float32 accuracy when keys are correlated; a
        Neumann series over the whole chunk does not.
        """
        if self.arrays.unit_lower_inverse is not None:
            inverse = self.arrays.unit_lower_inverse(strict)
            if inverse is not None:
                return inverse
        size = strict.shape[-1]
        if size == 1:
            return self.arrays.ones_like(strict)
        identity = self.arrays.convert_to_tensor(np.eye(size, dtype="float32"))
        inverse = identity - strict * self._corner_mask(size, 1)
        for half in self._levels(size)[1:]:
            corner = self.arrays.matmul(strict * self._corner_mask(size, half), inverse)
            inverse = inverse - self.arrays.matmul(inverse, corner)
        return inverse

    def _corner_mask(self, size, half):
        """float32 `[size, size]`: 1 in the lower left quarters of `2 * half` blocks."""
        block = np.zeros((2 * half, 2 * half), "float32")
        block[half:, :half] = 1
        return self.arrays.convert_to_tensor(
            np.kron(np.eye(size // (2 * half)), block), "float32"
        )
