"""Splits of long segments: which chunks each has, and the states before them.

A few long sequences leave most of a chip idle if each is scanned from its first chunk
to its last. Where the shapes alone say so, segments are cut into splits. A segment's
state is linear in the one before it, `S_next = M S + B`: splits are scanned at once
for `M`, the transition, and `B`, what a split leaves in an empty state; then, with the
states before each split joined, for the rest.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from keras_mom_kernels.memory_scan import pallas_scan
from keras_mom_kernels.memory_scan.configurations import split_length
from keras_mom_kernels.memory_scan.pallas_common import barrier, call


class Splits(NamedTuple):
    """How a call's segments are cut.

    Attributes:
        offsets: int32 `[B, splits + 1]`, the chunks of each split, as those of
            segments; more splits than are needed: the last ones are empty.
        first: int32 `[B, S + 1]`, the first split of each segment.
        transitions: float32 `[B, splits, H, K, K]`.
    """

    offsets: Any
    first: Any
    transitions: Any


def make_splits(plan, tensors):
    """`Splits` of what `pallas_scan.forward` takes, or None."""
    offsets = tensors["offsets"]
    batch, chunks, _, heads, key_dim = tensors["key"].shape
    segments, width = offsets.shape[1] - 1, tensors["value"].shape[-1]
    blocks = width // min(plan.config.scan.block_v, width)
    length = split_length(batch * chunks, batch * segments, blocks * heads)
    if length is None:
        return None
    count = chunks // length + segments
    needed = jnp.maximum(-(-jnp.diff(offsets) // length), 1)
    first = jnp.pad(jnp.cumsum(needed, 1), [(0, 0), (1, 0)]).astype(jnp.int32)
    split = jnp.arange(count + 1, dtype=jnp.int32)
    segment = jnp.sum(split[None, :, None] >= first[:, None, 1:-1], -1)

    def of_segment(x):
        return jnp.take_along_axis(x, segment, axis=1)

    begin = of_segment(offsets[:, :-1]) + (split - of_segment(first[:, :-1])) * length
    begin = jnp.minimum(begin, of_segment(offsets[:, 1:]))
    identity = jnp.eye(key_dim, dtype=jnp.float32)
    shape = (batch, count, heads, key_dim, key_dim)
    changed = dict(offsets=begin, value=None, initial=jnp.broadcast_to(identity, shape))
    transitions = pallas_scan.forward(plan, tensors | changed, "final")["final"]
    return Splits(begin, first, transitions)


def states_before(plan, tensors, splits):
    """States before each split, `[B, splits, H, K, V]`, and behind the segments."""
    changed = dict(offsets=splits.offsets, initial=None)
    ends = pallas_scan.forward(plan, tensors | changed, "final")["final"]
    return _join(plan, splits, ends, tensors["initial"], False)


def gradients_behind(plan, tensors, splits):
    """Gradients of the states behind each split, and of those before the segments."""
    changed = dict(offsets=splits.offsets, final_grad=None)
    found = pallas_scan.backward(plan, tensors | changed, "initial_grad")
    return _join(plan, splits, found["initial_grad"], tensors["final_grad"], True)


def _join(plan, splits, ends, start, reverse):
    batch, _, heads, key_dim, width = ends.shape
    segments, launch = splits.first.shape[1] - 1, plan.config.join
    inputs = dict(transitions=splits.transitions, ends=ends, first=splits.first)
    inputs["start"] = start
    last = (batch, segments, heads, key_dim, width)
    outputs = dict(
        befores=jax.ShapeDtypeStruct(ends.shape, jnp.float32),
        last=jax.ShapeDtypeStruct(last, jnp.float32),
    )
    grid = (width // min(launch.block_v, width), heads, batch * segments)
    kernel = join_gradients if reverse else join_states
    results = call(kernel, plan, launch, grid, inputs, outputs)
    return results["befores"], results["last"]


def join_states(plan, refs):
    """The state before each split, and those behind the segments."""
    _join_splits(plan, refs, False)


def join_gradients(plan, refs):
    """The gradient of the state behind each split, and of those before segments."""
    _join_splits(plan, refs, True)


def _join_splits(plan, refs, reverse):
    key_dim, width = refs["ends"].shape[-2:]
    launch = plan.config.join
    block, rows = min(launch.block_v, width), min(launch.block_k, key_dim)
    batch = refs["first"].shape[0]
    program, head = pl.program_id(2), pl.program_id(1)
    row, segment = program % batch, program // batch
    values = pl.ds(pl.program_id(0) * block, block)
    begin, end = refs["first"][row, segment], refs["first"][row, segment + 1]
    place = (row, segment, head, slice(None), values)

    def step(count, state):
        split = end - 1 - count if reverse else begin + count
        own = (row, split, head)
        refs["befores"][(*own, slice(None), values)] = state
        barrier(plan)
        total = refs["ends"][(*own, slice(None), values)]
        # The state is read again in blocks: registers have no slices.
        for first in range(0, key_dim, rows):
            some = pl.ds(first, rows)
            between = (some, slice(None)) if reverse else (slice(None), some)
            transition = refs["transitions"][(*own, *between)]
            before = refs["befores"][(*own, some, values)]
            exact = plan.config.exact
            total += plan.dot(transition, before, left=reverse, precision=exact)
        return total

    state = jnp.zeros((key_dim, block), jnp.float32)
    if "start" in refs:
        state = refs["start"][place]
    refs["last"][place] = jax.lax.fori_loop(0, end - begin, step, state)
