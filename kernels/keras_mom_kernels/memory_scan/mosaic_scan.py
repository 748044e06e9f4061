"""The scan's sequential pass on Hopper GPUs, as a Pallas kernel in its Mosaic lowering.

The counterpart of `pallas_scan.forward`, of bfloat16, 128 channels and chunks of 64
rows; it computes the query-key products too. All that is special to this lowering is
here.

A block of threads hands one head's state through one segment. Two groups of warps
compute, each of 64 value channels; a third one loads what they take, and multiplies
queries and keys. All is transposed: with the state as `[V, K]`, the left operand of
every product is in registers, and the right one is as it was loaded. But for the
query-key products and the output, nothing that is computed goes through shared memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from keras_mom_kernels.memory_scan.pallas_common import target

# Older releases, which this module can be imported in, have less of it.
plgpu: Any = mosaic_gpu

# C, K and V; and the value channels of a group.
_ROWS, _KEYS, _VALUES, _BLOCK = 64, 128, 128, 64
# Groups that compute, and chunks that are in shared memory at a time.
_GROUPS, _STAGES = 2, 2
# Registers of a thread that loads, and of one that computes.
_LOADING, _COMPUTING = 72, 216
# What `_row_factors` returns, in this order.
_INTO_QUERY, _INTO_KEY, _TO_END, _BETA, _COARSE, _FINE = range(6)
_LINES = 6
# Copies that load a chunk.
_COPIES = 4 + _GROUPS
# The release that it was run with.
_RELEASE = (0, 11, 2)
_F32, _BF16 = jnp.float32, jnp.bfloat16


def check_served(query, key, value, log_decay, resets, options, interpret):
    """Raises `NotImplementedError`, with the reason, for calls it does not serve.

    Args:
        query, key, value, log_decay, resets: as `memory_scan` takes them.
        options: `ScanOptions`.
        interpret: whether it is to run in an interpreter, which needs no GPU.
    """

    def served(condition, what):
        if not condition:
            raise NotImplementedError(f"the Mosaic kernel {what}")

    dtypes = {str(jnp.dtype(x.dtype)) for x in (query, key, value)}
    served(dtypes == {"bfloat16"}, f"takes bfloat16, not {', '.join(sorted(dtypes))}")
    sizes = key.shape[-1], value.shape[-1]
    served(
        sizes == (_KEYS, _VALUES),
        f"takes {_KEYS} key and {_VALUES} value channels, not {sizes[0]} and "
        f"{sizes[1]}",
    )
    served(options.write == "delta", f"has no {options.write} writes")
    served(not options.erase_before_decay, "does not erase before the decay")
    served(log_decay is None or log_decay.ndim == 3, "has no decay of key channels")
    served(resets is None, "takes no resets")
    served(
        options.chunk_size == _ROWS,
        f"takes chunks of {_ROWS} rows, not {options.chunk_size}",
    )
    served(
        jax.__version_info__ >= _RELEASE,
        f"needs jax {'.'.join(map(str, _RELEASE))} or later, not {jax.__version__}",
    )
    kind, capability = ("cuda", 90) if interpret else target()
    name = f"sm_{capability}" if kind == "cuda" else kind
    served(name == "sm_90", f"needs a GPU of sm_90, not {name}")


def forward(plan, tensors, *wanted):
    """As `pallas_scan.forward`, of `"output"` and `"final"`; takes no `attention`."""
    batch, chunks, size, heads, _ = tensors["key"].shape
    segments = tensors["offsets"].shape[1] - 1
    flat = batch * chunks
    rows, states = (flat * size, heads * _KEYS), batch * segments * heads * _KEYS
    inputs = {name: tensors[name].reshape(rows) for name in ("query", "key", "value")}
    factors = _row_factors(tensors, (batch, chunks, heads, size))
    inputs["rows"] = factors.reshape(flat * heads * _LINES, size)
    inputs["inverse"] = tensors["inverse"].reshape(flat * heads * 2, size, size)
    inputs["offsets"] = tensors["offsets"].reshape(-1)
    if tensors["initial"] is not None:
        inputs["initial"] = tensors["initial"].reshape(states, _VALUES)
    outputs = dict(
        output=jax.ShapeDtypeStruct(rows, _BF16),
        final=jax.ShapeDtypeStruct((states, _VALUES), _F32),
    )
    outputs = {name: outputs[name] for name in wanted}
    names = (*inputs, *outputs)

    def body(*refs, **scratch):
        refs = dict(zip(names, refs)) | scratch
        _program(refs, (batch, chunks, heads, segments), plan.scale)

    how = plgpu.InterpretGPUParams(detect_races=True) if plan.interpret else None
    results = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        scratch_types=_scratch(),
        grid=(batch * segments, heads),
        grid_names=("segment", "head"),
        num_threads=_GROUPS + 1,
        thread_name="group",
        kernel_name="mosaic_scan",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True
        ),
        interpret=how,
    )(*inputs.values())
    shapes = dict(
        output=(batch, chunks, size, heads, _VALUES),
        final=(batch, segments, heads, _KEYS, _VALUES),
    )
    return {name: x.reshape(shapes[name]) for name, x in zip(outputs, results)}


def _row_factors(tensors, shape):
    """float32 `[B, G, H, 6, C]`, of each row.

    Decays of the state into its query; into its key, times its write strength; of its
    write to the end; its write strength; and the two parts of the summed log decays.
    """
    zeros, ones = jnp.zeros(shape, _F32), jnp.ones(shape, _F32)
    coarse, fine = (
        zeros if tensors[name] is None else tensors[name] for name in ("coarse", "fine")
    )
    beta = ones if tensors["beta"] is None else tensors["beta"]
    into = jnp.exp(coarse + fine)
    to_end = jnp.exp(coarse[..., -1:] - coarse + (fine[..., -1:] - fine))
    return jnp.stack([into, into * beta, to_end, beta, coarse, fine], axis=3)


def _scratch():
    """Shared memory and barriers."""
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)

    def tiles(*shape):
        return plgpu.SMEM(shape, _BF16, transforms=transforms)

    def barriers(arrivals):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=_STAGES)

    return dict(
        query_tiles=tiles(_STAGES, _ROWS, _KEYS),
        key_tiles=tiles(_STAGES, _ROWS, _KEYS),
        value_tiles=tiles(_STAGES, _GROUPS, _ROWS, _BLOCK),
        inverse_tiles=tiles(_STAGES, 2, _ROWS, _ROWS),
        pair_tiles=tiles(_STAGES, 2, _ROWS, _ROWS),
        rows_tiles=plgpu.SMEM((_STAGES, _LINES, _ROWS), _F32),
        output_tiles=tiles(_GROUPS, _ROWS, _BLOCK),
        loaded=barriers(_COPIES),
        paired=barriers(1),
        consumed=barriers(_GROUPS),
    )


def _program(refs, sizes, scale):
    """One head of one segment; the last segments first, as in `pallas_scan`."""
    batch, chunks, heads, segments = sizes
    place, head = lax.axis_index("segment"), lax.axis_index("head")
    row, segment = lax.rem(place, batch), segments - 1 - lax.div(place, batch)
    border = row * (segments + 1) + segment
    begin, end = refs["offsets"][border], refs["offsets"][border + 1]
    first, steps = row * chunks + begin, end - begin
    group = lax.axis_index("group")

    @pl.when(group == _GROUPS)
    def _():
        plgpu.set_max_registers(_LOADING, action="decrease")
        _load_chunks(refs, heads, head, first, steps)

    @pl.when(group < _GROUPS)
    def _():
        plgpu.set_max_registers(_COMPUTING, action="increase")
        state = (row * segments + segment) * heads + head
        _compute_chunks(refs, heads, head, first, steps, state, group, scale)


def _load_chunks(refs, heads, head, first, steps):
    """Loads a segment's chunks, and multiplies their queries and keys."""

    def load(step):
        _load(refs, heads, head, first + step, lax.rem(step, _STAGES))

    def load_next(step):
        """Loads what takes the place of a chunk, once that is done with."""
        plgpu.barrier_wait(refs["consumed"].at[lax.rem(step, _STAGES)])
        pl.when(step + _STAGES < steps)(lambda: load(step + _STAGES))

    for step in range(_STAGES):
        pl.when(step < steps)(functools.partial(load, jnp.int32(step)))

    @pl.loop(0, steps)
    def _(step):
        _pair_rows(refs, lax.rem(step, _STAGES))
        pl.when(step > 0)(lambda: load_next(step - 1))

    pl.when(steps > 0)(lambda: load_next(steps - 1))


