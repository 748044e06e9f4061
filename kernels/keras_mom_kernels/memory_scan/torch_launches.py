"""The launches of the Triton kernels of the memory scan, forward and backward."""

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton

from keras_mom_kernels.memory_scan.configurations import (
    CHUNK_SIZE,
    Configuration,
    Launch,
    configuration,
    power_of_two,
)
from keras_mom_kernels.memory_scan.torch_splits import (
    gradients_behind,
    make_splits,
    states_before,
)
from keras_mom_kernels.memory_scan.triton_backward import scan_gradients
from keras_mom_kernels.memory_scan.triton_channel_gradients import (
    crossing_gradients,
    level_gradients,
    square_gradients,
)
from keras_mom_kernels.memory_scan.triton_forward import scan_chunks
from keras_mom_kernels.memory_scan.triton_prepare import (
    decay_rows,
    list_chunks,
    pair_rows,
    solve_pairs,
    sum_decays,
)
from keras_mom_kernels.memory_scan.triton_row_gradients import (
    row_gradients,
    solve_gradients,
    sum_partials,
)


class Inputs(NamedTuple):
    """The tensors of a call, as `keras_mom_kernels.memory_scan.torch` takes them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    log_decay: torch.Tensor | None
    beta: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    chunk_offsets: torch.Tensor | None
    resets: torch.Tensor | None
    initial_state: torch.Tensor | None


def state_shape(inputs):
    """Of the final state."""
    batch, _, heads, key_dim = inputs.key.shape
    shape = (heads, key_dim, inputs.value.shape[-1])
    if inputs.cu_seqlens is not None:
        return (inputs.cu_seqlens.shape[0] - 1, *shape)
    if inputs.chunk_offsets is not None:
        return (batch, inputs.chunk_offsets.shape[1] - 1, *shape)
    return (batch, *shape)


class Call:
    """A call's sizes, tables and constants, which both directions need.

    Args:
        inputs: `Inputs`.
        write, erase_before_decay, scale: as the operation takes them.
        chunk_rows: rows a chunk, up to C.

    Attributes:
        config: `Configuration`.
        narrow: the dtype of what products take.
        parts: operands that a stored square goes in.
        rows, heads, chunks, segments: N, H, and of the whole call.
        arguments: what kernels take, by name.
    """

    config: Configuration

    def __init__(self, inputs, write, erase_before_decay, scale, chunk_rows):
        key, log_decay, offsets = inputs.key, inputs.log_decay, inputs.chunk_offsets
        batch, length, self.heads, key_dim = key.shape
        decay = "none"
        if log_decay is not None:
            decay = "head" if log_decay.ndim == 3 else "channel"
        self.device = key.device
        exclusive = bool(erase_before_decay) and write == "delta" and decay != "none"
        self.config = _configuration(inputs, decay, exclusive)
        bf16 = self.config.precision == "bf16"
        self.narrow = torch.bfloat16 if bf16 else torch.float32
        self.parts = 2 if self.config.split else 1

        table, segments, chunks = None, 1, -(-length // chunk_rows)
        if inputs.cu_seqlens is not None:
            segments = inputs.cu_seqlens.shape[0] - 1
            chunks = (length + segments * (chunk_rows - 1)) // chunk_rows
            table, offsets = _chunk_table(inputs.cu_seqlens, chunks, chunk_rows)
        elif offsets is not None:
            segments = offsets.shape[1] - 1
        self.rows = batch * length
        self.chunks, self.segments = batch * chunks, batch * segments
        self.delta, self.decay = write == "delta", decay
        self.arguments = dict(
            inputs._asdict(),
            initial=inputs.initial_state,
            resets=_reset_counts(inputs.resets, chunks, chunk_rows),
            table=table,
            offsets=offsets,
            segments=segments,
            length=length,
            chunks=chunks,
            heads=self.heads,
            rows=self.rows,
            scale=scale,
            reading_query=inputs.query,
            reading_key=inputs.key,
            ending_key=inputs.key,
            ending_rest=None,
            channels=None,
            coarse=None,
            fine=None,
            inverse=None,
            attention=None,
            K=key_dim,
            V=inputs.value.shape[-1],
            C=CHUNK_SIZE,
            ROWS=chunk_rows,
            LAYOUT=_layout(inputs, chunk_rows),
            SEGMENTED=offsets is not None,
            DECAY=decay,
            DELTA=self.delta,
            EXCLUSIVE=exclusive,
            BETA=inputs.beta is not None,
            RESETS=inputs.resets is not None,
            INITIAL=inputs.initial_state is not None,
            PRECISION=self.config.precision,
            LEVEL_PRECISION=self.config.level,
            PARTS=self.parts,
        )

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.device)

    def run(self, kernel, grid, launch, **arguments):
        """Launches a kernel with those of the call's arguments that it takes."""
        if 0 in grid:
            return
        blocks = dict(BLOCK_K=launch.block_k, BLOCK_V=launch.block_v)
        known = {**self.arguments, **blocks, "STAGES": launch.stages, **arguments}
        taken = {name: known[name] for name in kernel.arg_names}
        options = dict(num_warps=launch.warps, num_stages=launch.stages)
        if launch.registers is not None and torch.version.hip is None:
            options["maxnreg"] = launch.registers
        kernel[grid](**taken, **options)


