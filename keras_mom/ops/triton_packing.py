"""The packing's Triton kernels, as an implementation of its tables on torch."""

from keras_mom.ops import gpu
from keras_mom.ops.dispatch import register


@register("packing_tables", "triton")
def _triton(sizes, indices, mask):
    gpu.check(indices)
    try:
        # Triton takes a while to import, and a CPU does without it.
        from keras_mom_kernels.packing import torch as kernels
    except ImportError as error:
        raise NotImplementedError(f"Triton is not installed ({error})") from error
    _, length, top_k = indices.shape
    tables = kernels.packing_tables(
        indices,
        mask,
        num_memories=sizes.num_memories,
        shared=sizes.shared,
        history=sizes.history,
        chunk_size=sizes.chunk_size,
        chunks=sizes.chunks(length, top_k),
    )
    return tables._asdict()