def _load(refs, heads, head, chunk, slot):
    """Starts to load what a chunk takes."""
    rows, keys = pl.ds(chunk * _ROWS, _ROWS), pl.ds(head * _KEYS, _KEYS)
    own = chunk * heads + head

    def copy(name, place, *target):
        tiles = refs[f"{name}_tiles"].at[slot, *target]
        plgpu.copy_gmem_to_smem(refs[name].at[place], tiles, refs["loaded"].at[slot])

    copy("key", (rows, keys))
    copy("rows", pl.ds(own * _LINES, _LINES))
    copy("query", (rows, keys))
    for group in range(_GROUPS):
        values = pl.ds(head * _VALUES + group * _BLOCK, _BLOCK)
        copy("value", (rows, values), group)
    copy("inverse", pl.ds(own * 2, 2))


def _pair_rows(refs, slot):
    """Stores a chunk's decayed query-key products in two operands."""
    plgpu.barrier_wait(refs["loaded"].at[slot])

    def multiply(pairs):
        keys = refs["key_tiles"].at[slot].T
        plgpu.wgmma(pairs, refs["query_tiles"].at[slot], keys)
        return pairs[...]

    pairs = pl.run_scoped(multiply, plgpu.ACC((_ROWS, _ROWS), _F32))
    shape, layout = (_ROWS, _ROWS), plgpu.Layout.WGMMA

    def difference(line):
        sums = refs["rows_tiles"].at[slot, line]
        row = plgpu.load(sums, layout=layout.reduce(1))
        column = plgpu.load(sums, layout=layout.reduce(0))
        row = lax.broadcast_in_dim(row, shape, [0])
        return row - lax.broadcast_in_dim(column, shape, [1])

    t, j = (plgpu.broadcasted_iota(jnp.int32, shape, i, layout=layout) for i in (0, 1))
    decay = difference(_COARSE) + difference(_FINE)
    pairs *= jnp.exp(jnp.where(t >= j, decay, -jnp.inf))
    for part, tile in enumerate(_split(pairs)):
        refs["pair_tiles"][slot, part] = tile
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs["paired"].at[slot])