def on(device):
    """Context in which kernels are launched on `device`."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def launch(kernel, grid, first, *others, warps=4, **constants):
    """Runs a Triton kernel on the device of its first argument, a tensor."""
    with on(first.device):
        kernel[grid](first, *others, **constants, num_warps=warps)


def _configuration(inputs, decay, exclusive):
    dtypes = {inputs.query.dtype, inputs.key.dtype, inputs.value.dtype}
    name = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32"
    target, capability = "cuda", 90
    if torch.version.hip is not None:
        target = "hip"
    elif inputs.key.is_cuda:
        major, minor = torch.cuda.get_device_capability(inputs.key.device)
        capability = 10 * major + minor
    sizes = inputs.key.shape[-1], inputs.value.shape[-1]
    return configuration(*sizes, name, decay, exclusive, target, capability)


def _layout(inputs, chunk_rows):
    if inputs.cu_seqlens is not None:
        return "ragged"
    return "padded" if inputs.key.shape[1] % chunk_rows else "full"


def _chunk_table(cu_seqlens, chunks, chunk_rows):
    """The chunks of packed sequences, without reading a length on the host.

    Returns:
        int32 `[chunks, 2]`, first row and rows of each chunk, no rows for those that
        are not needed; int32 `[1, S + 1]`, the first chunk of each sequence.
    """
    sequences = cu_seqlens.shape[0] - 1
    table = cu_seqlens.new_empty((chunks, 2))
    offsets = cu_seqlens.new_empty((1, sequences + 1))
    block = 64
    kernel: Any = list_chunks
    kernel[(triton.cdiv(max(chunks, 1), block),)](
        cu_seqlens,
        table,
        offsets,
        sequences,
        chunks,
        ROWS=chunk_rows,
        BLOCK=block,
        BLOCK_S=min(64, power_of_two(sequences)),
        num_warps=4,
    )
    return table, offsets


def _reset_counts(resets, chunks, chunk_rows):
    """int32 `[B, T]`: the resets in its chunk up to each row."""
    if resets is None:
        return None
    batch, length = resets.shape
    missing = chunks * chunk_rows - length
    counts = torch.nn.functional.pad(resets.to(torch.int32), (0, missing))
    counts = counts.view(batch, chunks, chunk_rows).cumsum(-1, dtype=torch.int32)
    return counts.view(batch, -1)[:, :length].contiguous()


def _prepare(call, inputs):
    """Running sums of log decays, the chunks' solves and query-key products."""
    if inputs.log_decay is not None:
        width = math.prod(inputs.log_decay.shape[2:])
        block = min(64, power_of_two(width))
        sums = dict(
            coarse=call.empty(call.rows, width), fine=call.empty(call.rows, width)
        )
        grid = (call.chunks, triton.cdiv(width, block))
        call.run(sum_decays, grid, _SMALL, width=width, BLOCK=block, **sums)
        call.arguments.update(sums)
    if call.decay == "channel":
        _decay_rows(call, inputs.key)
    shape = (call.chunks, call.heads, call.parts, CHUNK_SIZE, CHUNK_SIZE)
    attention = call.empty(*shape, dtype=call.narrow)
    pairs = call.empty(*shape[:2], *shape[3:]) if call.delta else None
    grid = (call.chunks * call.heads,)
    squares = dict(attention=attention, pairs=pairs, ATTENTION=True)
    call.run(pair_rows, grid, call.config.pairs, **squares)
    call.arguments["attention"] = attention
    if call.delta:
        inverse = call.empty(*shape, dtype=call.narrow)
        solve = dict(pairs=pairs, inverse=inverse, PRECISION=call.config.exact)
        call.run(solve_pairs, grid, call.config.solve, **solve)
        call.arguments["inverse"] = inverse


