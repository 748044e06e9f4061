"""The memory scan on torch through Triton kernels.

    from keras_mom_kernels.memory_scan.torch import memory_scan

Runs on NVIDIA GPUs from sm_80 on, and on AMD; on a CPU with `TRITON_INTERPRET=1`.
Nothing is read back to the host. Two custom operators with fakes and a gradient stand
for it in `torch.compile`. The backward pass keeps the inputs alone and computes the
rest again. A row's results do not depend on what else is in the batch, and are the
same in each run: no kernel uses atomics.
"""

import contextlib
from typing import NamedTuple

import torch
import triton

from keras_mom_kernels.memory_scan.configurations import (
    CHUNK_SIZE,
    configuration,
    power_of_two,
)
from keras_mom_kernels.memory_scan.triton_backward import (
    row_gradients,
    scan_gradients,
    sum_partials,
)
from keras_mom_kernels.memory_scan.triton_channel_backward import (
    channel_row_gradients,
)
from keras_mom_kernels.memory_scan.triton_common import INTERPRETED
from keras_mom_kernels.memory_scan.triton_forward import (
    pair_rows,
    scan_chunks,
    solve_pairs,
    sum_decays,
)


def memory_scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    log_decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    write: str = "delta",
    erase_before_decay: bool = False,
    decay_axis: str = "key",
    cu_seqlens: torch.Tensor | None = None,
    chunk_offsets: torch.Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    resets: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes sequences into matrix-valued memories and reads them back, row by row.

    Per head, with a state `S` of `[K, V]` in float32 and `g_t = log_decay[t]`:

        S'  = diag(exp(g_t)) S_{t-1}
        r_t = k_t^T S'                  (k_t^T S_{t-1} with `erase_before_decay`)
        S_t = S' + k_t (beta_t (v_t - r_t))^T      (`r_t = 0` for additive writes)
        o_t = scale * q_t^T S_t

    Differentiable in query, key, value, log_decay, beta and initial_state.

    Args:
        query, key: float32, bfloat16 or float16 `[B, T, H, K]`, K up to 256.
        value: `[B, T, H, V]`.
        log_decay: at or below zero, `[B, T, H]` or `[B, T, H, K]`; None for no decay.
        beta: write strength `[B, T, H]`, or None for 1.
        write: `"delta"` or `"additive"`.
        erase_before_decay: whether the delta rule reads the state before its decay.
        decay_axis: `"key"`.
        cu_seqlens: int32 `[S + 1]` with B == 1: sequence s holds the rows
            `cu_seqlens[s]` to `cu_seqlens[s + 1] - 1`; rows behind the last give
            zeros. Its values are not checked.
        chunk_offsets: int32 `[B, S + 1]`: segment s of a batch row holds its chunks
            `chunk_offsets[s]` to `chunk_offsets[s + 1] - 1` of `chunk_size` rows; T is
            a multiple of it, and every chunk belongs to a segment.
        chunk_size: with `chunk_offsets`, a power of two up to 64.
        resets: int32 `[B, T]`, 1 at a row before which the state is emptied, or None;
            not with `cu_seqlens`.
        initial_state: float32 `[B, H, K, V]`; `[S, H, K, V]` with `cu_seqlens`,
            `[B, S, H, K, V]` with `chunk_offsets`. None for zeros.
        scale: factor of the query, `K ** -0.5` by default.

    Returns:
        Output `[B, T, H, V]`, of the dtype of `value`, and the final state, float32,
        shaped as `initial_state`.

    Raises:
        NotImplementedError: if the kernels cannot serve the call, with the reason.
    """
    check_served(query, key, value, decay_axis, log_decay)
    state = initial_state
    return _forward(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        None if log_decay is None else log_decay.contiguous(),
        None if beta is None else beta.contiguous(),
        None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous(),
        None if chunk_offsets is None else chunk_offsets.contiguous(),
        None if resets is None else resets.contiguous(),
        None if state is None else state.contiguous(),
        write,
        erase_before_decay,
        key.shape[-1] ** -0.5 if scale is None else float(scale),
        CHUNK_SIZE if chunk_offsets is None else chunk_size,
    )


def check_served(query, key, value, decay_axis, log_decay):
    """Raises `NotImplementedError`, with the reason, for calls without a kernel."""
    if not (query.is_cuda or INTERPRETED.value):
        raise NotImplementedError(
            f"the Triton kernels need a GPU; the tensors are on {query.device.type!r}"
        )
    if query.is_cuda and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(query.device)
        if capability < (8, 0):
            raise NotImplementedError(
                f"the Triton kernels need sm_80 or later, not sm_{capability[0]}x"
            )
    if decay_axis == "value" and log_decay is not None:
        raise NotImplementedError("no Triton kernel has a decay of value channels")
    if max(key.shape[-1], value.shape[-1]) > 256:
        raise NotImplementedError(
            "the Triton kernels take key and value channels up to 256, not "
            f"{key.shape[-1]} and {value.shape[-1]}"
        )
    dtypes = {torch.float32, torch.bfloat16, torch.float16}
    if not {query.dtype, key.dtype, value.dtype} <= dtypes:
        raise NotImplementedError(
            f"no Triton kernel for {query.dtype}, {key.dtype} and {value.dtype}"
        )


class _Call(NamedTuple):
    """A call's sizes, tables and constants, which both directions need."""

    config: object
    device: object
    rows: int
    all_chunks: int
    all_segments: int
    state_shape: tuple
    sizes: dict
    constants: dict
    tensors: dict

    @property
    def narrow(self):
        """The dtype of what products take."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    @property
    def heads(self):
        return self.sizes["heads"]

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.device)


def _prepare(
    query, key, value, log_decay, beta, cu_seqlens, offsets, resets, initial, write,
    exclusive, chunk_rows,
) -> _Call:  # fmt: skip
    batch, length, heads, key_dim = key.shape
    value_dim = value.shape[-1]
    decay = "none"
    if log_decay is not None:
        decay = "head" if log_decay.ndim == 3 else "channel"
    table = None
    segments, chunks = 1, -(-length // chunk_rows)
    if cu_seqlens is not None:
        segments = cu_seqlens.shape[0] - 1
        chunks = (length + segments * (chunk_rows - 1)) // chunk_rows
        table, offsets = _chunk_table(cu_seqlens, chunks, chunk_rows)
    elif offsets is not None:
        segments = offsets.shape[1] - 1
    if cu_seqlens is None and offsets is not None:
        state_shape = (batch, segments, heads, key_dim, value_dim)
    else:
        state_shape = (batch * segments, heads, key_dim, value_dim)
    counts = None
    if resets is not None:
        short = chunks * chunk_rows - length
        counts = torch.nn.functional.pad(resets.to(torch.int32), (0, short))
        counts = counts.view(batch, chunks, chunk_rows).cumsum(-1, dtype=torch.int32)
        counts = counts.view(batch, -1)[:, :length].contiguous()
    dtypes = {query.dtype, key.dtype, value.dtype}
    name = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32"
    target, capability = "cuda", 90
    if torch.version.hip is not None:
        target = "hip"
    elif key.is_cuda:
        major, minor = torch.cuda.get_device_capability(key.device)
        capability = 10 * major + minor
    config = configuration(key_dim, value_dim, name, decay, target, capability)
    delta = write == "delta"
    constants = dict(
        C=CHUNK_SIZE,
        ROWS=chunk_rows,
        RAGGED=cu_seqlens is not None,
        DECAY=decay,
        DELTA=delta,
        EXCLUSIVE=bool(exclusive) and delta and decay != "none",
        BETA=beta is not None,
        RESETS=resets is not None,
        PRECISION=config.precision,
    )
    sizes = dict(length=length, chunks=chunks, heads=heads)
    return _Call(
        config,
        key.device,
        batch * length,
        batch * chunks,
        batch * segments,
        state_shape,
        sizes,
        constants,
        dict(table=table, offsets=offsets, resets=counts, segments=segments),
    )


def _chunk_table(cu_seqlens, chunks, chunk_rows):
    """The chunks of packed sequences, without reading a length on the host.

    Returns:
        int32 `[chunks, 2]`, first row and rows of each chunk, no rows for those that
        are not needed; int32 `[1, S + 1]`, the first chunk of each sequence.
    """
    needed = (torch.diff(cu_seqlens) + (chunk_rows - 1)) // chunk_rows
    offsets = torch.nn.functional.pad(needed.cumsum(0, dtype=torch.int32), (1, 0))
    chunk = torch.arange(chunks, dtype=torch.int32, device=cu_seqlens.device)
    segment = torch.searchsorted(offsets[1:], chunk, right=True)
    segment = segment.clamp(max=cu_seqlens.shape[0] - 2)
    row = cu_seqlens[segment] + (chunk - offsets[segment]) * chunk_rows
    count = (cu_seqlens[segment + 1] - row).clamp(0, chunk_rows)
    return torch.stack([row, count], dim=1).to(torch.int32), offsets[None]


def _sums(call, log_decay):
    """The running sums of the log decays, in two parts; None without decay."""
    if log_decay is None or call.all_chunks == 0:
        return dict(coarse=None, fine=None)
    width = log_decay.shape[2] * (log_decay.shape[3] if log_decay.ndim == 4 else 1)
    coarse, fine = call.empty(call.rows, width), call.empty(call.rows, width)
    block = min(64, power_of_two(width))
    sum_decays[(call.all_chunks, triton.cdiv(width, block))](
        log_decay,
        coarse,
        fine,
        call.tensors["table"],
        call.sizes["length"],
        call.sizes["chunks"],
        width,
        C=CHUNK_SIZE,
        ROWS=call.constants["ROWS"],
        RAGGED=call.constants["RAGGED"],
        BLOCK=block,
        num_warps=4,
    )
    return dict(coarse=coarse, fine=fine)


def _pairs(call, query, key, beta, sums, attention):
    """The solve of each chunk and, with `attention`, its query-key products."""
    delta = call.constants["DELTA"]
    if not (delta or attention) or call.all_chunks == 0:
        return dict(inverse=None, attention=None)
    parts = 2 if call.config.split else 1
    shape = (call.all_chunks, call.heads, parts, CHUNK_SIZE, CHUNK_SIZE)
    products = call.empty(*shape, dtype=call.narrow) if attention else None
    square = call.empty(*shape[:2], *shape[3:]) if delta else None
    launch = call.config.pairs
    grid = (call.all_chunks * call.heads,)
    pair_rows[grid](
        query,
        key,
        beta,
        resets=call.tensors["resets"],
        table=call.tensors["table"],
        pairs=square,
        attention=products,
        **sums,
        **call.sizes,
        K=key.shape[-1],
        BLOCK_K=launch.block_k,
        PARTS=parts,
        ATTENTION=attention,
        **call.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    inverse = None
    if delta:
        inverse = call.empty(*shape, dtype=call.narrow)
        solve_pairs[grid](
            square,
            inverse,
            C=CHUNK_SIZE,
            PARTS=parts,
            PRECISION=call.config.solve,
            num_warps=1,
        )
    return dict(inverse=inverse, attention=products)


def _scan(call, query, key, value, beta, sums, pairs, initial, scale, **outputs):
    """Launches `scan_chunks`; `outputs` are what it writes."""
    launch = call.config.scan
    blocks = triton.cdiv(value.shape[-1], launch.block_v)
    targets = dict.fromkeys(("output", "final", "states", "writes")) | outputs
    scan_chunks[(blocks * call.heads * call.all_segments,)](
        query,
        key,
        value,
        beta,
        initial=initial,
        **sums,
        **pairs,
        **targets,
        **call.tensors,
        **call.sizes,
        scale=scale,
        K=key.shape[-1],
        V=value.shape[-1],
        BLOCK_K=launch.block_k,
        BLOCK_V=launch.block_v,
        STAGES=launch.stages,
        SEGMENTED=call.tensors["offsets"] is not None,
        INITIAL=initial is not None,
        OUTPUT="output" in outputs,
        PARTS=2 if call.config.split else 1,
        **call.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def _on(device):
    """Context in which kernels are launched on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else _nothing()


