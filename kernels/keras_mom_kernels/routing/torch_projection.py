"""Routing with its projection on torch, and the gradient of the logits.

Used by `keras_mom_kernels.routing.torch`.
"""

import torch
import triton

from keras_mom_kernels.memory_scan.torch_launches import launch
from keras_mom_kernels.routing import triton_routing

# Memories whose sums a program keeps in registers.
MOST_PROJECTED = 16
# Tokens and channels of a tile; wide ones, as a single token waits for each.
_FORWARD = dict(TOKENS=4, BLOCK_D=256)
_BACKWARD = dict(TOKENS=8, BLOCK_D=128)
# Tiles of a program of the backward pass.
_STEPS = 32


def run(kernel, tensors, top_k, **blocks):
    """Launches a kernel over tokens of `tensors`, the first `[B, T, M]`."""
    batch, length, memories = tensors[0].shape
    block = triton.next_power_of_2(memories)
    tokens, of_program = batch * length, max(1, 512 // block)
    if not tokens:
        return
    blocks |= dict(M=memories, TOP_K=top_k, TOKENS=of_program, BLOCK_M=block)
    launch(kernel, (triton.cdiv(tokens, of_program),), *tensors, tokens, **blocks)


@torch.library.custom_op("keras_mom_kernels::route_backward", mutates_args=())
def logits_gradient(
    probabilities_grad: torch.Tensor,
    weights_grad: torch.Tensor,
    probabilities: torch.Tensor,
    indices: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the logits."""
    logits_grad = torch.empty_like(probabilities)
    grads = (probabilities_grad, weights_grad)
    tensors = (*grads, probabilities, indices, logits_grad)
    run(triton_routing.route_gradients, tensors, indices.shape[-1])
    return logits_grad


@logits_gradient.register_fake
def _(probabilities_grad, weights_grad, probabilities, indices):
    return torch.empty_like(probabilities)


@torch.library.custom_op("keras_mom_kernels::project_and_route", mutates_args=())
def route(
    inputs: torch.Tensor, kernel: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities, weights and indices."""
    found = _empty(inputs, kernel, top_k)
    batch, length, width = inputs.shape
    memories = kernel.shape[1]
    programs = triton.cdiv(batch * length, _FORWARD["TOKENS"])
    if programs:
        sizes = projection_sizes(width, memories, top_k)
        arguments = (inputs, kernel, *found, batch * length)
        launch(triton_routing.route_projected, (programs,), *arguments, **sizes)
    return found


def projection_sizes(width, memories, top_k):
    """Sizes of a tile of `route_projected`."""
    blocks = triton.next_power_of_2(memories), triton.next_power_of_2(top_k)
    sizes = dict(WIDTH=width, M=memories, TOP_K=top_k, **_FORWARD)
    return sizes | dict(BLOCK_M=blocks[0], BLOCK_K=blocks[1])


@route.register_fake
def _empty(inputs, kernel, top_k):
    tokens = inputs.shape[:2]
    return (
        kernel.new_empty((*tokens, kernel.shape[1])),
        kernel.new_empty((*tokens, top_k)),
        kernel.new_empty((*tokens, top_k), dtype=torch.int32),
    )


@torch.library.custom_op(
    "keras_mom_kernels::project_and_route_backward", mutates_args=()
)
def _projection_backward(
    logits_grad: torch.Tensor, inputs: torch.Tensor, kernel: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, width = inputs.shape
    memories = kernel.shape[1]
    programs = triton.cdiv(batch * length, _BACKWARD["TOKENS"] * _STEPS)
    inputs_grad = torch.empty_like(inputs)
    partials = kernel.new_empty((programs, width, memories))
    if programs:
        launch(
            triton_routing.projection_gradients,
            (programs, triton.cdiv(width, _BACKWARD["BLOCK_D"])),
            logits_grad,
            inputs,
            kernel,
            inputs_grad,
            partials,
            batch * length,
            WIDTH=width,
            M=memories,
            STEPS=_STEPS,
            **_BACKWARD,
        )
    return inputs_grad, partials.sum(0)


@_projection_backward.register_fake
def _(logits_grad, inputs, kernel):
    return torch.empty_like(inputs), torch.empty_like(kernel)


def _setup_context(ctx, inputs, output):
    probabilities, _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(probabilities, indices, *inputs[:2])


def _autograd_backward(ctx, probabilities_grad, weights_grad, _):
    probabilities, indices, inputs, kernel = ctx.saved_tensors
    grads = probabilities_grad.contiguous(), weights_grad.contiguous()
    logits_grad = logits_gradient(*grads, probabilities, indices)
    return *_projection_backward(logits_grad, inputs, kernel), None


route.register_autograd(_autograd_backward, setup_context=_setup_context)
