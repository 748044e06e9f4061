"""The routing's Triton kernels, as an implementation of it on torch."""

from keras_mom.ops import gpu
from keras_mom.ops.dispatch import register
from keras_mom.ops.routing import RoutingStatistics


@register("routing", "triton")
def _route(logits, top_k):
    return _kernels(logits).route(logits, top_k)


@register("routing_statistics", "triton")
def _statistics(probabilities, indices, mask):
    found = _kernels(probabilities).routing_statistics(probabilities, indices, mask)
    return RoutingStatistics(*found)


def _kernels(tensor):
    gpu.check(tensor)
    try:
        # Triton takes a while to import, and a CPU does without it.
        from keras_mom_kernels.routing import torch as kernels
    except ImportError as error:
        raise NotImplementedError(f"Triton is not installed ({error})") from error
    return kernels
