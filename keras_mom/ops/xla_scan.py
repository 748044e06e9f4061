"""The memory scan of `keras_mom_kernels` on TensorFlow, as an implementation.

The operations around it are plain ones, which XLA compiles as they are: their
portable forms serve under the name of `"xla"` too.
"""

from keras import ops

# These register the operations around the scan.
from keras_mom.ops import gates as gates
from keras_mom.ops import memory_mixing as memory_mixing
from keras_mom.ops import memory_step as memory_step
from keras_mom.ops import packed_convolution as packed_convolution
from keras_mom.ops import packing as packing
from keras_mom.ops import routing as routing
from keras_mom.ops import short_convolution as short_convolution
from keras_mom.ops.dispatch import operations, register, registered
from keras_mom_kernels.memory_scan import tensorflow as kernels


@register("memory_scan", "xla")
def _xla(query, key, value, *, cu_seqlens, aligned, **options):
    if aligned is not None:
        options["chunk_offsets"] = aligned.chunk_offsets
        options["chunk_size"] = aligned.chunk_size
        options["resets"] = aligned.resets
    tensors = [ops.convert_to_tensor(x) for x in (query, key, value)]
    return kernels.memory_scan(*tensors, cu_seqlens=cu_seqlens, **options)


for _operation in operations():
    if _operation != "memory_scan":
        register(_operation, "xla")(registered(_operation, "portable"))
