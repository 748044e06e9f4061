"""The memory scan on JAX by Pallas kernels alone: GPUs, no decay or one a head.

Each pass over the rows is a kernel; the backward pass keeps the inputs alone and
computes the rest again.
"""

import jax.numpy as jnp

from keras_mom_kernels.memory_scan import (
    jax_arrays,
    pallas_row_gradients,
    pallas_scan,
)
from keras_mom_kernels.memory_scan.chunk_algebra import (
    LOWEST_LOG_DECAY,
    ChunkAlgebra,
    CumulativeDecay,
)
from keras_mom_kernels.memory_scan.configurations import configuration
from keras_mom_kernels.memory_scan.pallas_common import Plan, target
from keras_mom_kernels.memory_scan.pallas_prepare import prepare
from keras_mom_kernels.memory_scan.pallas_splits import (
    gradients_behind,
    make_splits,
    states_before,
)

# Axes of what `forward` returns for `backward`.
KEPT = ()
_ALGEBRA = ChunkAlgebra(jax_arrays.EXACT)


def plan(options, kernels, interpret, dtype):
    """What `forward` and `backward` take first."""
    if kernels == "mosaic":
        # Not every JAX has what this imports.
        from keras_mom_kernels.memory_scan import mosaic_scan as scan
    else:
        scan = pallas_scan
    return options, scan, interpret, dtype


def forward(how, *tensors):
    """Output and final state, and what `backward` takes beside all that goes in here.

    Args:
        how: what `plan` returned.
        tensors: query, key, value, log_decay, beta, resets, chunk_offsets and initial
            state, of aligned rows.
    """
    chunks = _Chunks(how, tensors)
    plan, known, scan = chunks.plan, chunks.tensors, how[1]
    known |= prepare(plan, known, attention=scan is pallas_scan)
    splits = make_splits(plan, known)
    if splits is None:
        results = scan.forward(plan, known, "output", "final")
        output, final = results["output"], results["final"]
    else:
        before, final = states_before(plan, known, splits)
        known |= dict(offsets=splits.offsets, initial=before)
        output = scan.forward(plan, known, "output")["output"]
    return chunks.rows(output, chunks.value_dim), chunks.states(final)


def backward(how, output_grad, final_grad, *tensors):
    """Gradients of all that `forward` takes; None of integers."""
    chunks = _Chunks(how, tensors)
    plan, known = chunks.plan, chunks.tensors
    known |= prepare(plan, known)
    known["output_grad"] = chunks.split(output_grad, chunks.value_width)
    known["final_grad"] = chunks.padded_states(final_grad)
    splits = make_splits(plan, known)
    wanted = ["state_grads", "write_grads"]
    if splits is None:
        wanted.append("initial_grad")
    else:
        behind, known["initial_grad"] = gradients_behind(plan, known, splits)
        before, _ = states_before(plan, known, splits)
        known |= dict(offsets=splits.offsets, initial=before, final_grad=behind)
    known |= pallas_scan.forward(plan, known, "states", "writes")
    known |= pallas_scan.backward(plan, known, *wanted)
    grads = pallas_row_gradients.row_gradients(plan, known)
    query, key, value, log_decay, beta, _, _, initial = tensors
    return (
        chunks.rows(grads["query"], chunks.key_dim).astype(query.dtype),
        chunks.rows(grads["key"], chunks.key_dim).astype(key.dtype),
        chunks.rows(grads["value"], chunks.value_dim).astype(value.dtype),
        _log_decay_gradient(grads["log_decay"], log_decay),
        None if beta is None else _merged(grads["beta"]).astype(beta.dtype),
        None,
        None,
        None if initial is None else chunks.states(known["initial_grad"]),
    )


def _log_decay_gradient(gradient, log_decay):
    if log_decay is None:
        return None
    # Below the lowest log decay the decay is 0 whatever its value.
    known = log_decay.astype(jnp.float32) >= LOWEST_LOG_DECAY
    return jnp.where(known, _merged(gradient), 0).astype(log_decay.dtype)


