"""The memory mixing on torch through Triton kernels.

    from keras_mom_kernels.memory_mixing.torch import memory_mixing, output_norm

Runs on NVIDIA GPUs from sm_80 on, and on AMD; on a CPU with `TRITON_INTERPRET=1`.
Nothing is read back to the host. Each input is read once and each result written once
in either direction. The backward pass keeps the inputs alone. Results are the
same in each run: no kernel uses atomics.
"""

from typing import NamedTuple

import torch
import triton

from keras_mom_kernels.memory_mixing.triton_mixing import clear_rows, mix, mix_gradients
from keras_mom_kernels.memory_scan.configurations import power_of_two
from keras_mom_kernels.memory_scan.torch import new_enough
from keras_mom_kernels.memory_scan.torch_launches import on
from keras_mom_kernels.memory_scan.triton_common import INTERPRETED

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def memory_mixing(
    outputs: torch.Tensor,
    weights: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    epsilon: float = 1e-6,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Mixes what a token's memories answer; normalizes and gates the sum.

    With the packed row `r_tj` of token t in its j-th memory:

        mixed_t  = sum_j w_tj outputs[r_tj]
        result_t = mixed_t / sqrt(mean(mixed_t^2) + epsilon) * scale * silu(gate_t)

    The mean is that of each head's V channels. Differentiable in outputs, weights,
    scale and gate. Packed rows of no token are not read, nor are weights and gate of
    tokens without a row; these give zeros.

    Source: arXiv 2502.13685.

    Args:
        outputs: float32, bfloat16 or float16 `[B, R, H, V]`, what packed rows read;
            V up to 1024.
        weights: float32 `[B, T, k]`.
        targets: int32 `[B, T, J]`, the packed row of each of a token's memories, -1
            for none. J is k, or k + 1 if the last is a shared memory's, of weight 1.
            A packed row is the target of one token's memory at most; that is not
            checked.
        scale: float `[V]`.
        gate: float `[B, T, H * V]`, or None for no gate.
        epsilon: keeps a sum of zeros finite.
        dtype: of the result, float32, bfloat16 or float16.

    Returns:
        `[B, T, H * V]`.

    Raises:
        NotImplementedError: if the kernels cannot serve the call, with the reason.
    """
    check_served(outputs, weights, targets, gate, dtype)
    tensors = (outputs, weights, targets, scale, gate)
    tensors = (None if x is None else x.contiguous() for x in tensors)
    return _forward(*tensors, float(epsilon), dtype)


def output_norm(
    mixed: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    epsilon: float = 1e-6,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalizes and gates what tokens have read: `memory_mixing` without the sum.

    Args:
        mixed: float32, bfloat16 or float16 `[B, T, H, V]`, V up to 1024.
        scale, gate, epsilon, dtype: those of `memory_mixing`.

    Returns:
        `[B, T, H * V]`.

    Raises:
        NotImplementedError: if the kernels cannot serve the call, with the reason.
    """
    batch, length, heads, width = mixed.shape
    tokens = batch * length
    # Each token has a batch row of its own, with one packed row.
    targets = mixed.new_zeros((tokens, 1, 1), dtype=torch.int32)
    weights = mixed.new_empty((tokens, 1, 0), dtype=torch.float32)
    rows = mixed.reshape(tokens, 1, heads, width)
    if gate is not None:
        gate = gate.reshape(tokens, 1, heads * width)
    result = memory_mixing(
        rows, weights, targets, scale, gate, epsilon=epsilon, dtype=dtype
    )
    return result.reshape(batch, length, heads * width)


def check_served(outputs, weights, targets, gate, dtype):
    """Raises `NotImplementedError`, with the reason, for calls without a kernel."""
    kind = outputs.device.type
    if kind not in ("cuda", "meta") and not INTERPRETED.value:
        raise NotImplementedError(
            f"the Triton kernels need a GPU; the tensors are on {kind!r}"
        )
    if kind == "cuda" and not new_enough(outputs.device.index):
        raise NotImplementedError("the Triton kernels need sm_80 or later")
    dtypes = [outputs.dtype, dtype] + ([] if gate is None else [gate.dtype])
    if not set(DTYPES.values()).issuperset(dtypes):
        raise NotImplementedError(f"no Triton kernel for {dtypes}")
    if weights.dtype != torch.float32:
        raise NotImplementedError(f"weights are float32, not {weights.dtype}")
    if not 0 <= targets.shape[2] - weights.shape[2] <= 1:
        raise NotImplementedError(
            f"no Triton kernel for {weights.shape[2]} weights and {targets.shape[2]} "
            "rows a token"
        )
    _, rows, heads, width = outputs.shape
    if width > 1024:
        raise NotImplementedError(
            f"the Triton kernels take value channels up to 1024, not {width}"
        )
    if max(rows, targets.shape[1]) * heads * width >= 2**31:
        raise NotImplementedError("a batch row has 2^31 elements or more")


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        tokens: tokens of a tile.
        heads: heads of a tile.
        block: channels of a tile.
        steps: tiles that a program takes, one after the other.
        warps: warps of a program.
    """

    tokens: int
    heads: int
    block: int
    steps: int
    warps: int


def launch_of(heads, width, slots, gradients):
    """`Launch` for H, V and J, of the backward pass with `gradients`.

    A thread holds 8 or 16 elements of a tile, which is 16 bytes or more a load, and
    fewer with many rows a token, which the backward pass keeps in registers.
    """
    size = 1024 if gradients else 2048
    if slots > 4:
        size //= 2
    block = power_of_two(width)
    heads = min(triton.next_power_of_2(heads), max(1, size // block))
    tokens = max(1, size // (block * heads))
    return Launch(tokens, heads, block, 8 if gradients else 1, 4)


def _constants(launch, outputs, weights, targets, gate):
    """The constant arguments that both kernels take."""
    return dict(
        H=outputs.shape[2],
        V=outputs.shape[3],
        WEIGHTED=weights.shape[2],
        SLOTS=targets.shape[2],
        GATED=gate is not None,
        TOKENS=launch.tokens,
        HEADS=launch.heads,
        BLOCK_V=launch.block,
        num_warps=launch.warps,
    )


def _run(kernel, programs, *arguments, **known):
    with on(arguments[0].device):
        kernel[(programs,)](*arguments, **known)


@torch.library.custom_op("keras_mom_kernels::memory_mixing", mutates_args=())
def _forward(
    outputs: torch.Tensor,
    weights: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor | None,
    epsilon: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    batch, tokens, _ = targets.shape
    _, rows, heads, width = outputs.shape
    result = outputs.new_empty((batch, tokens, heads * width), dtype=dtype)
    if not result.numel():
        return result
    launch = launch_of(heads, width, targets.shape[2], gradients=False)
    known = _constants(launch, outputs, weights, targets, gate)
    programs = batch * triton.cdiv(tokens, launch.tokens)
    tensors = (outputs, weights, targets, scale, gate, result)
    _run(mix, programs, *tensors, tokens, rows, epsilon, **known)
    return result


@_forward.register_fake
def _(outputs, weights, targets, scale, gate, epsilon, dtype):
    shape = (*targets.shape[:2], outputs.shape[2] * outputs.shape[3])
    return outputs.new_empty(shape, dtype=dtype)


@torch.library.custom_op("keras_mom_kernels::memory_mixing_backward", mutates_args=())
def _backward(
    output_grad: torch.Tensor,
    outputs: torch.Tensor,
    weights: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor | None,
    epsilon: float,
) -> list[torch.Tensor]:
    """Gradients of outputs, weights, scale and gate, if given."""
    batch, tokens, slots = targets.shape
    _, rows, heads, width = outputs.shape
    outputs_grad = torch.empty_like(outputs)
    weights_grad = torch.empty_like(weights)
    gate_grad = None if gate is None else torch.empty_like(gate)
    launch = launch_of(heads, width, slots, gradients=True)
    known = _constants(launch, outputs, weights, targets, gate)
    programs = batch * triton.cdiv(tokens, launch.tokens * launch.steps)
    partials = outputs.new_empty((programs, width), dtype=torch.float32)
    # Packed rows without a token become zero behind the others: zeros under them all
    # would be written to memory twice.
    written = outputs.new_zeros((batch, rows), dtype=torch.uint8)
    if output_grad.numel():
        tensors = (output_grad, outputs, weights, targets, scale, gate)
        grads = (outputs_grad, weights_grad, gate_grad, partials, written)
        blocks = dict(STEPS=launch.steps, BLOCK_SLOTS=triton.next_power_of_2(slots))
        arguments = (*tensors, *grads, tokens, rows, epsilon)
        _run(mix_gradients, programs, *arguments, **blocks, **known)
    if outputs_grad.numel():
        blocks = dict(WIDTH=heads * width, ROWS=32, BLOCK=128, num_warps=4)
        programs = triton.cdiv(batch * rows, 32)
        _run(clear_rows, programs, outputs_grad, written, batch * rows, **blocks)
    scale_grad = partials.sum(0).to(scale.dtype)
    gradients = [outputs_grad, weights_grad, scale_grad]
    return gradients if gate_grad is None else [*gradients, gate_grad]


@_backward.register_fake
def _(output_grad, outputs, weights, targets, scale, gate, epsilon):
    differentiable = (outputs, weights, scale, gate)
    return [torch.empty_like(x) for x in differentiable if x is not None]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.epsilon = inputs[5]


def _autograd_backward(ctx, output_grad):
    tensors = ctx.saved_tensors
    gradients = _backward(output_grad.contiguous(), *tensors, ctx.epsilon)
    outputs, weights, scale, *gate = gradients
    return outputs, weights, None, scale, gate[0] if gate else None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
