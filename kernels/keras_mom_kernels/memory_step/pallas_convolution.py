"""The short convolution of one token, in every memory, as a Pallas kernel for GPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from keras_mom_kernels.memory_scan.configurations import power_of_two

PARTS = ("query", "key", "value")


def convolve_token(plan, interpret, query, key, value, kernels, window, active):
    """A program takes a head of the query, the key or the value of one memory.

    Args:
        plan: `keras_mom_kernels.memory_step.jax_convolution.Plan`.
        interpret: whether to run in Pallas' interpreter.
        query: `[B, H, K]`.
        key, value: `[B, P, H, K or V]`.
        kernels: of query, key and value, `[B or 1, W + 1, H, K or V]` each, or None.
        window: float32 `[B, M, W, H * (2 * K + V)]`, or None.
        active: int32 `[B, M]`.

    Returns:
        Query, key and value, float32 `[B, M, H, K or V]`, zeros for memories that do
        not take the token, and the new window if there is one, which overwrites the
        old one wherever that is not needed any more.
    """
    batch, heads, key_dim = query.shape
    widths = (key_dim, key_dim, value.shape[-1])
    rows = (batch, len(plan.set_of_memory), heads)
    inputs = dict(zip(PARTS, (query, key, value)), active=active)
    shapes = {
        f"new_{name}": jax.ShapeDtypeStruct((*rows, width), jnp.float32)
        for name, width in zip(PARTS, widths)
    }
    aliases = {}
    if kernels is not None and window.shape[2]:
        inputs["window"] = window
        aliases = {len(inputs) - 1: len(shapes)}
        shapes["new_window"] = jax.ShapeDtypeStruct(window.shape, jnp.float32)
    if kernels is not None:
        inputs |= {f"{name}_kernel": x for name, x in zip(PARTS, kernels)}
    names = (*inputs, *shapes)

    def body(*refs):
        index, memory, row = (pl.program_id(axis) for axis in range(3))
        place = (row, memory, index % heads)
        step = functools.partial(_step_head, plan, dict(zip(names, refs)), place)
        for part in range(len(PARTS)):
            pl.when(index // heads == part)(functools.partial(step, widths, part))

    # The lowering names kernels so.
    body.__name__ = "convolve_token"
    results = pl.pallas_call(
        body,
        grid=(len(PARTS) * heads, *rows[1::-1]),
        out_shape=list(shapes.values()),
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(
            num_warps=max(1, min(8, power_of_two(max(widths)) // 128)), num_stages=1
        ),
        interpret=interpret,
        name="convolve_token",
    )(*inputs.values())
    return (*results, window)[:4]


def _step_head(plan, refs, place, widths, part):
    row, memory, head = place
    name, width, heads = PARTS[part], widths[part], refs["query"].shape[1]
    lanes = jnp.arange(power_of_two(width), dtype=jnp.int32)
    inside = lanes < width
    # A memory that does not take the token has no channels.
    used = inside & (refs["active"][row, memory] != 0)

    def load(ref, *place):
        x = plgpu.load(refs[ref].at[place], mask=used, other=0)
        return x.astype(jnp.float32)

    if name == "query":
        total = load(name, row, head, lanes)
    else:
        projected = jnp.int32(0)
        for i, chosen in enumerate(plan.set_of_memory):
            projected = jnp.where(memory == i, jnp.int32(chosen), projected)
        total = load(name, row, projected, head, lanes)
    if f"{name}_kernel" in refs:
        kernel = refs[f"{name}_kernel"]
        of_batch, history = row if kernel.shape[0] > 1 else 0, kernel.shape[1] - 1
        columns = heads * sum(widths[:part]) + head * width + lanes
        held = [load("window", row, memory, t, columns) for t in range(history)]
        met = [*held, total]
        taps = (
            load(f"{name}_kernel", of_batch, t, head, lanes) for t in range(history + 1)
        )
        total = functools.reduce(jnp.add, (x * tap for x, tap in zip(met, taps)))
        # All rows are read before one is written; nobody else has these columns.
        for t, x in enumerate(met[1:]):
            plgpu.store(refs["new_window"].at[row, memory, t, columns], x, mask=used)
    if plan.silu[part]:
        total *= jax.nn.sigmoid(total)
    if plan.normalized[part]:
        total *= jax.lax.rsqrt(jnp.sum(total * total) + plan.epsilon)
    output = refs[f"new_{name}"].at[row, memory, head, lanes]
    plgpu.store(output, total, mask=inside)
