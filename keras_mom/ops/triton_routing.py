"""The routing's Triton kernels, as an implementation of it on torch."""

from keras_mom.ops import gpu
from keras_mom.ops.dispatch import register
from keras_mom.ops.routing import RoutingStatistics, logits_of


@register("routing", "triton")
def _route(logits, top_k):
    return _kernels(logits).route(logits, top_k)


@register("projected_routing", "triton")
def _projected(inputs, kernel, top_k):
    kernels = _kernels(inputs)
    if kernel.shape[1] > kernels.MOST_PROJECTED:
        return kernels.route(logits_of(inputs, kernel), top_k)
    return kernels.project_and_route(inputs, kernel, top_k)


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
