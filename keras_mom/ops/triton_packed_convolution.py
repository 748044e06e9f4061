"""The packed convolution's Triton kernels, as an implementation on torch."""

from keras_mom.ops import gpu
from keras_mom.ops.dispatch import register


@register("packed_convolution", "triton")
def _triton(inputs, kernel, source, targets, **options):
    gpu.check(inputs)
    try:
        # Triton takes a while to import, and a CPU does without it.
        from keras_mom_kernels.packed_convolution import torch as kernels
    except ImportError as error:
        raise NotImplementedError(f"Triton is not installed ({error})") from error
    return kernels.packed_convolution(inputs, kernel, source, targets, **options)
