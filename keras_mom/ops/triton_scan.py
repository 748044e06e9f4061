"""The memory scan's Triton kernels, as an implementation of the operation on torch."""

from keras_mom.ops import gpu
from keras_mom.ops.dispatch import register


@register("memory_scan", "triton")
def _triton(
    query,
    key,
    value,
    *,
    log_decay,
    beta,
    write,
    erase_before_decay,
    decay_axis,
    cu_seqlens,
    aligned,
    initial_state,
    scale,
):
    gpu.check(query)
    try:
        # Triton takes a while to import, and a CPU does without it.
        from keras_mom_kernels.memory_scan import torch as kernels
    except ImportError as error:
        raise NotImplementedError(f"Triton is not installed ({error})") from error
    packing = {}
    if aligned is not None:
        packing = {
            "chunk_offsets": aligned.chunk_offsets,
            "chunk_size": aligned.chunk_size,
            "resets": aligned.resets,
        }
    return kernels.memory_scan(
        query,
        key,
        value,
        log_decay=log_decay,
        beta=beta,
        write=write,
        erase_before_decay=erase_before_decay,
        decay_axis=decay_axis,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        scale=scale,
        **packing,
    )
