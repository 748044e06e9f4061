"""The short convolution of one token, in every memory, on JAX.

A Pallas kernel on GPUs; on a TPU, XLA fuses the plain sums, whose gradient the kernel
has too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from keras_mom_kernels.jax_partitioning import by_shards
from keras_mom_kernels.memory_scan.jax import check_served
from keras_mom_kernels.memory_scan.jax import platform as current_platform
from keras_mom_kernels.memory_step.pallas_convolution import convolve_token


class Plan(NamedTuple):
    """What does not change from call to call.

    Attributes:
        silu, normalized: of query, key and value.
        set_of_memory: the projection set of each memory.
        epsilon: of the normalization.
    """

    silu: tuple[bool, ...]
    normalized: tuple[bool, ...]
    set_of_memory: tuple[int, ...]
    epsilon: float


def convolution_step(
    query,
    key,
    value,
    kernels,
    window,
    active,
    *,
    activations=("silu", "silu", "silu"),
    normalized=(False, False),
    heads,
    set_of_memory,
    epsilon=1e-6,
    platform=None,
    interpret=False,
):
    """A token's query, key and value in every memory, behind the short convolution.

    Where `window` is not needed behind the call, it is overwritten: in a loop, or if it
    is donated.

    Args:
        query: float32, bfloat16 or float16 `[B, H * K]`, shared by the memories.
        key: `[B, P, H * K]`, by projection set.
        value: `[B, P, H * V]`.
        kernels: of query, key and value, `[W + 1, H * K or H * V]` each; the last row
            meets the token. None for no convolution.
        window: float32 `[B, M, W, H * (2 * K + V)]`: the last inputs that each memory
            took, of query, key and value side by side. None without `kernels`.
        active: bool `[B, M]`: the memories that take the token.
        activations: `"silu"` or None for query, key and value.
        normalized: whether each head of query and key is L2-normalized behind that.
        heads: H.
        set_of_memory: the projection set of each of the M memories.
        epsilon: of the normalization `x / sqrt(sum(x^2) + epsilon)`.
        platform: `"gpu"` or `"tpu"`; None for the one that JAX runs on.
        interpret: whether the kernel runs in Pallas' interpreter, for tests.

    Returns:
        Query, key and value, float32 `[B, M, H, K or V]`, and the window behind the
        token, or None. Memories that do not take the token get zeros, and keep their
        window bit for bit.

    Raises:
        NotImplementedError: if no kernel serves the call, with the reason.
        ValueError: if one of `kernels` and `window` is given without the other.
    """
    platform = current_platform() if platform is None else platform
    rows = [x.reshape(*x.shape[:-1], heads, -1) for x in (query, key, value)]
    check_served(rows[0], rows[1], rows[2], platform)
    if (kernels is None) != (window is None):
        raise ValueError("`kernels` and `window` are given together, or neither is")
    plan = Plan(
        tuple(activation == "silu" for activation in activations),
        (*map(bool, normalized), False),
        tuple(set_of_memory),
        float(epsilon),
    )
    if kernels is not None:
        kernels = [x.reshape(x.shape[0], heads, -1) for x in kernels]
    tensors = (*rows, *(kernels or [None] * 3), window)
    if platform == "tpu":
        return _plain(plan, active, *tensors)
    return _function(plan, interpret)(active, *tensors)


# Axes of what the kernel takes and returns. Heads stay together: the window has those
# of query, key and value side by side.
_AXES = ("batch memories", "batch every key")
_AXES += ("batch sets every key", "batch sets every value")
_AXES += ("batch taps every key",) * 2 + ("batch taps every value",)
_AXES += ("batch memories rows columns",)
_RESULTS = ("batch memories every key",) * 2
_RESULTS += ("batch memories every value", "batch memories rows columns")


@functools.cache
def _function(plan, interpret):
    """The kernel with the gradient of the plain sums."""

    def run(active, query, key, value, *others):
        *kernels, window = others
        active = active.astype(jnp.int32)
        kernels = None if kernels[0] is None else kernels
        return convolve_token(
            plan, interpret, query, key, value, kernels, window, active
        )

    def step(active, *tensors):
        *rows, window = tensors
        # One kernel for all batch rows; shards of a batch have their own.
        copies = tensors[0].shape[0] if jax.device_count() > 1 else 1
        kernels = [
            None if x is None else jnp.broadcast_to(x, (copies, *x.shape))
            for x in rows[3:]
        ]
        results = (*_RESULTS[:3], None if window is None else _RESULTS[3])
        return by_shards(run, _AXES, results)(active, *rows[:3], *kernels, window)

    def forward(*tensors):
        return step(*tensors), tensors

    def backward(tensors, gradients):
        active, *rest = tensors
        _, pull = jax.vjp(functools.partial(_plain, plan, active), *rest)
        return None, *pull(gradients)

    function: Any = jax.custom_vjp(step)
    function.defvjp(forward, backward)
    return function


def _plain(plan, active, query, key, value, *others):
    *kernels, window = others
    sets = jnp.array(plan.set_of_memory)
    rows = [query[:, None], key[:, sets], value[:, sets]]
    new_window, start = [], 0
    for i, x in enumerate(rows):
        x = _of_active(active, x.astype(jnp.float32))
        batch, memories, heads, width = x.shape
        if window is not None:
            columns = window[..., start : start + heads * width]
            start += heads * width
            held = columns.reshape(batch, memories, -1, heads, width)
            met = jnp.concatenate([_of_active(active, held), x[:, :, None]], axis=2)
            x = jnp.sum(met * kernels[i].astype(jnp.float32), axis=2)
            moved = met[:, :, 1:].reshape(columns.shape)
            new_window.append(jnp.where(active[..., None, None], moved, columns))
        if plan.silu[i]:
            x = jax.nn.silu(x)
        if plan.normalized[i]:
            squares = jnp.sum(x * x, axis=-1, keepdims=True)
            x = x * jax.lax.rsqrt(squares + plan.epsilon)
        rows[i] = x
    return *rows, None if window is None else jnp.concatenate(new_window, axis=-1)


def _of_active(active, x):
    """`[B, M, ...]` with zeros for memories that do not take the token."""
    return jnp.where(active.reshape(*active.shape, *[1] * (x.ndim - 2)), x, 0.0)
