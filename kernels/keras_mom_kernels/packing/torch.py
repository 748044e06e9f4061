"""The packing's tables on torch through two Triton kernels.

    from keras_mom_kernels.packing.torch import packing_tables

Runs on NVIDIA GPUs from sm_80 on, and on AMD; on a CPU with `TRITON_INTERPRET=1`.
Nothing is read back to the host, and no kernel uses atomics.
"""

from typing import NamedTuple

import torch
import triton

from keras_mom_kernels.memory_scan.torch_launches import on
from keras_mom_kernels.memory_scan.triton_common import INTERPRETED
from keras_mom_kernels.packing import triton_packing


class Tables(NamedTuple):
    """Where tokens go and where packed rows come from, all int32.

    Attributes:
        position: `[B, T, M]`, the row of token t in memory m, else -1.
        targets: `[B, T, J]`, the rows of token t, else -1.
        slot: `[B, R]`, `t * J + j` of the token in a row, -1 in other rows.
        token: `[B, R]`, t of the token in a row, else -1.
        memory: `[B, R]`, whose region a row lies in.
        place: `[B, R]`, rows since the region's first token; negative in history.
        start: `[B, M]`, the first row of each region.
        count: `[B, M]`, the tokens of each memory.
        chunk_offsets: `[B, M + 1]`, the first chunk of each region; the last region
            ends with the batch row.
    """

    position: torch.Tensor
    targets: torch.Tensor
    slot: torch.Tensor
    token: torch.Tensor
    memory: torch.Tensor
    place: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    chunk_offsets: torch.Tensor


def packing_tables(
    indices: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    num_memories: int,
    shared: bool,
    history: int,
    chunk_size: int,
    chunks: int,
) -> Tables:
    """Packs every memory's tokens, in time order, behind `history` free rows.

    A memory's region is of whole chunks; regions follow one another. Below, M counts
    the shared memory too, J = k + shared, and R = chunks * chunk_size.

    Args:
        indices: int32 `[B, T, k]`, the different memories each token is routed to.
        mask: bool `[B, T]`, False at tokens that go nowhere, or None.
        num_memories: number of routed memories, up to 1023.
        shared: whether one more memory, the last, receives every token.
        history: rows in front of each memory's tokens.
        chunk_size: rows a chunk.
        chunks: chunks of a batch row; that they suffice is not checked.

    Returns:
        `Tables`.

    Raises:
        NotImplementedError: if the kernels cannot serve the call, with the reason.
    """
    kind = indices.device.type
    if kind not in ("cuda", "meta") and not INTERPRETED.value:
        raise NotImplementedError(
            f"the Triton kernels need a GPU; the tensors are on {kind!r}"
        )
    if indices.dtype != torch.int32:
        raise NotImplementedError(f"indices are int32, not {indices.dtype}")
    if num_memories > 1023:
        raise NotImplementedError(
            f"the Triton kernels take up to 1023 memories, not {num_memories}"
        )
    if mask is not None:
        mask = mask.contiguous()
    sizes = (num_memories, bool(shared), history, chunk_size, chunks)
    return Tables(*_tables(indices.contiguous(), mask, *sizes))


@torch.library.custom_op("keras_mom_kernels::packing_tables", mutates_args=())
def _tables(
    indices: torch.Tensor,
    mask: torch.Tensor | None,
    num_memories: int,
    shared: bool,
    history: int,
    chunk_size: int,
    chunks: int,
) -> list[torch.Tensor]:
    tables = _empty(indices, mask, num_memories, shared, history, chunk_size, chunks)
    batch, length, top_k = indices.shape
    memories, rows = num_memories + int(shared), chunks * chunk_size
    # Blocks of up to 1024 tokens, and tiles of up to 2048 entries.
    block = min(1024, max(16, triton.next_power_of_2(length)))
    block_m = triton.next_power_of_2(memories + 1)
    tile = max(1, min(256, 2048 // block_m))
    programs = triton.cdiv(length, tile) + triton.cdiv(rows, tile)
    x = Tables(*tables)
    if not batch:
        return tables
    known = dict(ROUTED=num_memories, MEMORIES=memories, TOP_K=top_k)
    _run(
        triton_packing.rank_tokens,
        batch * memories,
        (indices, mask, x.position, x.count, length),
        MASKED=mask is not None,
        BLOCK=block,
        **known,
    )
    targets = (x.targets, x.slot, x.token, x.memory, x.place, x.start, x.chunk_offsets)
    _run(
        triton_packing.place_rows,
        batch * programs,
        (indices, x.count, x.position, *targets, length, rows, chunks),
        HISTORY=history,
        CHUNK=chunk_size,
        BLOCK=tile,
        BLOCK_M=block_m,
        **known,
    )
    return tables


def _run(kernel, programs, arguments, **known):
    with on(arguments[0].device):
        kernel[(programs,)](*arguments, **known, num_warps=4)


def _empty(indices, mask, num_memories, shared, history, chunk_size, chunks):
    """The tables of a call, not filled in."""
    batch, length, top_k = indices.shape
    memories, rows = num_memories + int(shared), chunks * chunk_size
    tables = Tables(
        position=indices.new_empty((batch, length, memories)),
        targets=indices.new_empty((batch, length, top_k + int(shared))),
        slot=indices.new_empty((batch, rows)),
        token=indices.new_empty((batch, rows)),
        memory=indices.new_empty((batch, rows)),
        place=indices.new_empty((batch, rows)),
        start=indices.new_empty((batch, memories)),
        count=indices.new_empty((batch, memories)),
        chunk_offsets=indices.new_empty((batch, memories + 1)),
    )
    return list(tables)


_tables.register_fake(_empty)
