"""The Triton kernels of a single token, as implementations of operations on torch."""

from keras_mom.ops import gpu
from keras_mom.ops.dispatch import register


@register("spread_routing", "triton")
def _routing(weights, *others, **options):
    return _kernels(weights).spread_routing(weights, *others, **options)


@register("convolution_step", "triton")
def _convolution(query, *others, parts, **options):
    del parts
    return _kernels(query).convolution_step(query, *others, **options)


@register("memory_step", "triton")
def _step(query, *others, parts, **options):
    del parts
    return _kernels(query).memory_step(query, *others, **options)


def _kernels(tensor):
    """The module of the kernels, for tensors where `tensor` is."""
    gpu.check(tensor)
    try:
        # Triton takes a while to import, and a CPU does without it.
        from keras_mom_kernels.memory_step import torch as kernels
    except ImportError as error:
        raise NotImplementedError(f"Triton is not installed ({error})") from error
    return kernels
