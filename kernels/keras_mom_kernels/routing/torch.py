"""Routing and its statistics on torch through Triton kernels.

    from keras_mom_kernels.routing.torch import project_and_route, routing_statistics

Runs on NVIDIA GPUs from sm_80 on, and on AMD; on a CPU with `TRITON_INTERPRET=1`.
Nothing is read back to the host.
"""

from typing import NamedTuple

import torch
import triton

from keras_mom_kernels.memory_scan.triton_common import INTERPRETED
from keras_mom_kernels.routing import (
    torch_projection,
    torch_statistics,
    triton_routing,
)
from keras_mom_kernels.routing.torch_projection import (
    MOST_PROJECTED,
    logits_gradient,
    run,
)


def route(
    logits: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities of the memories, and each token's `top_k` most probable ones.

    Ties go to the lowest index. A token whose logits are not numbers goes to the first
    `top_k` memories, with weights that are not numbers. Differentiable through
    probabilities and weights.

    Source: arXiv 2502.13685, section 3.1.

    Args:
        logits: float32 `[B, T, M]`, M up to 1024.
        top_k: k, 1 to M.

    Returns:
        `softmax(logits)`, float32 `[B, T, M]`; weights, float32 `[B, T, k]`, which sum
        to 1; memory indices, int32 `[B, T, k]`, most probable first.

    Raises:
        NotImplementedError: if the kernels cannot serve the call, with the reason.
    """
    _check_served(logits, "logits")
    probabilities, weights, indices = _forward(logits.contiguous(), top_k)
    return probabilities, weights, indices


def project_and_route(
    inputs: torch.Tensor, kernel: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route` for the logits `inputs @ kernel`, which are float32.

    A token's results do not depend on how many there are. Differentiable in inputs
    and kernel through probabilities and weights.

    Source: arXiv 2502.13685, section 3.1.

    Args:
        inputs: float32, bfloat16 or float16 `[B, T, D]`.
        kernel: float32 `[D, M]`, M up to 16.
        top_k: k, 1 to M.

    Returns:
        As `route`.

    Raises:
        NotImplementedError: if the kernels cannot serve the call, with the reason.
    """
    _check_served(kernel, "kernels")
    if inputs.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise NotImplementedError(f"no Triton kernel for {inputs.dtype}")
    if kernel.shape[1] > MOST_PROJECTED:
        raise NotImplementedError(
            f"the Triton kernels project to up to {MOST_PROJECTED} memories, not "
            f"{kernel.shape[1]}"
        )
    found = torch_projection.route(inputs.contiguous(), kernel.contiguous(), top_k)
    return found[0], found[1], found[2]


class RoutingStatistics(NamedTuple):
    """How a batch was routed; masked tokens do not count.

    Attributes:
        share: float32 `[M]`, the share of all routed tokens in each memory; sums to 1.
        entropy: float32 `[]`, mean entropy of the probabilities, in nats.
        balance_loss: float32 `[]`, `M * sum_m f_m P_m / k` with `f_m` the fraction of
            tokens routed to m and `P_m` its mean probability: 1 if perfectly even.
    """

    share: torch.Tensor
    entropy: torch.Tensor
    balance_loss: torch.Tensor


def routing_statistics(
    probabilities: torch.Tensor,
    indices: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> RoutingStatistics:
    """Computes `RoutingStatistics`. Entropy and balance loss are differentiable.

    The balance loss is that of the Switch Transformer (arXiv 2101.03961, equation 4).

    Args:
        probabilities: float32 `[B, T, M]`, M up to 1024.
        indices: int32 `[B, T, k]`.
        mask: bool `[B, T]`, False at tokens that do not count, or None. Such tokens
            may hold anything.

    Raises:
        NotImplementedError: if the kernels cannot serve the call, with the reason.
    """
    _check_served(probabilities, "probabilities")
    found = torch_statistics.statistics(
        probabilities.contiguous(),
        indices.to(torch.int32).contiguous(),
        None if mask is None else mask.contiguous(),
    )
    return RoutingStatistics(*found[:3])


def _check_served(x, name):
    """Raises `NotImplementedError`, with the reason, for calls without a kernel."""
    kind = x.device.type
    if kind not in ("cuda", "meta") and not INTERPRETED.value:
        raise NotImplementedError(
            f"the Triton kernels need a GPU; the tensors are on {kind!r}"
        )
    if x.dtype != torch.float32:
        raise NotImplementedError(f"{name} are float32, not {x.dtype}")
    if x.shape[-1] > 1024:
        raise NotImplementedError(
            f"the Triton kernels take up to 1024 memories, not {x.shape[-1]}"
        )


@torch.library.custom_op("keras_mom_kernels::route", mutates_args=())
def _forward(
    logits: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    probabilities, weights, indices = _empty(logits, top_k)
    tensors = (logits, probabilities, weights, indices)
    block = triton.next_power_of_2(top_k)
    run(triton_routing.route, tensors, top_k, BLOCK_K=block)
    return probabilities, weights, indices


def _empty(logits, top_k):
    shape = (*logits.shape[:-1], top_k)
    weights = logits.new_empty(shape)
    indices = logits.new_empty(shape, dtype=torch.int32)
    return torch.empty_like(logits), weights, indices


_forward.register_fake(_empty)


def _setup_context(ctx, inputs, output):
    probabilities, _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(probabilities, indices)


def _autograd_backward(ctx, probabilities_grad, weights_grad, _):
    grads = probabilities_grad.contiguous(), weights_grad.contiguous()
    return logits_gradient(*grads, *ctx.saved_tensors), None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
