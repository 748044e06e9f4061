"""Pallas kernels of the packed convolution on GPUs: forward, and the gradient in two.

The counterpart of `triton_rows`, in Pallas' Triton lowering. A program works on some
packed rows and one group of channels, a head's if heads are normalized. The W + 1 rows
that an output meets are taken straight from the inputs; neighbours share all but one of
them, which the processor's cache then holds.

Inputs are `[B, S, G, E]` here and packed rows `[B, R, G, E]`: G groups of E channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Elements of a tile: of what a thread holds, registers are left for two or three
# programs a multiprocessor; the gradient holds shares of the kernel's beside.
_TILE, _GRADIENT_TILE = 4096, 2048
_WARPS = 8
# Packed rows, of all batch rows, that keep a GPU busy with fewer, longer programs.
_MANY_ROWS = 2**14
_STEPS = 8


class Plan(NamedTuple):
    """How a call is computed.

    Attributes:
        silu: whether the sums go through SiLU.
        normalize: whether each group is L2-normalized.
        epsilon: of the norm.
        interpret: whether the kernels run in Pallas' interpreter.
    """

    silu: bool
    normalize: bool
    epsilon: float
    interpret: bool


def convolve(plan, inputs, kernel, source, documents):
    """Packed rows `[B, R, G, E]`, of the dtype of the inputs.

    Args:
        plan: `Plan`.
        inputs: `[B, S, G, E]`.
        kernel: `[B, W + 1, G, E]`.
        source, documents: int32 `[B, R]`; documents may be None.
    """
    batch, rows = source.shape
    groups, width = inputs.shape[2:]
    tile = _Tile(rows, width, _TILE)
    refs = dict(inputs=inputs, kernel=kernel, source=source, documents=documents)
    shape = jax.ShapeDtypeStruct((batch, rows, groups, width), inputs.dtype)
    grid = (groups, tile.programs, batch)
    return _call(_convolve, plan, tile, grid, refs, dict(output=shape))["output"]


def sum_gradients(plan, output_grad, inputs, kernel, source, documents):
    """Gradients of the sums `[B, R, G, E]`, and shares of the kernel's.

    The shares are float32 `[B, programs, W + 1, G, E]`. Empty rows have no gradient,
    whatever their output's gradient holds.
    """
    batch, rows = source.shape
    taps, groups, width = kernel.shape[1:]
    # More steps a program: fewer shares.
    steps = _STEPS if batch * rows >= _MANY_ROWS else 1
    tile = _Tile(rows, width, _GRADIENT_TILE, steps)
    refs = dict(output_grad=output_grad, inputs=inputs, kernel=kernel)
    refs |= dict(source=source, documents=documents)
    shares = (batch, tile.programs, taps, groups, width)
    shapes = dict(
        sum_grads=jax.ShapeDtypeStruct(output_grad.shape, output_grad.dtype),
        shares=jax.ShapeDtypeStruct(shares, jnp.float32),
    )
    grid = (groups, tile.programs, batch)
    results = _call(_sum_gradients, plan, tile, grid, refs, shapes)
    return results["sum_grads"], results["shares"]


def input_gradients(plan, sum_grads, kernel, targets, documents):
    """Gradients of the inputs `[B, S, G, E]`, from those of the sums they are in.

    Args:
        targets: int32 `[B, S, J]`, the packed rows of each row of the inputs, or -1.
    """
    batch, length, _ = targets.shape
    groups, width = sum_grads.shape[2:]
    tile = _Tile(length, width, _TILE)
    refs = dict(sum_grads=sum_grads, kernel=kernel, targets=targets)
    refs |= dict(documents=documents)
    shape = jax.ShapeDtypeStruct((batch, length, groups, width), sum_grads.dtype)
    grid = (groups, tile.programs, batch)
    return _call(_input_gradients, plan, tile, grid, refs, dict(grads=shape))["grads"]


class _Tile:
    """Rows and channels of a program; both are powers of two, and may be too many."""

    def __init__(self, rows, width, elements, steps=1):
        self.width = width
        self.columns = 1 << (width - 1).bit_length()
        self.rows = max(4, min(64, elements // self.columns))
        self.steps = min(steps, -(-rows // self.rows))
        self.programs = -(-rows // (self.rows * self.steps))


def _call(kernel, plan, tile, grid, inputs, outputs):
    inputs = {name: x for name, x in inputs.items() if x is not None}
    names = (*inputs, *outputs)

    def body(*refs):
        kernel(plan, tile, dict(zip(names, refs)))

    body.__name__ = kernel.__name__
    results = pl.pallas_call(
        body,
        grid=grid,
        out_shape=list(outputs.values()),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=plan.interpret,
        name=kernel.__name__.strip("_"),
    )(*inputs.values())
    return dict(zip(outputs, results))


class _Place:
    """A program's batch row, group and channels, and access to its tiles."""

    def __init__(self, tile):
        self.group, self.program, self.batch = (pl.program_id(i) for i in range(3))
        self.tile = tile
        self.columns = jnp.arange(tile.columns, dtype=jnp.int32)[None, :]
        self.held = self.columns < tile.width

    def rows(self, step=0):
        """int32 `[rows]`, the program's rows of a step."""
        tile = self.tile
        first = (self.program * tile.steps + step) * tile.rows
        return first + jnp.arange(tile.rows, dtype=jnp.int32)

    def load(self, ref, index):
        """float32 `[rows, columns]` of a batch row's rows `index`, zeros for -1."""
        mask = (index >= 0)[:, None] & self.held
        row = jnp.maximum(index, 0)[:, None]
        place = ref.at[self.batch, row, self.group, self.columns]
        return plgpu.load(place, mask=mask, other=0.0).astype(jnp.float32)

    def store(self, ref, rows, x):
        """Stores a tile in those of these rows that there are."""
        mask = (rows < ref.shape[1])[:, None] & self.held
        place = ref.at[self.batch, rows[:, None], self.group, self.columns]
        plgpu.store(place, x.astype(ref.dtype), mask=mask)

    def numbers(self, ref, rows, other):
        """int32 `[rows]` of `[B, R]`; `other` for rows that there are not."""
        inside = (rows >= 0) & (rows < ref.shape[1])
        row = jnp.clip(rows, 0, ref.shape[1] - 1)
        return plgpu.load(ref.at[self.batch, row], mask=inside, other=other)

    def factors(self, kernel, i):
        """float32 `[1, columns]`, row i of the convolution's kernel."""
        place = kernel.at[self.batch, i, self.group, self.columns]
        return plgpu.load(place, mask=self.held, other=0.0).astype(jnp.float32)


