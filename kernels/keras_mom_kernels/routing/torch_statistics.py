"""Routing statistics on torch through Triton kernels.

Used by `keras_mom_kernels.routing.torch`.
"""

import torch
import triton

from keras_mom_kernels.memory_scan.torch_launches import launch
from keras_mom_kernels.routing import triton_statistics

# Elements of a tile, tokens that one program sums, and the most programs.
_TILE = 2048
_TOKENS = 1024
_PROGRAMS = 128


def launch_of(tokens, memories):
    """Programs, tiles a program, and sizes of a tile, for so many tokens."""
    block = triton.next_power_of_2(memories)
    of_tile = max(1, min(256, _TILE // block))
    programs = min(_PROGRAMS, max(1, triton.cdiv(tokens, max(_TOKENS, of_tile))))
    steps = triton.cdiv(tokens, programs * of_tile)
    return programs, steps, dict(TOKENS=of_tile, BLOCK_M=block)


@torch.library.custom_op("keras_mom_kernels::routing_statistics", mutates_args=())
def statistics(
    probabilities: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Share, mean entropy, balance loss, and the number of tokens, at least 1."""
    batch, length, memories = probabilities.shape
    found = _empty(probabilities, indices, mask)
    tokens, top_k = batch * length, indices.shape[-1]
    programs, steps, blocks = launch_of(tokens, memories)
    partials = None
    if programs > 1:
        partials = probabilities.new_empty((programs, 2 * memories + 2))
    sizes = dict(M=memories, TOP_K=top_k)
    launch(
        triton_statistics.sum_tokens,
        (programs,),
        probabilities,
        indices,
        mask,
        partials,
        *found,
        tokens,
        steps,
        MASKED=mask is not None,
        ALONE=programs == 1,
        **sizes,
        **blocks,
    )
    if programs > 1:
        rows = dict(BLOCK_M=blocks["BLOCK_M"], ROWS=min(16, blocks["TOKENS"]))
        arguments = (partials, *found, programs)
        launch(triton_statistics.add_partials, (1,), *arguments, **sizes, **rows)
    return found


@statistics.register_fake
def _empty(probabilities, indices, mask):
    numbers = [probabilities.new_empty(()) for _ in range(3)]
    return probabilities.new_empty(probabilities.shape[-1:]), *numbers


@torch.library.custom_op(
    "keras_mom_kernels::routing_statistics_backward", mutates_args=()
)
def _backward(
    entropy_grad: torch.Tensor | None,
    loss_grad: torch.Tensor | None,
    probabilities: torch.Tensor,
    mask: torch.Tensor | None,
    share: torch.Tensor,
    tokens_counted: torch.Tensor,
) -> torch.Tensor:
    batch, length, memories = probabilities.shape
    grad = torch.empty_like(probabilities)
    _, _, blocks = launch_of(batch * length, memories)
    programs = triton.cdiv(batch * length, blocks["TOKENS"])
    if programs:
        launch(
            triton_statistics.statistics_gradients,
            (programs,),
            probabilities,
            entropy_grad,
            loss_grad,
            mask,
            share,
            tokens_counted,
            grad,
            batch * length,
            MASKED=mask is not None,
            ENTROPY=entropy_grad is not None,
            LOSS=loss_grad is not None,
            M=memories,
            **blocks,
        )
    return grad


@_backward.register_fake
def _(entropy_grad, loss_grad, probabilities, mask, share, tokens_counted):
    return torch.empty_like(probabilities)


def _setup_context(ctx, inputs, output):
    probabilities, _, mask = inputs
    share, _, _, tokens_counted = output
    ctx.mark_non_differentiable(share, tokens_counted)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(probabilities, mask, share, tokens_counted)


def _autograd_backward(ctx, _, entropy_grad, loss_grad, __):
    return _backward(entropy_grad, loss_grad, *ctx.saved_tensors), None, None


statistics.register_autograd(_autograd_backward, setup_context=_setup_context)