def _compute_chunks(refs, heads, head, first, steps, state_index, group, scale):
    """Hands the state on, from chunk to chunk: a group's value channels."""
    channel, layout = group * _BLOCK, plgpu.Layout.WGMMA
    place = pl.ds(state_index * _KEYS, _KEYS), pl.ds(channel, _BLOCK)
    transposed = plgpu.Layout.WGMMA_TRANSPOSED
    if "initial" in refs:
        initial = refs["initial"].at[place].T
        state = plgpu.load(initial, layout=transposed, optimized=False)
    else:
        state = jnp.zeros((_BLOCK, _KEYS), _F32)
    state = plgpu.layout_cast(state, layout)

    def step(count, state):
        slot, out_tile = lax.rem(count, _STAGES), refs["output_tiles"].at[group]
        plgpu.barrier_wait(refs["loaded"].at[slot])
        state, out = _compute(refs, slot, group, state)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_tile.T[...] = (out * scale).astype(_BF16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs["consumed"].at[slot])
        rows = pl.ds((first + count) * _ROWS, _ROWS)
        values = pl.ds(head * _VALUES + channel, _BLOCK)
        plgpu.copy_smem_to_gmem(out_tile, refs["output"].at[rows, values])
        return state

    state = lax.fori_loop(0, steps, step, state)
    if "final" in refs:
        refs["final"].at[place].T[...] = plgpu.layout_cast(state, transposed)
    plgpu.wait_smem_to_gmem(0)


def _compute(refs, slot, group, state):
    """The state behind a chunk, and what the chunk reads, `[V, C]`."""
    layout = plgpu.Layout.WGMMA
    before = state.astype(_BF16)
    query, key = (refs[name].at[slot] for name in ("query_tiles", "key_tiles"))
    inverse, pairs = (refs[name].at[slot] for name in ("inverse_tiles", "pair_tiles"))

    def factor(line):
        row = plgpu.load(refs["rows_tiles"].at[slot, line], layout=layout.reduce(0))
        return lax.broadcast_in_dim(row, (_BLOCK, _ROWS), [1])

    def erase(erased):
        plgpu.wgmma(erased, before, key.T)
        value = plgpu.load(refs["value_tiles"].at[slot, group].T, layout=layout)
        value = value.astype(_F32) * factor(_BETA)
        return (value - erased[...] * factor(_INTO_KEY)).astype(_BF16)

    def solve(solved, out):
        for part in range(2):
            plgpu.wgmma(solved, write, inverse.at[part].T)
        plgpu.wgmma(out, before, query.T)
        # The product of the queries goes on.
        solution = plgpu.wgmma_accumulator_load(solved, wait_n=1)
        ending = _split(solution * factor(_TO_END))
        return _split(solution), ending, out[...] * factor(_INTO_QUERY)

    tile = plgpu.ACC((_BLOCK, _ROWS), _F32)
    write = pl.run_scoped(erase, tile)
    (rounded, rest), ending, out = pl.run_scoped(solve, tile, tile)
    state *= refs["rows_tiles"][slot, _INTO_QUERY, _ROWS - 1]
    plgpu.barrier_wait(refs["paired"].at[slot])

    def add(accumulators):
        state, out = accumulators
        for part in ending:
            plgpu.wgmma(state, part, key)
        plgpu.wgmma(out, rounded, pairs.at[0].T)
        plgpu.wgmma(out, rounded, pairs.at[1].T)
        plgpu.wgmma(out, rest, pairs.at[0].T)

    return pl.run_state(add)((plgpu.ACC.init(state), plgpu.ACC.init(out)))


def _split(x):
    """A float32 tile in two operands, whose sum it is."""
    rounded = x.astype(_BF16)
    return rounded, (x - rounded.astype(_F32)).astype(_BF16)
