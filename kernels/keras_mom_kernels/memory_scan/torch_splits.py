"""Splits of long segments: which chunks each has, and the states before them.

A few long sequences leave most of a chip idle if each is scanned from its first chunk
to its last. Where the shapes alone say so, segments are cut into splits, which are
scanned at once: see `triton_splits`. What is cut depends on T, heads and the number of
segments, never on their lengths, which nobody on the host knows.
"""

from typing import NamedTuple

import torch
import triton

from keras_mom_kernels.memory_scan.configurations import power_of_two, split_length
from keras_mom_kernels.memory_scan.triton_backward import scan_gradients
from keras_mom_kernels.memory_scan.triton_forward import scan_chunks
from keras_mom_kernels.memory_scan.triton_splits import join_splits


class Splits(NamedTuple):
    """How a call's segments are cut.

    Attributes:
        offsets: int32 `[B, splits + 1]`, the chunks of each split, as `chunk_offsets`.
        first: int32 `[B, segments + 1]`, the first split of each segment.
        count: splits of a batch row, more than are needed: the last ones are empty.
        transitions: float32 `[B * count, H, K, K]`.
        rows: batch rows.
    """

    offsets: torch.Tensor
    first: torch.Tensor
    count: int
    transitions: torch.Tensor
    rows: int

    def arguments(self):
        """What a kernel takes to scan splits instead of segments."""
        return dict(offsets=self.offsets, segments=self.count, SEGMENTED=True)


def make_splits(call):
    """`Splits` of a call that is prepared, or None."""
    known = call.arguments
    blocks = triton.cdiv(known["V"], call.config.scan.block_v)
    length = split_length(call.chunks, call.segments, blocks * call.heads)
    if length is None:
        return None
    offsets = known["offsets"]
    if offsets is None:
        offsets = torch.tensor([0], dtype=torch.int32, device=call.device)
        offsets = torch.stack([offsets, offsets + known["chunks"]], dim=1)
        offsets = offsets.expand(call.segments, 2)
    rows, segments = offsets.shape[0], offsets.shape[1] - 1
    count = known["chunks"] // length + segments
    needed = (torch.diff(offsets) + (length - 1)) // length
    first = needed.clamp(min=1).cumsum(1, dtype=torch.int32)
    first = torch.nn.functional.pad(first, (1, 0))
    split = torch.arange(count + 1, dtype=torch.int32, device=call.device)
    split = split.expand(rows, count + 1).contiguous()
    segment = torch.searchsorted(first[:, 1:].contiguous(), split, right=True)
    segment = segment.clamp(max=segments - 1)
    begin = offsets.gather(1, segment)
    begin = begin + (split - first.gather(1, segment)) * length
    begin = torch.minimum(begin, offsets.gather(1, segment + 1)).to(torch.int32)
    key_dim = known["K"]
    transitions = call.empty(rows * count, call.heads, key_dim, key_dim)
    splits = Splits(begin.contiguous(), first.contiguous(), count, transitions, rows)
    launch = call.config.states
    _scan_splits(call, splits, launch, key_dim, transitions, IDENTITY=True, V=key_dim)
    return splits


def states_before(call, splits, initial, final):
    """The states before each split, float32 `[B * count, H, K, V]`.

    `initial` are those before the segments or None; those behind them go to `final`.
    """
    launch, value_dim = call.config.states, call.arguments["V"]
    ends = call.empty(*splits.transitions.shape[:-1], value_dim)
    _scan_splits(call, splits, launch, value_dim, ends, IDENTITY=False)
    return _join(call, splits, ends, initial, final, BACKWARD=False)


def gradients_behind(call, splits, final_grad, initial_grad):
    """The gradients of the states behind each split, `[B * count, H, K, V]`.

    `final_grad` are those behind the segments; those before them go to `initial_grad`,
    if it is not None.
    """
    launch, value_dim = call.config.reverse, call.arguments["V"]
    ends = call.empty(*splits.transitions.shape[:-1], value_dim)
    grid = _grid(call, splits, value_dim, launch)
    outputs = dict(initial_grad=ends, final_grad=None, write_grads=None)
    outputs["state_grads"] = None
    flags = dict(INITIAL=True, STATES=False, FINAL=False)
    call.run(scan_gradients, grid, launch, **splits.arguments(), **flags, **outputs)
    return _join(call, splits, ends, final_grad, initial_grad, BACKWARD=True)


def _scan_splits(call, splits, launch, width, final, **options):
    """What splits leave behind, from an empty state or, for IDENTITY, from that."""
    flags = dict(OUTPUT=False, STATES=False, FINAL=True, INITIAL=False)
    unused = dict.fromkeys(("initial", "output", "states", "writes"))
    grid = _grid(call, splits, width, launch)
    arguments = splits.arguments() | flags | unused | options
    call.run(scan_chunks, grid, launch, final=final, **arguments)


def _join(call, splits, ends, start, last, BACKWARD):
    launch, value_dim = call.config.join, call.arguments["V"]
    befores = torch.empty_like(ends)
    segments = splits.first.shape[1] - 1
    blocks = triton.cdiv(value_dim, launch.block_v)
    call.run(
        join_splits,
        (blocks * call.heads * segments * splits.rows,),
        launch,
        transitions=splits.transitions,
        ends=ends,
        start=start,
        befores=befores,
        last=last,
        first=splits.first,
        segments=segments,
        splits=splits.count,
        BLOCK_K=power_of_two(call.arguments["K"]),
        STEP=launch.block_k,
        START=start is not None,
        LAST=last is not None,
        BACKWARD=BACKWARD,
        PRECISION=call.config.exact,
    )
    return befores


def _grid(call, splits, width, launch):
    blocks = triton.cdiv(width, launch.block_v)
    return (blocks * call.heads * splits.rows * splits.count,)
