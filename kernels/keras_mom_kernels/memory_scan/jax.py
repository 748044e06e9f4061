"""The memory scan on JAX, through Pallas kernels on GPUs and TPUs.

    from keras_mom_kernels.memory_scan.jax import memory_scan

Inside chunks everything is a batched product, which XLA computes; the recurrence
between chunks, which XLA would run as a loop of small products, is a kernel in either
direction. The backward pass keeps the inputs and one state a chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from keras_mom_kernels.memory_scan import jax_arrays
from keras_mom_kernels.memory_scan.chunk_algebra import (
    LOWEST_LOG_DECAY,
    ChunkAlgebra,
)
from keras_mom_kernels.memory_scan.chunk_factors import ChunkFactors
from keras_mom_kernels.memory_scan.chunked_scan import ScanOptions

# C, the rows of a chunk.
CHUNK_SIZE = 64


def memory_scan(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    log_decay=None,
    beta=None,
    write="delta",
    erase_before_decay=False,
    cu_seqlens=None,
    chunk_offsets=None,
    chunk_size=CHUNK_SIZE,
    resets=None,
    initial_state=None,
    scale=None,
    kernels=None,
    interpret=False,
):
    """Writes sequences into matrix-valued memories and reads them back, row by row.

    Per head, with a state `S` of `[K, V]` in float32 and `g_t = log_decay[t]`:

        S'  = diag(exp(g_t)) S_{t-1}
        r_t = k_t^T S'                  (k_t^T S_{t-1} with `erase_before_decay`)
        S_t = S' + k_t (beta_t (v_t - r_t))^T      (`r_t = 0` for additive writes)
        o_t = scale * q_t^T S_t

    Differentiable in query, key, value, log_decay, beta and initial_state.

    Args:
        query, key: float32, bfloat16 or float16 `[B, T, H, K]`.
        value: `[B, T, H, V]`.
        log_decay: at or below zero, `[B, T, H]` or `[B, T, H, K]`; None for no decay.
        beta: write strength `[B, T, H]`, or None for 1.
        write: `"delta"` or `"additive"`.
        erase_before_decay: whether the delta rule reads the state before its decay.
        cu_seqlens: int32 `[S + 1]` with B == 1: sequence s holds the rows
            `cu_seqlens[s]` to `cu_seqlens[s + 1] - 1`; rows behind the last give
            zeros. Its values are not checked.
        chunk_offsets: int32 `[B, S + 1]`: segment s of a batch row holds its chunks
            `chunk_offsets[s]` to `chunk_offsets[s + 1] - 1` of `chunk_size` rows; T is
            a multiple of it, and every chunk belongs to a segment.
        chunk_size: with `chunk_offsets`, a power of two of 16 or more.
        resets: int32 `[B, T]`, 1 at a row before which the state is emptied, or None;
            not with `cu_seqlens`.
        initial_state: float32 `[B, H, K, V]`; `[S, H, K, V]` with `cu_seqlens`,
            `[B, S, H, K, V]` with `chunk_offsets`. None for zeros.
        scale: factor of the query, `K ** -0.5` by default.
        kernels: `"gpu"` or `"tpu"`; None for those of the platform that JAX runs on.
        interpret: whether the kernels run in Pallas' interpreter, for tests.

    Returns:
        Output `[B, T, H, V]`, of the dtype of `value`, and the final state, float32,
        shaped as `initial_state`.

    Raises:
        NotImplementedError: if no kernel serves the call, with the reason.
    """
    kernels = _platform() if kernels is None else kernels
    if chunk_offsets is not None and chunk_size < 16:
        raise NotImplementedError(
            f"the Pallas kernels take chunks of 16 rows or more, not {chunk_size}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    dtype = value.dtype
    rows = [query, key, value, log_decay, beta]
    size = chunk_size if chunk_offsets is not None else CHUNK_SIZE
    options = ScanOptions(write, bool(erase_before_decay), size, 1, scale)
    scan = _function(options, kernels, interpret, _products(query, key, value))
    if chunk_offsets is not None:
        output, state = scan(*rows, resets, chunk_offsets, initial_state)
    elif cu_seqlens is not None:
        output, state = _packed(scan, size, rows, cu_seqlens, initial_state)
    else:
        output, state = _padded(scan, size, rows, resets, initial_state)
    return jnp.asarray(output, dtype), state


def _platform():
    platform = jax.default_backend()
    if platform not in ("gpu", "tpu"):
        raise NotImplementedError(
            f"the Pallas kernels need a GPU or a TPU; JAX runs on {platform!r}"
        )
    return platform


def _products(*tensors):
    """The dtype of the factors that meet the state."""
    dtype = jnp.result_type(*tensors)
    return dtype if dtype in (jnp.bfloat16, jnp.float16) else jnp.dtype("float32")


def _padded(scan, size, rows, resets, initial_state):
    """One sequence a batch row: rows are added, which hold nothing."""
    batch, length = rows[0].shape[:2]
    chunks = max(-(-length // size), 1)
    missing = chunks * size - length
    rows, resets = [_with_rows(x, missing) for x in rows], _with_rows(resets, missing)
    offsets = jnp.tile(jnp.array([[0, chunks]], "int32"), (batch, 1))
    if initial_state is not None:
        initial_state = initial_state[:, None]
    output, state = scan(*rows, resets, offsets, initial_state)
    return output[:, :length], state[:, 0]


def _with_rows(x, missing):
    """`[B, T, ...]` with rows of zeros behind."""
    if x is None or missing == 0:
        return x
    return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])


def _packed(scan, size, rows, cu_seqlens, initial_state):
    """Packed sequences: each is moved to a place that begins with a whole chunk."""
    length, segments = rows[0].shape[1], cu_seqlens.shape[0] - 1
    chunks = -(-(length + segments * (size - 1)) // size)
    starts, lengths = cu_seqlens[:-1], jnp.diff(cu_seqlens)
    offsets = jnp.pad(jnp.cumsum(-(-lengths // size)), (1, 0)).astype("int32")

    def sequence(row, borders):
        found = jnp.searchsorted(borders[1:], row, side="right")
        return jnp.minimum(found, segments - 1)

    # Where each aligned row comes from, and where each packed row went.
    aligned = jnp.arange(chunks * size)
    own = sequence(aligned, offsets * size)
    place = aligned - offsets[own] * size
    source = jnp.where(place < lengths[own], starts[own] + place, length)
    row = jnp.arange(length)
    own = sequence(row, cu_seqlens)
    target = offsets[own] * size + row - starts[own]
    target = jnp.where(row < cu_seqlens[-1], target, chunks * size)

    def moved(x, index):
        return None if x is None else x.at[:, index].get(mode="fill", fill_value=0)

    offsets = offsets.at[-1].set(chunks)[None]
    if initial_state is not None:
        initial_state = initial_state[None]
    rows = [moved(x, source) for x in rows]
    output, state = scan(*rows, None, offsets, initial_state)
    return moved(output, target), state[0]


@functools.cache
def _function(options, kernels, interpret, dtype):
    """The scan of aligned rows with its gradient.

    It takes query, key, value, log_decay, beta, resets, chunk_offsets and initial
    state, and returns output and final state.
    """
    run = functools.partial(_forward, options, kernels, interpret, dtype)

    def forward(*tensors):
        output, final, states = run(*tensors)
        return (output, final), (tensors, states)

    def backward(kept, gradients):
        tensors, states = kept
        return _backward(options, kernels, interpret, dtype, tensors, states, gradients)

    function = jax.custom_vjp(lambda *tensors: run(*tensors)[:2])
    function.defvjp(forward, backward)
    return function


class _Chunks:
    """All chunks' factors, as the kernels take them."""

    def __init__(self, options, kernels, interpret, dtype, tensors):
        *rows, self.resets, self.offsets, self.initial = tensors
        self.dtypes = [None if x is None else x.dtype for x in rows]
        self.key_dim, self.value_dim = rows[0].shape[-1], rows[2].shape[-1]
        self.interpret = interpret
        self.kernels: Any = _kernels(kernels)
        rows = [None if x is None else x.astype("float32") for x in rows]
        self.log_decay = rows[3]
        algebra = ChunkAlgebra(jax_arrays.EXACT)
        self.block = ChunkFactors(algebra, options, *rows, self.resets)
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


