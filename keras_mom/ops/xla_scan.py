"""The memory scan of `keras_mom_kernels` on TensorFlow, as an implementation."""

from keras import ops

from keras_mom.ops.dispatch import register
from keras_mom_kernels.memory_scan import tensorflow as kernels


@register("memory_scan", "xla")
def _xla(query, key, value, *, cu_seqlens, aligned, **options):
    if aligned is not None:
        options["chunk_offsets"] = aligned.chunk_offsets
        options["chunk_size"] = aligned.chunk_size
        options["resets"] = aligned.resets
    tensors = [ops.convert_to_tensor(x) for x in (query, key, value)]
    return kernels.memory_scan(*tensors, cu_seqlens=cu_seqlens, **options)
