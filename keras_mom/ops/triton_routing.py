"""The routing's Triton kernels, as an implementation of it on torch."""

from keras_mom.ops import gpu
from keras_mom.ops.dispatch import register


@register("routing", "triton")
def _triton(logits, top_k):
    gpu.check(logits)
    try:
        # Triton takes a while to import, and a CPU does without it.
        from keras_mom_kernels.routing import torch as kernels
    except ImportError as error:
        raise NotImplementedError(f"Triton is not installed ({error})") from error
    return kernels.route(logits, top_k)
