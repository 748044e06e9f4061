"""The memory scan on torch through Triton kernels.

    from keras_mom_kernels.memory_scan.torch import memory_scan

Runs on NVIDIA GPUs from sm_80 on, and on AMD; on a CPU with `TRITON_INTERPRET=1`.
Nothing is read back to the host. Two custom operators with fakes and a gradient stand
for it in `torch.compile`. The backward pass keeps the inputs alone and computes the
rest again. Results are the same in each run: no kernel uses atomics. A row's do not
depend on what else is in the batch, except that a few long sequences are cut into
splits, which changes the last digits: whether they are follows from T, the heads and
the number of sequences.
"""

import torch

from keras_mom_kernels.memory_scan.configurations import CHUNK_SIZE
from keras_mom_kernels.memory_scan.torch_launches import (
    Inputs,
    backward,
    forward,
    on,
    state_shape,
)
from keras_mom_kernels.memory_scan.triton_common import INTERPRETED


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
    tensors = Inputs(
        query,
        key,
        value,
        log_decay,
        beta,
        None if cu_seqlens is None else cu_seqlens.to(torch.int32),
        chunk_offsets,
        resets,
        initial_state,
    )
    return _forward(
        *(None if x is None else x.contiguous() for x in tensors),
        write,
        erase_before_decay,
        key.shape[-1] ** -0.5 if scale is None else float(scale),
        CHUNK_SIZE if chunk_offsets is None else chunk_size,
    )


def check_served(query, key, value, decay_axis, log_decay):
    """Raises `NotImplementedError`, with the reason, for calls without a kernel."""
    check_device(query)
    if decay_axis == "value" and log_decay is not None:
        raise NotImplementedError("no Triton kernel has a decay of value channels")
    if max(key.shape[-1], value.shape[-1]) > 256:
        raise NotImplementedError(
            "the Triton kernels take key and value channels up to 256, not "
            f"{key.shape[-1]} and {value.shape[-1]}"
        )
    dtypes = (query.dtype, key.dtype, value.dtype)
    if not {torch.float32, torch.bfloat16, torch.float16}.issuperset(dtypes):
        raise NotImplementedError(
            f"no Triton kernel for {query.dtype}, {key.dtype} and {value.dtype}"
        )


def check_device(tensor):
    """Raises `NotImplementedError`, with the reason, where no Triton kernel runs."""
    device = tensor.device
    if device.type not in ("cuda", "meta") and not INTERPRETED.value:
        raise NotImplementedError(
            f"the Triton kernels need a GPU; the tensors are on {device.type!r}"
        )
    if device.type == "cuda" and not new_enough(device.index):
        raise NotImplementedError("the Triton kernels need sm_80 or later")


@torch.compiler.assume_constant_result
def new_enough(index):
    """Whether the Triton kernels run on the GPU of this index."""
    if torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(index) >= (8, 0)


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
    with on(key.device):
        inputs = Inputs(
            query,
            key,
            value,
            log_decay,
            beta,
            cu_seqlens,
            chunk_offsets,
            resets,
            initial_state,
        )
        return forward(inputs, write, erase_before_decay, scale, chunk_size)


@_forward.register_fake
def _(*arguments):
    inputs = Inputs(*arguments[: len(Inputs._fields)])
    state = inputs.value.new_empty(state_shape(inputs), dtype=torch.float32)
    return torch.empty_like(inputs.value), state


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
    with on(key.device):
        inputs = Inputs(
            query,
            key,
            value,
            log_decay,
            beta,
            cu_seqlens,
            chunk_offsets,
            resets,
            initial_state,
        )
        options = (write, erase_before_decay, scale, chunk_size)
        return backward(inputs, output_grad, final_grad, *options)


@_backward.register_fake
def _(output_grad, final_grad, *arguments):
    inputs = Inputs(*arguments[: len(Inputs._fields)])
    return [
        torch.empty_like(x)
        for name, x in zip(Inputs._fields, inputs)
        if x is not None and name in _DIFFERENTIABLE
    ]


_DIFFERENTIABLE = ("query", "key", "value", "log_decay", "beta", "initial_state")


def _setup_context(ctx, inputs, output):
    count = len(Inputs._fields)
    ctx.save_for_backward(*inputs[:count])
    ctx.options = inputs[count:]


def _autograd_backward(ctx, output_grad, final_grad):
    inputs = Inputs(*ctx.saved_tensors)
    gradients = iter(
        _backward(
            output_grad.contiguous(), final_grad.contiguous(), *inputs, *ctx.options
        )
    )
    differentiable = [
        next(gradients) if x is not None and name in _DIFFERENTIABLE else None
        for name, x in zip(Inputs._fields, inputs)
    ]
    return (*differentiable, *[None] * len(ctx.options))


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