def _forward(options, kernels, interpret, dtype, *tensors):
    with jax.default_matmul_precision("highest"):
        chunks = _Chunks(options, kernels, interpret, dtype, tensors)
        block = chunks.block
        writes = chunks.product(block.value, block.beta)
        if block.delta:
            writes = block.inverse @ writes
        states, written, final = chunks.kernels.hand_on(
            chunks.factors,
            chunks.values(writes),
            chunks.offsets,
            chunks.state(chunks.initial),
            interpret=interpret,
        )
        states, final = (chunks.cut(x, True) for x in (states, final))
        output = block.output(states, chunks.cut(written, False))
        return chunks.merge(output), final, states


def _backward(options, kernels, interpret, dtype, tensors, states, gradients):
    output_gradient, final_gradient = gradients
    with jax.default_matmul_precision("highest"):
        chunks = _Chunks(options, kernels, interpret, dtype, tensors)
        block = chunks.block
        out = block.algebra.split_chunks(
            output_gradient.astype("float32"), options.chunk_size
        )
        writes, missing = block.writes(states)
        reads, local = block.output_gradients(out)
        next_grad, write_grad, first = chunks.kernels.hand_back(
            chunks.factors,
            chunks.values(local),
            chunks.state(reads),
            chunks.offsets,
            chunks.state(final_gradient),
            interpret=interpret,
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
