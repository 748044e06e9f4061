"""What `keras_mom_kernels` has for TensorFlow, as implementations of operations.

The operations around the scan are plain ones, which XLA compiles as they are: their
portable forms serve under the name of `"xla"` too.
"""

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
from keras_mom.ops.dispatch import implementations, operations, register, registered
from keras_mom_kernels.memory_scan import tensorflow as scan_kernels
from keras_mom_kernels.memory_step import tensorflow as step_kernels


@register("memory_scan", "xla")
def _scan(query, key, value, *, cu_seqlens, aligned, **options):
    if aligned is not None:
        options["chunk_offsets"] = aligned.chunk_offsets
        options["chunk_size"] = aligned.chunk_size
        options["resets"] = aligned.resets
    tensors = [ops.convert_to_tensor(x) for x in (query, key, value)]
    return scan_kernels.memory_scan(*tensors, cu_seqlens=cu_seqlens, **options)


@register("memory_step", "xla")
def _step(query, key, value, *, in_place, parts, **options):
    del in_place, parts
    return step_kernels.memory_step(query, key, value, **options)


for _operation in operations():
    if "xla" not in implementations(_operation):
        register(_operation, "xla")(registered(_operation, "portable"))
