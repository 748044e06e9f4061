"""Keras' array functions, as `keras_mom_kernels` takes those of any framework."""

import math
from types import SimpleNamespace

from keras import ops

from keras_mom import backend

_NAMES = (
    "arange",
    "cast",
    "clip",
    "concatenate",
    "convert_to_tensor",
    "cumsum",
    "diagonal",
    "exp",
    "floor",
    "matmul",
    "maximum",
    "ones_like",
    "reshape",
    "shape",
    "slice",
    "stack",
    "sum",
    "swapaxes",
    "where",
    "zeros",
    "zeros_like",
)


def _take(x, index, axis=0):
    """Entries of the first axis, taken as rows of a matrix.

    Of anything but a matrix, `ops.take` on torch is exported wrongly to ONNX.
    """
    assert axis == 0
    size, *rest = ops.shape(x)
    rows = ops.take(ops.reshape(x, (size, math.prod(rest))), index, axis=0)
    return ops.reshape(rows, (*ops.shape(index), *rest))


# What `keras_mom_kernels.memory_scan.chunk_algebra` describes.
ARRAYS = SimpleNamespace(
    **{name: getattr(ops, name) for name in _NAMES},
    take=_take,
    scan=backend.scan,
    full_precision=backend.full_precision,
    unit_lower_inverse=backend.unit_lower_inverse,
)
