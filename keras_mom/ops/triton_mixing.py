"""The memory mixing's Triton kernels, as an implementation of it on torch."""

from keras_mom.ops import gpu
from keras_mom.ops.dispatch import register


@register("memory_mixing", "triton")
def _mixing(outputs, weights, packing, norm):
    kernels, options = _kernels(outputs, norm)
    return kernels.memory_mixing(
        outputs, weights, packing.targets, norm.scale, norm.gate, **options
    )


@register("output_norm", "triton")
def _norm(mixed, norm):
    kernels, options = _kernels(mixed, norm)
    return kernels.output_norm(mixed, norm.scale, norm.gate, **options)


def _kernels(tensor, norm):
    """The kernels' module, and the options that `norm` gives them."""
    gpu.check(tensor)
    try:
        # Triton takes a while to import, and a CPU does without it.
        from keras_mom_kernels.memory_mixing import torch as kernels
    except ImportError as error:
        raise NotImplementedError(f"Triton is not installed ({error})") from error
    if norm.dtype not in kernels.DTYPES:
        raise NotImplementedError(f"no Triton kernel has results of {norm.dtype}")
    return kernels, dict(epsilon=norm.epsilon, dtype=kernels.DTYPES[norm.dtype])
