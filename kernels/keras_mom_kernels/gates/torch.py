"""The gates of the gated delta rule on torch, one Triton kernel a direction.

    from keras_mom_kernels.gates.torch import decay_and_write_strength

Runs on NVIDIA GPUs from sm_80 on, and on AMD; on a CPU with `TRITON_INTERPRET=1`.
Nothing is read back to the host.
"""

import torch
import triton

from keras_mom_kernels.gates import triton_gates
from keras_mom_kernels.memory_scan.torch import check_device
from keras_mom_kernels.memory_scan.torch_launches import launch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements of a tile, and the tiles of a program of the backward pass.
_TILE = 1024
_STEPS = 4


def decay_and_write_strength(
    decay: torch.Tensor,
    write_strength: torch.Tensor,
    dt_bias: torch.Tensor,
    a_log: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`-exp(a_log) * softplus(decay + dt_bias)` and `sigmoid(write_strength)`.

    Differentiable in all inputs, once. Where the gradient of a result is 0, so are
    those of its inputs, whatever they hold.

    Source: arXiv 2412.06464.

    Args:
        decay, write_strength: float32, bfloat16 or float16 `[..., H]`.
        dt_bias, a_log: float32 `[H]`.

    Returns:
        Log decay and write strength, float32 `[..., H]`.

    Raises:
        NotImplementedError: if the kernels cannot serve the call, with the reason.
    """
    check_device(decay)
    for name, x in (("decay", decay), ("write_strength", write_strength)):
        if x.dtype not in _DTYPES:
            raise NotImplementedError(f"no Triton kernel for {name} of {x.dtype}")
    for name, x in (("dt_bias", dt_bias), ("a_log", a_log)):
        if x.dtype != torch.float32:
            raise NotImplementedError(f"{name} is float32, not {x.dtype}")
    if decay.shape[-1] > _TILE:
        raise NotImplementedError(
            f"the Triton kernels take up to {_TILE} heads, not {decay.shape[-1]}"
        )
    tensors = (decay, write_strength, dt_bias, a_log)
    return _forward(*[x.contiguous() for x in tensors])


def launch_of(heads):
    """Sizes of a tile of H heads."""
    block = triton.next_power_of_2(heads)
    return dict(H=heads, ROWS=max(1, _TILE // block), BLOCK_H=block)


@torch.library.custom_op("keras_mom_kernels::decay_and_write_strength", mutates_args=())
def _forward(
    decay: torch.Tensor,
    write_strength: torch.Tensor,
    dt_bias: torch.Tensor,
    a_log: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    log_decay, beta = _empty(decay, write_strength, dt_bias, a_log)
    if decay.numel():
        heads = decay.shape[-1]
        rows, blocks = decay.numel() // heads, launch_of(heads)
        tensors = (decay, write_strength, dt_bias, a_log, log_decay, beta)
        programs = triton.cdiv(rows, blocks["ROWS"])
        launch(triton_gates.gates, (programs,), *tensors, rows, **blocks)
    return log_decay, beta


@_forward.register_fake
def _empty(decay, write_strength, dt_bias, a_log):
    return (
        decay.new_empty(decay.shape, dtype=torch.float32),
        decay.new_empty(decay.shape, dtype=torch.float32),
    )


@torch.library.custom_op(
    "keras_mom_kernels::decay_and_write_strength_backward", mutates_args=()
)
def _backward(
    log_decay_grad: torch.Tensor,
    beta_grad: torch.Tensor,
    decay: torch.Tensor,
    write_strength: torch.Tensor,
    dt_bias: torch.Tensor,
    a_log: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of decay and write strength, and `[2, H]` of dt_bias and a_log."""
    heads = decay.shape[-1]
    rows, blocks = decay.numel() // max(heads, 1), launch_of(heads)
    programs = triton.cdiv(rows, blocks["ROWS"] * _STEPS)
    grads = torch.empty_like(decay), torch.empty_like(write_strength)
    partials = dt_bias.new_empty((programs, 2, heads))
    if programs:
        launch(
            triton_gates.gate_gradients,
            (programs,),
            log_decay_grad,
            beta_grad,
            decay,
            write_strength,
            dt_bias,
            a_log,
            *grads,
            partials,
            rows,
            **blocks,
            STEPS=_STEPS,
        )
    return *grads, partials.sum(0)


@_backward.register_fake
def _(log_decay_grad, beta_grad, decay, write_strength, dt_bias, a_log):
    shared = dt_bias.new_empty((2, dt_bias.shape[0]))
    return torch.empty_like(decay), torch.empty_like(write_strength), shared


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx, log_decay_grad, beta_grad):
    grads = log_decay_grad.contiguous(), beta_grad.contiguous()
    decay, write_strength, shared = _backward(*grads, *ctx.saved_tensors)
    return decay, write_strength, shared[0], shared[1]


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
