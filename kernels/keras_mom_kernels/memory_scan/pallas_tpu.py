"""The recurrence between chunks on TPUs: Pallas kernels for Mosaic.

The recurrences are those of `pallas_gpu`. A row's chunks follow each other in the
grid's last axis, and the state stays in on-chip memory between them. All that is
special to TPUs is here.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def hand_on(factors, writes, offsets, initial, interpret=False):
    """As `pallas_gpu.hand_on`."""
    inputs = dict(factors, writes=writes)
    return _call(_hand_on, inputs, offsets, initial, False, interpret)


def hand_back(factors, local, reads, offsets, last, interpret=False):
    """As `pallas_gpu.hand_back`."""
    inputs = dict(factors, writes=local, reads=reads)
    return _call(_hand_back, inputs, offsets, last, True, interpret)


def _call(kernel, inputs, offsets, first, reverse, interpret):
    inputs = {name: x for name, x in inputs.items() if x is not None}
    if "whole" in inputs:
        inputs["whole"] = inputs["whole"][..., None]
    batch, chunks, heads, size, width = inputs["writes"].shape
    key_dim, segments = inputs["ending"].shape[-1], offsets.shape[1] - 1
    # Which segment a chunk belongs to, and whether the state enters there.
    index = jnp.arange(chunks, dtype="int32")
    segment = jnp.sum(index[None, :, None] >= offsets[:, None, 1:-1], -1, dtype="int32")
    borders = offsets[:, 1:] - 1 if reverse else offsets[:, :-1]
    enters = index == jnp.take_along_axis(borders, segment, axis=1)
    given = first is not None

    def chunk_of(step):
        return chunks - 1 - step if reverse else step

    def of_chunk(row, head, step, segment, enters):
        del segment, enters
        return row, chunk_of(step), head, 0, 0

    def of_segment(row, head, step, segment, enters):
        del enters
        return row, segment[row, chunk_of(step)], head, 0, 0

    together = _heads_together(heads, key_dim * width)

    def spec(x, where):
        return pl.BlockSpec((None, None, together, *x.shape[3:]), where)

    def shape(*sizes):
        return jax.ShapeDtypeStruct((batch, *sizes), jnp.float32)

    in_specs = [spec(x, of_chunk) for x in inputs.values()]
    names, values = list(inputs), list(inputs.values())
    if given:
        names.append("first")
        values.append(first)
        in_specs.append(spec(first, of_segment))
    states = shape(chunks, heads, key_dim, width)
    written = shape(chunks, heads, size, width)
    last = shape(segments, heads, key_dim, width)
    names += ["states", "written", "last", "state"]

    def body(segment, enters, *refs):
        del segment
        refs = dict(zip(names, refs))
        row, step = pl.program_id(0), pl.program_id(2)

        @pl.when(enters[row, chunk_of(step)] != 0)
        def _():
            refs["state"][...] = (
                refs["first"][...] if given else jnp.zeros_like(refs["state"])
            )

        for head in range(together):
            state = refs["state"][head]
            refs["states"][head] = state
            state = kernel(refs, head, state)
            refs["state"][head] = state
            # That of the last chunk stays.
            refs["last"][head] = state

    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads // together, chunks),
            in_specs=in_specs,
            out_specs=[
                spec(states, of_chunk),
                spec(written, of_chunk),
                spec(last, of_segment),
            ],
            scratch_shapes=[pltpu.VMEM((together, key_dim, width), jnp.float32)],
        ),
        out_shape=[states, written, last],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=pltpu.InterpretParams(detect_races=True) if interpret else False,
        name=kernel.__name__.strip("_"),
    )
    states, written, last = call(segment, enters.astype("int32"), *values)
    # No chunk came by for empty segments.
    there = (offsets[:, 1:] > offsets[:, :-1])[..., None, None, None]
    return states, written, jnp.where(there, last, first if given else 0.0)


def _heads_together(heads, size):
    """Heads a step of the grid takes: enough to outweigh what a step costs."""
    most = 4 if size <= 128 * 128 else 2
    return max(count for count in range(1, most + 1) if heads % count == 0)


def _hand_on(refs, head, state):
    write = refs["writes"][head]
    if "weights" in refs:
        write -= _product(refs["weights"][head], state)
    refs["written"][head] = write
    if "whole" in refs:
        state *= refs["whole"][head]
    state += _product(refs["ending"][head], write, transposed=True)
    if "rest" in refs:
        state += _product(refs["rest"][head], write, transposed=True, split=False)
    return state


def _hand_back(refs, head, state):
    grad = refs["writes"][head] + _product(refs["ending"][head], state)
    refs["written"][head] = grad
    if "whole" in refs:
        state *= refs["whole"][head]
    state += refs["reads"][head]
    if "weights" in refs:
        state -= _product(refs["weights"][head], grad, transposed=True)
    return state


def _product(x, y, transposed=False, split=True):
    """`x y`, or `x^T y`, in the dtype of `x`, with float32 sums.

    What correlated keys write nearly cancels: `y` is taken in two operands where they
    are narrow.
    """
    contracted = ((0,) if transposed else (1,), (0,))
    narrow = x.dtype != jnp.float32
    highest, default = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT

    def product(y):
        return jax.lax.dot_general(
            x,
            y,
            (contracted, ((), ())),
            # Mosaic takes no other for narrow operands.
            precision=default if narrow else highest,
            preferred_element_type=jnp.float32,
        )

    rounded = y.astype(x.dtype)
    if not narrow or not split:
        return product(rounded)
    return product(rounded) + product((y - rounded.astype(y.dtype)).astype(x.dtype))
