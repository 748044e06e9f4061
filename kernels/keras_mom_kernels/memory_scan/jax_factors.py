"""The memory scan on JAX by factors of chunks: any decay, GPUs and TPUs.

Inside chunks everything is a batched product, which XLA computes; the recurrence
between chunks, which XLA would run as a loop of small products, is a kernel in either
direction. The backward pass keeps the inputs and one state a chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp

from keras_mom_kernels.memory_scan import jax_arrays
from keras_mom_kernels.memory_scan.chunk_algebra import (
    LOWEST_LOG_DECAY,
    ChunkAlgebra,
)
from keras_mom_kernels.memory_scan.chunk_factors import ChunkFactors

# Axes of what `forward` returns for `backward`.
KEPT = ("batch chunks heads key value",)


class _Chunks:
    """All chunks' factors, as the kernels take them."""

    def __init__(self, how, tensors):
        options, kernels, self.interpret, dtype = how
        self.product_dtype = dtype
        *rows, self.resets, self.offsets, self.initial = tensors
        self.dtypes = [None if x is None else x.dtype for x in rows]
        self.key_dim, self.value_dim = rows[0].shape[-1], rows[2].shape[-1]
        self.kernels: Any = _kernels(kernels)
        query, key, value, log_decay, beta = (
            None if x is None else x.astype("float32") for x in rows
        )
        self.log_decay = log_decay
        algebra = ChunkAlgebra(jax_arrays.EXACT)
        self.block = ChunkFactors(
            algebra, options, query, key, value, log_decay, beta, self.resets
        )
        self.merge = algebra.merge_chunks
        self.product = algebra.optional_product
        weights = self.block.reading_weights() if self.block.delta else None
        whole = self.block.whole
        # Heads that decay as one are one head there.
        shape = (*self.block.key.shape[:3], 1, 1)
        if whole is not None:
            whole = jnp.broadcast_to(whole, (*shape[:3], *whole.shape[3:]))[..., 0]
        key_size, self.value_size = map(_padded_size, (self.key_dim, self.value_dim))
        self.key_size = key_size
        if whole is not None and whole.shape[-1] > 1:
            whole = _widened(whole, key_size)
        self.factors = {
            "weights": _widened(weights, key_size, dtype),
            "ending": _widened(self.block.ending_key, key_size, dtype),
            "whole": whole,
        }

    def rest(self):
        """What rounding `ending` left out, or None where it is exact enough.

        Correlated keys differ by little more than a rounding of each decayed one.
        """
        ending, dtype = self.block.ending_key, self.product_dtype
        if self.block.decay is None or dtype != jnp.bfloat16:
            return None
        # XLA may leave out a cast there and back, but not this.
        rest = ending - jax.lax.reduce_precision(ending, 8, 7)
        return _widened(rest, self.key_size, dtype)

    def values(self, x):
        """Rows `[..., V]` with the value channels that the kernels take."""
        return _widened(x, self.value_size)

    def state(self, x):
        """States `[..., K, V]` likewise."""
        if x is None:
            return None
        missing = self.key_size - self.key_dim
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])
        return self.values(x)

    def cut(self, x, of_state):
        """The channels that are there."""
        x = x[..., : self.value_dim]
        return x[..., : self.key_dim, :] if of_state else x


def plan(options, kernels, interpret, dtype):
    """What `forward` and `backward` take first."""
    return options, kernels, interpret, dtype


def forward(how, *tensors):
    """As `jax_fused.forward`."""
    with jax.default_matmul_precision("highest"):
        chunks = _Chunks(how, tensors)
        block = chunks.block
        writes = chunks.product(block.value, block.beta)
        if block.delta:
            writes = block.inverse @ writes
        states, written, final = chunks.kernels.hand_on(
            dict(chunks.factors, rest=chunks.rest()),
            chunks.values(writes),
            chunks.offsets,
            chunks.state(chunks.initial),
            interpret=chunks.interpret,
        )
        states, final = (chunks.cut(x, True) for x in (states, final))
        output = block.output(states, chunks.cut(written, False))
        return chunks.merge(output), final, states


def backward(how, output_gradient, final_gradient, states, *tensors):
    """As `jax_fused.backward`, behind the states before each chunk."""
    with jax.default_matmul_precision("highest"):
        chunks = _Chunks(how, tensors)
        block = chunks.block
        out = block.algebra.split_chunks(
            output_gradient.astype("float32"), block.options.chunk_size
        )
        writes, missing = block.writes(states)
        reads, local = block.output_gradients(out)
        next_grad, write_grad, first = chunks.kernels.hand_back(
            chunks.factors,
            chunks.values(local),
            chunks.state(reads),
            chunks.offsets,
            chunks.state(final_gradient),
            interpret=chunks.interpret,
        )
        grads: list[Any] = list(
            block.gradients(
                states,
                writes,
                missing,
                out,
                chunks.cut(write_grad, False),
                chunks.cut(next_grad, True),
            )
        )
        grads = [None if x is None else chunks.merge(x) for x in grads]
        if chunks.log_decay is not None:
            # Below the lowest log decay the decay is 0 whatever its value.
            grads[3] = jnp.where(chunks.log_decay >= LOWEST_LOG_DECAY, grads[3], 0)
        grads = [
            None if x is None else x.astype(dtype)
            for x, dtype in zip(grads, chunks.dtypes)
        ]
        if chunks.initial is None:
            first = None
        return *grads, None, None, None if first is None else chunks.cut(first, True)


def _kernels(name):
    if name == "gpu":
        from keras_mom_kernels.memory_scan import pallas_gpu

        return pallas_gpu
    from keras_mom_kernels.memory_scan import pallas_tpu

    return pallas_tpu


def _padded_size(size):
    """The least power of two that the kernels take."""
    return max(16, 1 << (size - 1).bit_length())


def _widened(x, size, dtype=None):
    """`[..., N]` with zeros up to `[..., size]`."""
    if x is None:
        return None
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
    return x if dtype is None else x.astype(dtype)
