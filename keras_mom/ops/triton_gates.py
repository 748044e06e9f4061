"""The gates' Triton kernels, as an implementation of them on torch."""

from keras_mom.ops import gpu
from keras_mom.ops.dispatch import register


@register("gates", "triton")
def _triton(decay, write_strength, dt_bias, a_log):
    gpu.check(decay)
    try:
        # Triton takes a while to import, and a CPU does without it.
        from keras_mom_kernels.gates import torch as kernels
    except ImportError as error:
        raise NotImplementedError(f"Triton is not installed ({error})") from error
    return kernels.decay_and_write_strength(decay, write_strength, dt_bias, a_log)