def _decay_rows(call, key):
    """What meets the state, in place of queries and keys."""
    _, _, heads, key_dim = key.shape
    names = ["reading_query", "reading_key", "ending_key"]
    if call.parts == 2:
        names.append("ending_rest")
    rows = {name: torch.empty_like(key, dtype=call.narrow) for name in names}
    channels = call.empty(call.chunks, heads, key_dim)
    launch = call.config.levels
    grid = (triton.cdiv(key_dim, launch.block_k) * heads * call.chunks,)
    call.run(decay_rows, grid, launch, channels=channels, **rows)
    call.arguments.update(rows, channels=channels)


_SMALL = Launch(0, 0, 4, 1)


def _scan(call, launch, value_dim, **outputs):
    """Launches `scan_chunks`; `outputs` are what it writes."""
    blocks = triton.cdiv(value_dim, launch.block_v)
    targets = dict.fromkeys(("output", "final", "states", "writes")) | outputs
    grid = (blocks * call.heads * call.segments,)
    flags = {name.upper(): name in outputs for name in ("output", "states", "final")}
    call.run(scan_chunks, grid, launch, **flags, IDENTITY=False, **targets)


def _use_splits(call, splits, final=None):
    """From here on splits are scanned, each from the state before it."""
    before = states_before(call, splits, call.arguments["initial"], final)
    call.segments = splits.rows * splits.count
    call.arguments.update(splits.arguments(), initial=before, INITIAL=True)


def forward(inputs, write, erase_before_decay, scale, chunk_rows):
    """Output and final state."""
    call = Call(inputs, write, erase_before_decay, scale, chunk_rows)
    # Packed rows behind the last sequence are in no chunk.
    new = torch.empty_like if inputs.cu_seqlens is None else torch.zeros_like
    output, final = new(inputs.value), call.empty(*state_shape(inputs))
    _prepare(call, inputs)
    value_dim, splits = inputs.value.shape[-1], make_splits(call)
    if splits is None:
        _scan(call, call.config.scan, value_dim, output=output, final=final)
    else:
        _use_splits(call, splits, final)
        _scan(call, call.config.scan, value_dim, output=output)
    return output, final


