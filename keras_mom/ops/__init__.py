"""Operations on tensors, each with one signature for all implementations."""

import keras

from keras_mom.ops.linear_cross_entropy import linear_cross_entropy
from keras_mom.ops.memory_scan import memory_scan
from keras_mom.ops.routing import RoutingStatistics, routing_statistics, top_k_routing
from keras_mom.ops.short_convolution import short_convolution

if keras.backend.backend() == "torch":
    from keras_mom.ops import triton_gates as triton_gates
    from keras_mom.ops import triton_mixing as triton_mixing
    from keras_mom.ops import triton_packed_convolution as triton_packed_convolution
    from keras_mom.ops import triton_packing as triton_packing
    from keras_mom.ops import triton_projection as triton_projection
    from keras_mom.ops import triton_routing as triton_routing
    from keras_mom.ops import triton_scan as triton_scan
    from keras_mom.ops import triton_step as triton_step
elif keras.backend.backend() == "jax":
    from keras_mom.ops import pallas_kernels as pallas_kernels
elif keras.backend.backend() == "tensorflow":
    from keras_mom.ops import xla_kernels as xla_kernels

__all__ = [
    "RoutingStatistics",
    "linear_cross_entropy",
    "memory_scan",
    "routing_statistics",
    "short_convolution",
    "top_k_routing",
]
