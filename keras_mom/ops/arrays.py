"""Keras' array functions, as `keras_mom_kernels` takes those of any framework."""

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
    "take",
    "where",
    "zeros",
    "zeros_like",
)

# What `keras_mom_kernels.memory_scan.chunk_algebra` describes.
ARRAYS = SimpleNamespace(
    **{name: getattr(ops, name) for name in _NAMES},
    scan=backend.scan,
    full_precision=backend.full_precision,
    unit_lower_inverse=backend.unit_lower_inverse,
)
