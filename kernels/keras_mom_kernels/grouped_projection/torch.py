"""The projections of routed tokens on torch, as one grouped matrix product.

    from keras_mom_kernels.grouped_projection.torch import grouped_projection

A token needs the projections of its k memories, not of all M. Tokens are laid out by
memory, and `torch.nn.functional.grouped_mm` multiplies each memory's with its own
matrix. Nothing is sorted, and nothing is read back to the host.
"""

from typing import NamedTuple

import torch

from keras_mom_kernels.memory_scan.torch import check_device
from keras_mom_kernels.packed_convolution.torch import packed_convolution


class Places(NamedTuple):
    """Where tokens lie by memory.

    Attributes:
        source: int32 `[B, R]`, the place of a packed row's token, -1 without one.
        targets: int32 `[1, N, 1]`, the packed row, of all batch rows' one after the
            other, that each place goes to, -1 for places that are not needed.
        token: int32 `[1, N]`, the token in each place, numbered likewise.
        places: int32 `[1, B * T, J]`, the places of each token.
        ends: int32 `[M]`, the place behind each memory's last token.
    """

    source: torch.Tensor
    targets: torch.Tensor
    token: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor


def order_by_memory(targets, token, memory, place, count) -> Places:
    """Gives each routed token a place behind those of earlier memories and batch rows.

    Args:
        targets: int32 `[B, T, J]`, the packed rows of each token, -1 for none.
        token: int32 `[B, R]`, the token in each packed row, -1 for none.
        memory: int32 `[B, R]`, the memory of each packed row.
        place: int32 `[B, R]`, the number of its memory's earlier tokens in its batch
            row.
        count: int32 `[B, M]`, the tokens of each memory.
    """
    batch, length, slots = targets.shape
    rows, memories = token.shape[1], count.shape[1]
    size = batch * length * slots
    by_memory = count.T.reshape(-1).cumsum(0, dtype=torch.int32)
    first = (by_memory - count.T.reshape(-1)).view(memories, batch).T
    source = torch.gather(first, 1, memory.long()) + place
    source = torch.where(token >= 0, source, -1)

    def spread(values):
        """`values` of packed rows, at their tokens' places."""
        found = values.new_full((size + 1,), -1)
        index = torch.where(source >= 0, source, size).view(-1).long()
        return found.scatter(0, index, values.reshape(-1))[:size]

    row = torch.arange(batch, device=token.device, dtype=torch.int32)[:, None]
    packed = torch.arange(rows, device=token.device, dtype=torch.int32)
    reached = torch.gather(source, 1, targets.clamp(min=0).view(batch, -1).long())
    places = torch.where(targets.view(batch, -1) >= 0, reached, -1)
    return Places(
        source,
        spread(packed + row * rows)[None, :, None],
        spread(token + row * length)[None],
        places.view(1, batch * length, slots),
        by_memory.view(memories, batch)[:, -1].contiguous(),
    )


def grouped_projection(
    inputs: torch.Tensor, kernel: torch.Tensor, places: Places
) -> torch.Tensor:
    """Projects every token with the matrices of its memories.

    Differentiable in inputs and kernel.

    Args:
        inputs: `[B, T, D]`; bfloat16 on a GPU.
        kernel: `[D, M * E]` of the same dtype, the memories' matrices side by side.
        places: what `order_by_memory` returns.

    Returns:
        `[1, N, E]` with N = B T J, of the dtype of `inputs`. What stands in places
        that hold no token is not defined.

    Raises:
        NotImplementedError: if no kernel serves the call, with the reason.
    """
    check_device(inputs)
    check_served(inputs, kernel, places.ends.shape[0])
    width = inputs.shape[-1]
    rows = packed_convolution(
        inputs.reshape(1, -1, width),
        None,
        places.token,
        places.places,
        activation=None,
    )
    matrices = kernel.view(width, places.ends.shape[0], -1).transpose(0, 1)
    return torch.nn.functional.grouped_mm(rows[0], matrices, offs=places.ends)[None]


def check_served(inputs, kernel, memories):
    """Raises `NotImplementedError`, with the reason, for calls without a kernel."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        raise NotImplementedError(f"torch {torch.__version__} has no grouped_mm")
    if inputs.dtype != kernel.dtype:
        raise NotImplementedError(
            f"grouped_mm takes one dtype, not {inputs.dtype} and {kernel.dtype}"
        )
    if inputs.is_cuda:
        if inputs.dtype != torch.bfloat16:
            raise NotImplementedError(f"grouped_mm takes bfloat16, not {inputs.dtype}")
        if not _reads_groups_on_device(inputs.device.index):
            # It reads the groups' sizes on the host there.
            raise NotImplementedError("grouped_mm needs sm_90 or later")
    widths = inputs.shape[-1], kernel.shape[1] // memories
    if any(width * inputs.element_size() % 16 for width in widths):
        raise NotImplementedError(
            f"grouped_mm takes rows of whole 16 bytes, not of {widths} channels"
        )


@torch.compiler.assume_constant_result
def _reads_groups_on_device(index):
    return torch.cuda.get_device_capability(index) >= (9, 0)
