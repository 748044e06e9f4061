"""The launches of the Triton kernels of a single token."""

import torch

from keras_mom_kernels.memory_scan.configurations import power_of_two
from keras_mom_kernels.memory_scan.torch_launches import on
from keras_mom_kernels.memory_step.triton_convolution import convolve_token
from keras_mom_kernels.memory_step.triton_routing import spread_choices
from keras_mom_kernels.memory_step.triton_step import step_memories

# Value channels a program takes: 64 programs for 8 heads of 128 channels.
_BLOCK_V = 16


def _run(kernel, programs, device, warps, arguments, constants):
    """Launches a kernel with positional `arguments` and named `constants`."""
    if programs:
        with on(device):
            kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=1)


def step_constants(key_dim, value_dim):
    """Sizes of a program of `step_memories`, and its warps."""
    block_k = power_of_two(key_dim)
    sizes = dict(K=key_dim, V=value_dim, BLOCK_K=block_k, BLOCK_V=_BLOCK_V)
    # 16 elements of a state a thread.
    return sizes, max(1, block_k * _BLOCK_V // 512)


def launch_step(
    tensors, new_state, write, erase_before_decay, read_before_update, scale
):
    """Writes the state behind the token, and returns the mixed output.

    Args:
        tensors: query, key, value, log decay, beta, weights, active and state.
        new_state: what to write; the state itself to leave idle memories alone.
        write, erase_before_decay, read_before_update, scale: as in the operation.
    """
    _, _, value, log_decay, beta, _, _, state = tensors
    output = new_output(value)
    batch, memories, heads, key_dim, value_dim = state.shape
    sizes, warps = step_constants(key_dim, value_dim)
    decay = "none"
    if log_decay is not None:
        decay = "head" if log_decay.ndim == 3 else "channel"
    delta = write == "delta"
    constants = dict(
        sizes,
        DECAY=decay,
        DELTA=delta,
        EXCLUSIVE=erase_before_decay and delta and decay != "none",
        BETA=beta is not None,
        READ_FIRST=read_before_update,
        IN_PLACE=new_state is state,
    )
    programs = batch * heads * -(-value_dim // _BLOCK_V)
    arguments = (*tensors, new_state, output, scale, heads, memories)
    _run(step_memories, programs, state.device, warps, arguments, constants)
    return output


def new_output(value):
    """float32 `[B, H, V]`."""
    batch, _, *shape = value.shape
    return value.new_empty((batch, *shape), dtype=torch.float32)


def convolution_constants(key_dim, value_dim, history):
    """Sizes of a program of `convolve_token`, and its warps."""
    blocks = power_of_two(key_dim), power_of_two(value_dim)
    sizes = dict(
        K=key_dim,
        V=value_dim,
        BLOCK_K=blocks[0],
        BLOCK_V=blocks[1],
        HISTORY=history or 0,
        BLOCK_T=1 << (history or 0).bit_length(),
        CONVOLVED=history is not None,
    )
    # 4 channels a thread, 16 bytes of the window.
    return sizes, max(1, max(blocks) // 128)


def launch_convolution(
    inputs,
    kernels,
    window,
    active,
    silu,
    normalized,
    heads,
    set_of_memory,
    epsilon,
    in_place,
):
    """The rows in every memory, and the window behind the token.

    Args:
        inputs: query, key and value, as in the operation.
        kernels: of the three, each may be None.
        window, active, normalized, heads, set_of_memory, epsilon: as in the operation.
        silu: whether each of the three is activated.
        in_place: whether the window is updated where it lies.
    """
    outputs = new_rows(inputs, None if in_place else window, heads, set_of_memory)
    if in_place:
        outputs = (*outputs[:3], window)
    sizes, warps = convolution_constants(
        outputs[1].shape[-1],
        outputs[2].shape[-1],
        None if window is None else window.shape[2],
    )
    constants = dict(
        sizes,
        SETS=(*set_of_memory, inputs[1].shape[1]),
        QUERY_SILU=silu[0],
        KEY_SILU=silu[1],
        VALUE_SILU=silu[2],
        NORMALIZED_QUERY=normalized[0],
        NORMALIZED_KEY=normalized[1],
        IN_PLACE=in_place,
    )
    programs = active.shape[0] * len(set_of_memory) * 3 * heads
    arguments = (*inputs, *kernels, window, active, *outputs, heads, epsilon)
    _run(convolve_token, programs, active.device, warps, arguments, constants)
    return outputs


def new_rows(inputs, window, heads, set_of_memory):
    """Empty query, key and value rows and window; it is empty where there is none."""
    shape = (inputs[0].shape[0], len(set_of_memory), heads)
    query, key, value = (x.new_empty((*shape, x.shape[-1] // heads)) for x in inputs)
    empty = query.new_empty(0, dtype=torch.float32)
    return query, key, value, empty if window is None else torch.empty_like(window)


def launch_spread(weights, indices, mask, num_memories, shared):
    """Weights and memories that take the token, as `spread_routing` returns them."""
    memories = num_memories + shared
    outputs = spread, active = new_routing(weights, memories)
    constants = dict(
        MEMORIES=memories,
        BLOCK=power_of_two(memories),
        SHARED=shared,
        MASKED=mask is not None,
    )
    batch, choices = indices.shape
    arguments = (weights, indices, mask, spread, active.view(torch.uint8), choices)
    _run(spread_choices, batch, weights.device, 1, arguments, constants)
    return outputs


def new_routing(weights, memories):
    """Empty weights and active memories, `[B, M]`."""
    shape = (weights.shape[0], memories)
    spread = weights.new_empty(shape, dtype=torch.float32)
    return spread, weights.new_empty(shape, dtype=torch.bool)
