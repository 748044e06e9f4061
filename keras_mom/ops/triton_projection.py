"""Grouped matrix products, as an implementation of projections by memory on torch."""

from keras_mom.ops import gpu
from keras_mom.ops.dispatch import register
from keras_mom.ops.memory_projection import project_all

# Memories, for each that a token goes to, up to which projecting for all of them, in
# one dense product, is faster than laying tokens out by memory.
_DENSE_UP_TO = 4


@register("memory_projection", "triton")
def _triton(inputs, layers, packing, sets):
    gpu.check(inputs)
    slots = packing.targets.shape[-1]
    if sets < packing.num_memories or sets <= _DENSE_UP_TO * slots:
        return project_all(inputs, layers, packing, sets)
    if any(layer.quantization_mode is not None for layer in layers):
        return project_all(inputs, layers, packing, sets)
    try:
        # Triton takes a while to import, and a CPU does without it.
        from keras_mom_kernels.grouped_projection import torch as kernels
    except ImportError as error:
        raise NotImplementedError(f"Triton is not installed ({error})") from error
    weights = [layer.kernel for layer in layers]
    weights = [getattr(x, "value", x).to(inputs.dtype) for x in weights]
    try:
        for weight in weights:
            kernels.check_served(inputs, weight, sets)
    except NotImplementedError:
        # A dense product serves every dtype and width.
        return project_all(inputs, layers, packing, sets)
    places = kernels.order_by_memory(
        packing.targets, packing.token, packing.memory, packing.place, packing.count
    )
    return [
        (
            kernels.grouped_projection(inputs, weight, places),
            places.source,
            places.targets,
        )
        for weight in weights
    ]