_nothing = contextlib.nullcontext


@torch.library.custom_op("keras_mom_kernels::memory_scan", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_offsets: torch.Tensor | None,
    resets: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    write: str,
    erase_before_decay: bool,
    scale: float,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    with _on(key.device):
        call = _prepare(
            query,
            key,
            value,
            log_decay,
            beta,
            cu_seqlens,
            chunk_offsets,
            resets,
            initial_state,
            write,
            erase_before_decay,
            chunk_size,
        )
        # Packed rows behind the last sequence are in no chunk.
        new = torch.empty_like if cu_seqlens is None else torch.zeros_like
        output = new(value)
        final = call.empty(*call.state_shape)
        sums = _sums(call, log_decay)
        pairs = _pairs(call, query, key, beta, sums, True)
        outputs = dict(output=output, final=final)
        _scan(
            call, query, key, value, beta, sums, pairs, initial_state, scale, **outputs
        )
    return output, final


@_forward.register_fake
def _(
    query,
    key,
    value,
    log_decay,
    beta,
    cu_seqlens,
    chunk_offsets,
    resets,
    initial_state,
    write,
    erase_before_decay,
    scale,
    chunk_size,
):
    batch, _, heads, key_dim = key.shape
    shape = (batch, heads, key_dim, value.shape[-1])
    if cu_seqlens is not None:
        shape = (cu_seqlens.shape[0] - 1, *shape[1:])
    elif chunk_offsets is not None:
        shape = (batch, chunk_offsets.shape[1] - 1, *shape[1:])
    return torch.empty_like(value), value.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("keras_mom_kernels::memory_scan_backward", mutates_args=())
def _backward(
    output_grad: torch.Tensor,
    final_grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_offsets: torch.Tensor | None,
    resets: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    write: str,
    erase_before_decay: bool,
    scale: float,
    chunk_size: int,
) -> list[torch.Tensor]:
    with _on(key.device):
        call = _prepare(
            query,
            key,
            value,
            log_decay,
            beta,
            cu_seqlens,
            chunk_offsets,
            resets,
            initial_state,
            write,
            erase_before_decay,
            chunk_size,
        )
        return _gradients(
            call,
            output_grad,
            final_grad,
            query,
            key,
            value,
            log_decay,
            beta,
            initial_state,
            scale,
            cu_seqlens is not None,
        )


def _gradients(
    call, output_grad, final_grad, query, key, value, log_decay, beta, initial, scale,
    ragged,
):  # fmt: skip
    new = torch.zeros_like if ragged else torch.empty_like
    key_dim, value_dim = key.shape[-1], value.shape[-1]
    shape = (call.all_chunks, call.heads, key_dim, value_dim)
    states, state_grads = (call.empty(*shape, dtype=call.narrow) for _ in range(2))
    writes = torch.empty_like(value, dtype=call.narrow)
    value_grad = new(value)
    initial_grad = None if initial is None else torch.empty_like(initial)

    # 1. The states before each chunk and what the rows wrote, as in the forward pass.
    sums = _sums(call, log_decay)
    pairs = _pairs(call, query, key, beta, sums, True)
    _scan(
        call,
        query,
        key,
        value,
        beta,
        sums,
        pairs,
        initial,
        scale,
        states=states,
        writes=writes,
    )

    # 2. The gradients of the states behind each chunk, and of the writes.
    launch = call.config.reverse
    blocks = triton.cdiv(value_dim, launch.block_v)
    scan_gradients[(blocks * call.heads * call.all_segments,)](
        query,
        key,
        beta,
        output_grad=output_grad,
        final_grad=final_grad,
        state_grads=state_grads,
        write_grads=value_grad,
        initial_grad=initial_grad,
        **sums,
        **pairs,
        **call.tensors,
        **call.sizes,
        scale=scale,
        K=key_dim,
        V=value_dim,
        BLOCK_K=launch.block_k,
        BLOCK_V=launch.block_v,
        STAGES=launch.stages,
        SEGMENTED=call.tensors["offsets"] is not None,
        INITIAL=initial is not None,
        PARTS=2 if call.config.split else 1,
        **call.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    del pairs

    # 3. Everything else, all chunks at once.
    launch = call.config.gradients
    blocks = triton.cdiv(key_dim, launch.block_k)
    query_grad, key_grad = new(query), new(key)
    partials = call.empty(5, blocks, call.rows, call.heads)
    channel = call.constants["DECAY"] == "channel"
    decay_grad = None if log_decay is None else new(log_decay)
    beta_grad = None if beta is None else new(beta)
    squares = call.empty(
        call.all_chunks * call.heads * blocks,
        2,
        CHUNK_SIZE,
        CHUNK_SIZE,
        dtype=call.narrow,
    )
    if call.all_chunks:
        kernel, extra = row_gradients, {}
        if channel:
            kernel = channel_row_gradients
            extra = dict(log_decay=log_decay, log_decay_grad=decay_grad)
        kernel[(blocks * call.heads * call.all_chunks,)](
            query,
            key,
            value,
            beta=beta,
            resets=call.tensors["resets"],
            states=states,
            state_grads=state_grads,
            writes=writes,
            write_grads=value_grad,
            output_grad=output_grad,
            query_grad=query_grad,
            key_grad=key_grad,
            partials=partials,
            squares=squares,
            table=call.tensors["table"],
            **sums,
            **call.sizes,
            rows=call.rows,
            scale=scale,
            K=key_dim,
            V=value_dim,
            BLOCK_K=launch.block_k,
            BLOCK_V=launch.block_v,
            **extra,
            **call.constants,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
        _sum_partials(call, partials, log_decay, beta_grad, decay_grad, blocks)
    gradients = [query_grad, key_grad, value_grad]
    if log_decay is not None:
        gradients.append(decay_grad)
    if beta is not None:
        if blocks > 1:
            value_grad *= beta[..., None]
        gradients.append(beta_grad)
    if initial is not None:
        gradients.append(initial_grad)
    return gradients


def _sum_partials(call, partials, log_decay, beta_grad, decay_grad, blocks):
    names = ("C", "ROWS", "RAGGED", "DECAY", "DELTA", "EXCLUSIVE", "BETA")
    if not call.constants["BETA"] and call.constants["DECAY"] != "head":
        return
    block = min(32, power_of_two(call.heads))
    sum_partials[(call.all_chunks, triton.cdiv(call.heads, block))](
        partials,
        log_decay,
        beta_grad,
        decay_grad,
        call.tensors["table"],
        **call.sizes,
        rows=call.rows,
        BLOCK=block,
        BLOCKS=blocks,
        **{name: call.constants[name] for name in names},
        num_warps=4,
    )


def _present(tensors):
    return [x for x in tensors if x is not None]


@_backward.register_fake
def _(
    output_grad,
    final_grad,
    query,
    key,
    value,
    log_decay,
    beta,
    cu_seqlens,
    chunk_offsets,
    resets,
    initial_state,
    write,
    erase_before_decay,
    scale,
    chunk_size,
):
    inputs = _present((query, key, value, log_decay, beta, initial_state))
    return [torch.empty_like(x) for x in inputs]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]
    ctx.like = [(x.shape, x.dtype, x.device) for x in output]
    ctx.set_materialize_grads(True)


def _autograd_backward(ctx, output_grad, final_grad):
    tensors = ctx.saved_tensors
    gradients = iter(
        _backward(
            output_grad.contiguous(), final_grad.contiguous(), *tensors, *ctx.options
        )
    )
    places = (0, 1, 2, 3, 4, 8)
    result = [
        next(gradients) if i in places and x is not None else None
        for i, x in enumerate(tensors)
    ]
    return (*result, *[None] * len(ctx.options))


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