def _merged(x):
    """`[B, G, H, C]` to `[B, T, H]`."""
    return _ALGEBRA.merge_chunks(x)


class _Chunks:
    """The tensors of a call as the kernels take them.

    Attributes:
        plan: `Plan`.
        tensors: dict of what `prepare` takes.
        key_dim, value_dim: K and V of the call; the kernels' are powers of two.
    """

    def __init__(self, how, tensors):
        options, _, interpret, dtype = how
        query, key, value, log_decay, beta, resets, offsets, initial = tensors
        self.size = options.chunk_size
        self.key_dim, self.value_dim = key.shape[-1], value.shape[-1]
        delta = options.write == "delta"
        exclusive = delta and options.erase_before_decay and log_decay is not None
        kind, capability = ("cuda", 90) if interpret else target()
        config = configuration(
            self.key_dim,
            self.value_dim,
            jnp.dtype(dtype).name,
            "none" if log_decay is None else "head",
            exclusive,
            kind,
            capability,
        )
        self.plan = Plan(
            delta,
            log_decay is not None,
            exclusive,
            self.size,
            options.scale,
            config,
            interpret,
        )
        sizes = self.key_dim, self.value_dim
        self.key_width, self.value_width = (_width(x, self.plan) for x in sizes)
        self.tensors = dict(
            query=self.split(query, self.key_width),
            key=self.split(key, self.key_width),
            value=self.split(value, self.value_width),
            beta=None if beta is None else self.columns(beta),
            counts=None if resets is None else self.counts(resets),
            offsets=offsets,
            initial=self.padded_states(initial),
            **self.decays(log_decay),
        )

    def split(self, x, width):
        """`[B, T, H, N]` to `[B, G, C, H, width]`."""
        batch, length, *rest = x.shape
        x = x.reshape(batch, length // self.size, self.size, *rest)
        return _padded(x, [width])

    def rows(self, x, width):
        """The way back."""
        batch, chunks, size, heads, _ = x.shape
        return x[..., :width].reshape(batch, chunks * size, heads, width)

    def columns(self, x):
        """`[B, T, H]` to float32 `[B, G, H, C]`."""
        return _ALGEBRA.split_chunks(x.astype(jnp.float32), self.size)

    def padded_states(self, x):
        if x is None:
            return None
        return _padded(x.astype(jnp.float32), [self.key_width, self.value_width])

    def states(self, x):
        """The way back."""
        return x[..., : self.key_dim, : self.value_dim]

    def counts(self, resets):
        """int32 `[B, G, C]`: the resets in its chunk up to each row."""
        resets = resets.reshape(resets.shape[0], -1, self.size)
        return jnp.cumsum(resets.astype(jnp.int32), axis=-1)

    def decays(self, log_decay):
        """Running sums of log decays in each chunk, and those that keys read with."""
        names = ("coarse", "fine", "key_coarse", "key_fine")
        if log_decay is None:
            return dict.fromkeys(names)
        columns = self.columns(log_decay)
        sums = CumulativeDecay.of(jax_arrays.EXACT, columns, axis=-1)
        before = CumulativeDecay(jax_arrays.EXACT, None, None)
        if self.plan.exclusive:
            before = sums.map(lambda x: _ALGEBRA.shift_down(x, -1))
        found = (sums.coarse, sums.fine, before.coarse, before.fine)
        return dict(zip(names, found))


def _width(size, plan):
    """The width of tiles: of configurations' least ones, as `configuration` says."""
    least = 64 if plan.config.precision == "bf16" else 32
    return max(least, 1 << (size - 1).bit_length())


def _padded(x, widths):
    """The last axes with zeros up to these widths."""
    axes = x.ndim - len(widths)
    missing = [(0, width - size) for width, size in zip(widths, x.shape[axes:])]
    if all(behind == 0 for _, behind in missing):
        return x
    return jnp.pad(x, [(0, 0)] * axes + missing)
