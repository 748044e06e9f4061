"""Moving rows between two layouts with gathers only, in both directions.

Where one layout holds each row of the other at most once, the gradient of a gather
is a gather too. Compilers turn the general gradient, a scatter, into a serial loop.
"""

from keras import ops

from keras_mom import backend
from keras_mom.ops.constants import at_least


def gather_rows(inputs, source, targets):
    """Takes rows of `inputs`, or zeros, into a new layout.

    Args:
        inputs: `[B, T, E]`.
        source: int32 `[B, R]`, the row of `inputs` to take, -1 for zeros.
        targets: int32 `[B, T, J]`, the up to J rows of the result that each row of
            `inputs` goes to, -1 for none. The inverse of `source`.

    Returns:
        `[B, R, E]`, of the dtype of `inputs`.
    """
    return _GATHER((), inputs, source, targets)[0]


def sum_rows(rows, source, targets):
    """Sums rows back into the first layout: the transpose of `gather_rows`.

    Args:
        rows: `[B, R, E]`.
        source: int32 `[B, R]`.
        targets: int32 `[B, T, J]`. A row without targets is zero.

    Returns:
        `[B, T, E]`, of the dtype of `rows`.
    """
    return _SUM((), rows, source, targets)[0]


def take_rows(inputs, index):
    """`inputs[b, index[b, r]]`, zeros at index -1: `[B, R, E]`.

    For a few rows: the gradient is the framework's own.
    """
    taken = backend.gather_batch(inputs, at_least(index, 0))
    zero = ops.zeros((), inputs.dtype)
    return ops.where(index[..., None] >= 0, taken, zero)


def _take_sum(rows, targets):
    total = take_rows(rows, targets[..., 0])
    for i in range(1, targets.shape[-1]):
        total = total + take_rows(rows, targets[..., i])
    return total


def _infer_gather(_, inputs, source, targets):
    shape = (*source.shape, inputs.shape[-1])
    return ((shape, str(inputs.dtype).rpartition(".")[2]),)


def _infer_sum(_, rows, source, targets):
    shape = (*targets.shape[:2], rows.shape[-1])
    return ((shape, str(rows.dtype).rpartition(".")[2]),)


_GATHER = backend.Differentiable(
    "gather_rows",
    lambda _, inputs, source, targets: (take_rows(inputs, source),),
    lambda _, tensors, outputs, grads: (_take_sum(grads[0], tensors[2]), None, None),
    _infer_gather,
)

_SUM = backend.Differentiable(
    "sum_rows",
    lambda _, rows, source, targets: (_take_sum(rows, targets),),
    lambda _, tensors, outputs, grads: (take_rows(grads[0], tensors[1]), None, None),
    _infer_sum,
)