def backward(
    inputs, output_grad, final_grad, write, erase_before_decay, scale, chunk_rows
):
    """Gradients of query, key, value, log decay, beta and initial state, if given."""
    call = Call(inputs, write, erase_before_decay, scale, chunk_rows)
    config, arguments = call.config, call.arguments
    new = torch.empty_like if inputs.cu_seqlens is None else torch.zeros_like
    key_dim, value_dim = inputs.key.shape[-1], inputs.value.shape[-1]
    shape = (call.chunks, call.heads, key_dim, value_dim)
    initial_grad = None
    if inputs.initial_state is not None:
        initial_grad = torch.empty_like(inputs.initial_state)

    # 1. The states before each chunk and what the rows wrote, as in the forward pass.
    _prepare(call, inputs)
    # What correlated keys write is taken in two operands there.
    wide = torch.float32 if call.decay == "channel" else call.narrow
    arguments.update(
        output_grad=output_grad,
        final_grad=final_grad,
        initial_grad=initial_grad,
        states=call.empty(*shape, dtype=call.narrow),
        state_grads=call.empty(*shape, dtype=call.narrow),
        writes=torch.empty_like(inputs.value, dtype=wide),
        write_grads=new(inputs.value),
    )
    splits = make_splits(call)
    if splits is not None:
        behind = gradients_behind(call, splits, final_grad, initial_grad)
        arguments.update(final_grad=behind, initial_grad=None)
        _use_splits(call, splits)
    outputs = {name: arguments[name] for name in ("states", "writes")}
    _scan(call, config.states, value_dim, **outputs)

    # 2. The gradients of the states behind each chunk, and of the writes.
    blocks = triton.cdiv(value_dim, config.reverse.block_v)
    grid = (blocks * call.heads * call.segments,)
    flags = dict(INITIAL=arguments["initial_grad"] is not None, STATES=True, FINAL=True)
    call.run(scan_gradients, grid, config.reverse, **flags)
    del arguments["attention"], arguments["inverse"]

    # 3. Everything else, all chunks at once.
    row_blocks = triton.cdiv(key_dim, config.gradients.block_k)
    grid = (row_blocks * call.heads * call.chunks,)
    blocks, levels = row_blocks, 0
    if call.decay != "channel":
        blocks = triton.cdiv(key_dim, config.solve_gradients.block_k)
    log_decay, beta = inputs.log_decay, inputs.beta
    arguments.update(
        query_grad=new(inputs.query),
        key_grad=new(inputs.key),
        log_decay_grad=None if log_decay is None else new(log_decay),
        beta_grad=None if beta is None else new(beta),
        row_partials=call.empty(3, row_blocks, call.rows, call.heads),
        partials=call.empty(3, blocks, call.rows, call.heads),
    )
    arguments["level_partials"] = None
    if call.decay == "channel":
        planes = 1 + call.parts
        shape = (call.chunks, call.heads, planes, CHUNK_SIZE, CHUNK_SIZE)
        arguments["squares"] = call.empty(*shape, dtype=call.narrow)
        call.run(square_gradients, (call.chunks * call.heads,), config.gradients)
        call.run(crossing_gradients, grid, config.gradients)
        levels = triton.cdiv(key_dim, config.levels.block_k)
        arguments["level_partials"] = call.empty(levels, call.rows, call.heads)
        grid = (levels * call.heads * call.chunks,)
        call.run(level_gradients, grid, config.levels)
    else:
        squares = call.empty(*grid, CHUNK_SIZE, CHUNK_SIZE, dtype=call.narrow)
        call.run(row_gradients, grid, config.gradients, squares=squares)
        if call.delta or beta is not None:
            grid = (blocks * call.heads * call.chunks,)
            call.run(solve_gradients, grid, config.solve_gradients, squares=squares)
    if beta is not None or call.decay == "head":
        block = min(32, power_of_two(call.heads))
        grid = (call.chunks, triton.cdiv(call.heads, block))
        sums = dict(BLOCK=block, ROW_BLOCKS=row_blocks, BLOCKS=blocks, LEVELS=levels)
        call.run(sum_partials, grid, _SMALL, **sums)
    if beta is not None and blocks > 1:
        arguments["write_grads"] *= beta[..., None]
    names = ("query_grad", "key_grad", "write_grads", "log_decay_grad", "beta_grad")
    gradients = [*(arguments[name] for name in names), initial_grad]
    return [gradient for gradient in gradients if gradient is not None]
