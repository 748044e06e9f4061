"""What `keras_mom_kernels` has for JAX, as implementations of operations.

The operations around the scan are plain ones, which XLA fuses as they are: on a GPU or
a TPU, their portable forms serve under the name of `"pallas"` too.
"""

import functools

from keras import ops

# These register the operations around the scan.
from keras_mom.ops import gates as gates
from keras_mom.ops import memory_mixing as memory_mixing
from keras_mom.ops import memory_projection as memory_projection
from keras_mom.ops import memory_step as memory_step
from keras_mom.ops import packed_convolution as packed_convolution
from keras_mom.ops import packing as packing
from keras_mom.ops import routing as routing
from keras_mom.ops import short_convolution as short_convolution
from keras_mom.ops.dispatch import (
    implementations,
    operations,
    register,
    registered,
)
from keras_mom_kernels.memory_scan import jax as scan_kernels
from keras_mom_kernels.memory_step import jax as step_kernels
from keras_mom_kernels.packed_convolution import jax as row_kernels


@register("memory_scan", "pallas")
def _scan(query, key, value, *, cu_seqlens, aligned, decay_axis, **options):
    scan_kernels.platform()
    if decay_axis == "value" and options["log_decay"] is not None:
        raise NotImplementedError("no Pallas kernel has a decay of value channels")
    _check_static(query)
    if aligned is not None:
        options["chunk_offsets"] = aligned.chunk_offsets
        options["chunk_size"] = aligned.chunk_size
        options["resets"] = aligned.resets
    return scan_kernels.memory_scan(query, key, value, cu_seqlens=cu_seqlens, **options)


@register("memory_step", "pallas")
def _step(query, key, value, *, in_place, parts, **options):
    # XLA sees for itself where a state may be overwritten.
    del in_place, parts
    scan_kernels.platform()
    _check_static(query)
    return step_kernels.memory_step(query, key, value, **options)


@register("convolution_step", "pallas")
def _convolution_step(query, *tensors, in_place, parts, **options):
    # XLA sees for itself where a window may be overwritten.
    del in_place, parts
    scan_kernels.platform()
    _check_static(query)
    return step_kernels.convolution_step(query, *tensors, **options)


@register("packed_convolution", "pallas")
def _packed_convolution(inputs, kernel, *places, **options):
    if scan_kernels.platform() == "gpu" and kernel is not None:
        _check_static(inputs)
        return row_kernels.packed_convolution(inputs, kernel, *places, **options)
    portable = registered("packed_convolution", "portable")
    # The scan takes its products in the dtype of its rows.
    return ops.cast(portable(inputs, kernel, *places, **options), inputs.dtype)


def _check_static(x):
    if not all(isinstance(size, int) for size in x.shape):
        raise NotImplementedError(
            f"the Pallas kernels need static shapes, not {tuple(x.shape)}"
        )


def _on_accelerators(portable):
    @functools.wraps(portable)
    def served(*tensors, **options):
        scan_kernels.platform()
        return portable(*tensors, **options)

    return served


for _operation in operations():
    if "pallas" not in implementations(_operation):
        _portable = registered(_operation, "portable")
        register(_operation, "pallas")(_on_accelerators(_portable))
