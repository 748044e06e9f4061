"""One token through a layer's memories, on TensorFlow.

    from keras_mom_kernels.memory_step.tensorflow import memory_step

A few batched products, for a decode loop in a `tf.function`; differentiable.
"""

from typing import Any

import tensorflow as tf


@tf.autograph.experimental.do_not_convert
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
):
    """Writes a token to the memories that take it, reads them, and mixes what they say.

    Per head and active memory m, with `g = log_decay`:

        S' = diag(exp(g)) S_m
        r  = k^T S'                     (k^T S_m with `erase_before_decay`)
        S_m <- S' + k (beta (v - r))^T  (`r = 0` for additive writes)
        output = sum over m of weights_m * scale * q^T S_m

    A memory that is not active is neither read nor changed, whatever its inputs hold.
    B may be unknown in a graph.

    Args:
        query, key: floating `[B, M, H, K]`.
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

    Returns:
        Mixed output, float32 `[B, H, V]`, and the state behind the token.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    zero = tf.zeros((), tf.float32)

    def of_active(x, otherwise) -> Any:
        there = tf.reshape(active, (*_shape(active), *[1] * (len(x.shape) - 2)))
        return tf.where(there, x, otherwise)

    def cleared(x) -> Any:
        return None if x is None else of_active(tf.cast(x, tf.float32), zero)

    query, key, value, log_decay, beta, weights = map(
        cleared, (query, key, value, log_decay, beta, weights)
    )
    old = decayed = of_active(state, zero)
    if log_decay is not None:
        missing = 5 - len(log_decay.shape)
        decay = tf.exp(log_decay)[(..., *[tf.newaxis] * missing)]
        decayed = decay * old
    if write == "delta":
        value -= _read(old if erase_before_decay else decayed, key)
    if beta is not None:
        value *= beta[..., tf.newaxis]
    new = decayed + key[..., tf.newaxis] * value[..., tf.newaxis, :]
    read = _read(old if read_before_update else new, scale * query)
    mixed = tf.reduce_sum(weights[:, :, tf.newaxis, tf.newaxis] * read, axis=1)
    return mixed, of_active(new, state)


def _read(state, x):
    """`x^T S`: `[B, M, H, V]` of `[B, M, H, K, V]` and `[B, M, H, K]`."""
    return tf.reduce_sum(state * x[..., tf.newaxis], axis=-2)


def _shape(x):
    known, found = x.shape.as_list(), tf.shape(x)
    return [found[i] if size is None else size for i, size in enumerate(known)]
