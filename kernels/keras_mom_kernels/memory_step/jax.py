"""One token through a layer's memories, on JAX: a Pallas kernel on GPUs.

    from keras_mom_kernels.memory_step.jax import convolution_step, memory_step

A launch reads and writes each state once. On a TPU, XLA fuses the same products. The
gradient is that of the plain products.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from keras_mom_kernels.jax_partitioning import by_shards
from keras_mom_kernels.memory_scan.jax import check_served, platform
from keras_mom_kernels.memory_step.jax_convolution import convolution_step
from keras_mom_kernels.memory_step.pallas_step import step_memories

__all__ = ["convolution_step", "memory_step"]


class Rule(NamedTuple):
    """What does not change from call to call: arguments of `memory_step`."""

    write: str
    erase_before_decay: bool
    read_before_update: bool
    scale: float


def memory_step(
    query,
    key,
    value,
    *,
    log_decay=None,
    beta=None,
    weights,
    active,
    state,
    write="delta",
    erase_before_decay=False,
    read_before_update=False,
    scale=None,
    kernels=None,
    interpret=False,
):
    """Writes a token to the memories that take it, reads them, and mixes what they say.

    Per head and active memory m, with `g = log_decay`:

        S' = diag(exp(g)) S_m
        r  = k^T S'                     (k^T S_m with `erase_before_decay`)
        S_m <- S' + k (beta (v - r))^T  (`r = 0` for additive writes)
        output = sum over m of weights_m * scale * q^T S_m

    A memory that is not active is neither read nor changed, whatever its inputs hold.
    Where `state` is not needed behind the call, it is overwritten: in a loop, or if it
    is donated.

    Args:
        query, key: float32, bfloat16 or float16 `[B, M, H, K]`.
        value: `[B, M, H, V]`.
        log_decay: at or below zero, `[B, M, H]` or `[B, M, H, K]`; None for no decay.
        beta: write strength `[B, M, H]`, or None for 1.
        weights: `[B, M]`.
        active: bool `[B, M]`: the memories that take the token.
        state: float32 `[B, M, H, K, V]`.
        write: `"delta"` or `"additive"`.
        erase_before_decay: whether the delta rule reads the state before its decay.
        read_before_update: whether the query reads the state before decay and write.
        scale: factor of the query, `K ** -0.5` by default.
        kernels: `"gpu"` or `"tpu"`; None for those of the platform that JAX runs on.
        interpret: whether the kernel runs in Pallas' interpreter, for tests.

    Returns:
        Mixed output, float32 `[B, H, V]`, and the state behind the token.

    Raises:
        NotImplementedError: if no kernel serves the call, with the reason.
    """
    kernels = platform() if kernels is None else kernels
    check_served(query, key, value, kernels)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    rule = Rule(write, bool(erase_before_decay), bool(read_before_update), scale)
    rows = (query, key, value, log_decay, beta, weights)
    if kernels == "tpu":
        return _products(rule, active, state, *rows)
    return _function(rule, interpret)(*rows, active, state)


# Axes of what `step_memories` takes, and of its results.
_AXES = (
    "batch memories heads key",
    "batch memories heads key",
    "batch memories heads value",
    "batch memories heads channels",
    "batch memories heads",
    "batch memories",
    "batch memories",
    "batch memories heads key value",
)
_RESULTS = "batch heads value", "batch memories heads key value"


@functools.cache
def _function(rule, interpret):
    """The kernel with the gradient of the products."""

    def step(*tensors):
        axes, log_decay = list(_AXES), tensors[3]
        if log_decay is not None and log_decay.ndim == 3:
            axes[3] = "batch memories heads"
        run = functools.partial(step_memories, rule, interpret)
        return by_shards(run, axes, _RESULTS)(*tensors)

    def forward(*tensors):
        return step(*tensors), tensors

    def backward(tensors, gradients):
        *rows, active, state = tensors
        products = functools.partial(_products, rule, active)
        _, pull = jax.vjp(products, state, *rows)
        state_grad, *grads = pull(gradients)
        return *grads, None, state_grad

    function: Any = jax.custom_vjp(step)
    function.defvjp(forward, backward)
    return function


def _products(rule, active, state, query, key, value, log_decay, beta, weights):
    def of_active(x, otherwise) -> Any:
        there = active.reshape(*active.shape, *[1] * (x.ndim - 2))
        return jnp.where(there, x, otherwise)

    def cleared(x) -> Any:
        return None if x is None else of_active(x.astype(jnp.float32), 0.0)

    query, key, value, log_decay, beta, weights = map(
        cleared, (query, key, value, log_decay, beta, weights)
    )
    old = decayed = of_active(state, 0.0)
    if log_decay is not None:
        decay = jnp.exp(log_decay)
        decayed = decay.reshape(*decay.shape, *[1] * (5 - decay.ndim)) * old
    if rule.write == "delta":
        value -= _read(old if rule.erase_before_decay else decayed, key)
    if beta is not None:
        value *= beta[..., None]
    new = decayed + key[..., None] * value[..., None, :]
    read = _read(old if rule.read_before_update else new, rule.scale * query)
    mixed = jnp.sum(weights[:, :, None, None] * read, axis=1)
    return mixed, of_active(new, state)


def _read(state, x):
    """`x^T S`: `[B, M, H, V]` of `[B, M, H, K, V]` and `[B, M, H, K]`."""
    return jnp.sum(state * x[..., None], axis=-2)