def _taps(place, refs, rows):
    """What each row of the kernel meets: float32 `[rows, columns]` each."""
    count, own = refs["kernel"].shape[1], None
    if "documents" in refs:
        own = place.numbers(refs["documents"], rows, 0)
    for i in range(count):
        met = rows - (count - 1) + i
        index = place.numbers(refs["source"], met, -1)
        if own is not None:
            number = place.numbers(refs["documents"], met, 0)
            index = jnp.where(number == own, index, -1)
        yield place.load(refs["inputs"], index)


def _sums(place, refs, taps):
    return sum(tap * place.factors(refs["kernel"], i) for i, tap in enumerate(taps))


def _convolve(plan, tile, refs):
    place = _Place(tile)
    rows = place.rows()
    total = _sums(place, refs, _taps(place, refs, rows))
    if plan.silu:
        total *= jax.nn.sigmoid(total)
    if plan.normalize:
        # Channels behind the group's are zeros.
        squares = jnp.sum(total * total, axis=1)
        total *= jax.lax.rsqrt(squares + plan.epsilon)[:, None]
    # Empty rows are zeros, whatever the rows before them hold.
    filled = place.numbers(refs["source"], rows, -1) >= 0
    place.store(refs["output"], rows, jnp.where(filled[:, None], total, 0.0))


def _through_activation(plan, grad, total):
    """The gradient of the sums, from that of the output."""
    activated, slope = total, 1.0
    if plan.silu:
        gate = jax.nn.sigmoid(total)
        activated = total * gate
        slope = gate + activated * (1 - gate)
    if plan.normalize:
        squares = jnp.sum(activated * activated, axis=1)
        scale = jax.lax.rsqrt(squares + plan.epsilon)
        along = jnp.sum(activated * grad, axis=1) * (scale * scale)
        grad = (grad - activated * along[:, None]) * scale[:, None]
    return grad * slope


def _sum_gradients(plan, tile, refs):
    place = _Place(tile)
    count = refs["kernel"].shape[1]

    def step(number, shares):
        rows = place.rows(number)
        filled = place.numbers(refs["source"], rows, -1) >= 0
        grad = place.load(refs["output_grad"], jnp.where(filled, rows, -1))
        taps = list(_taps(place, refs, rows))
        total = _sums(place, refs, taps)
        grad = _through_activation(plan, grad, total)
        # Empty rows have no gradient, but the rows that they meet may be anything.
        grad = jnp.where(filled[:, None], grad, 0.0)
        place.store(refs["sum_grads"], rows, grad)
        products = (jnp.where(filled[:, None], tap * grad, 0.0) for tap in taps)
        return tuple(share + x for share, x in zip(shares, products))

    shares = (jnp.zeros((tile.rows, tile.columns), jnp.float32),) * count
    if tile.steps == 1:
        shares = step(0, shares)
    else:
        shares = jax.lax.fori_loop(0, tile.steps, step, shares)
    for i, share in enumerate(shares):
        own = (place.batch, place.program, i, place.group, place.columns)
        total = jnp.sum(share, axis=0, keepdims=True)
        plgpu.store(refs["shares"].at[own], total, mask=place.held)


def _input_gradients(plan, tile, refs):
    del plan
    place = _Place(tile)
    own_rows = place.rows()
    targets, count = refs["targets"], refs["kernel"].shape[1]
    length, slots = targets.shape[1:]
    packed = refs["sum_grads"].shape[1]
    valid = own_rows < length
    total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    for j in range(slots):
        slot = targets.at[place.batch, jnp.minimum(own_rows, length - 1), j]
        row = plgpu.load(slot, mask=valid, other=-1)
        own = None
        if "documents" in refs:
            own = place.numbers(refs["documents"], row, 0)
        for i in range(count):
            later = row + (count - 1 - i)
            met = (row >= 0) & (later < packed)
            if own is not None:
                met &= place.numbers(refs["documents"], later, 0) == own
            tile_of = place.load(refs["sum_grads"], jnp.where(met, later, -1))
            total += tile_of * place.factors(refs["kernel"], i)
    place.store(refs["grads"], own_rows, total)
