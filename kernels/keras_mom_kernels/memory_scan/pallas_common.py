"""What the Pallas kernels of the scan share on GPUs: their plan, tiles and products.

They are lowered through Triton, and all that this lowering asks for is here.

Rows are `[B, G, C, H, width]` here, G chunks of C. A program works on one head; widths
are powers of two. Sums, decays and states are float32. A bfloat16 product's float32
operand goes in two parts where it matters: what correlated keys write cancels from row
to row, and a rounding of each row does not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from keras_mom_kernels.memory_scan.configurations import Configuration

_PRECISIONS = {
    "bf16": None,
    "tf32": jax.lax.DotAlgorithmPreset.TF32_TF32_F32,
    "tf32x3": jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
    "ieee": jax.lax.Precision.HIGHEST,
}


class Plan(NamedTuple):
    """How a call is computed.

    Attributes:
        delta: whether writes follow the delta rule, or add.
        head: whether there is a decay, one a head.
        exclusive: whether the delta rule reads the state before its decay.
        size: C.
        scale: factor of the query.
        config: `Configuration`.
        interpret: whether the kernels run in Pallas' interpreter.
    """

    delta: bool
    head: bool
    exclusive: bool
    size: int
    scale: float
    config: Configuration
    interpret: bool

    @property
    def narrow(self):
        """The dtype that products take."""
        return jnp.dtype("bfloat16" if self.config.precision == "bf16" else "float32")

    @property
    def parts(self):
        """In how many operands a square is stored."""
        return 2 if self.config.split else 1

    def operand(self, x):
        """`x` as a product takes it."""
        return x.astype(self.narrow)

    def dot(self, x, y, left=False, right=False, precision=None):
        """float32 product of two operands, of which either may go transposed."""
        name = precision or self.config.precision
        # Processors know no tf32.
        how = jax.lax.Precision.HIGHEST if self.interpret else _PRECISIONS[name]
        return jax.lax.dot_general(
            x,
            y,
            (((0 if left else 1,), (1 if right else 0,)), ((), ())),
            precision=how,
            preferred_element_type=jnp.float32,
        )

    def split(self, x):
        """A float32 tile in `parts` operands, whose sum it is."""
        rounded = self.operand(x)
        if self.parts == 1:
            return (rounded,)
        return rounded, self.operand(x - rounded.astype(jnp.float32))


def target():
    """The kind of GPU that JAX runs on, `"cuda"` or `"hip"`, and its capability."""
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:
        # Nothing runs here: the kernels are lowered for another machine.
        return "cuda", 90
    if "rocm" in device.client.platform_version.lower():
        return "hip", 0
    return "cuda", round(10 * float(device.compute_capability))


def barrier(plan):
    """Waits until all of a program's threads have stored what they had to."""
    if not plan.interpret:
        plgpu.debug_barrier()


def call(kernel, plan, launch, grid, inputs, outputs, aliases=None):
    """Runs `kernel(plan, refs)`, with `refs` all tensors by name.

    Args:
        launch: `Launch`.
        grid: of programs.
        inputs: dict of tensors; those that are None are left out.
        outputs: dict of `jax.ShapeDtypeStruct`.
        aliases: dict: outputs that take the place of an input of this name.

    Returns:
        Dict of outputs.
    """
    inputs = {name: x for name, x in inputs.items() if x is not None}
    names = (*inputs, *outputs)
    places = {
        list(inputs).index(source): list(outputs).index(target)
        for target, source in (aliases or {}).items()
    }

    def body(*refs):
        kernel(plan, dict(zip(names, refs)))

    # The lowering names kernels so.
    body.__name__ = kernel.__name__
    results = pl.pallas_call(
        body,
        grid=grid,
        out_shape=list(outputs.values()),
        input_output_aliases=places,
        compiler_params=plgpu.CompilerParams(
            num_warps=launch.warps, num_stages=launch.stages
        ),
        interpret=plan.interpret,
        name=kernel.__name__,
    )(*inputs.values())
    return dict(zip(outputs, results))


def index(size, axis, shape):
    """int32 of this shape, which counts along an axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def lower(size, strict):
    """Whether row t may meet row j: `[t, j]`."""
    t, j = index(size, 0, (size, size)), index(size, 1, (size, size))
    return t > j if strict else t >= j


def head_decays(plan, refs, place):
    """Decays of a state on its way to each row's query, key, and to the chunk's end.

    Args:
        place: batch row, chunk and head.

    Returns:
        `into_query`, `into_key` and `to_end`, `[C]`, and of the whole chunk, `[1]`.
    """
    into_query = into_key = to_end = jnp.ones((plan.size,), jnp.float32)
    whole = jnp.ones((1,), jnp.float32)
    last = (*place[:2], pl.ds(plan.size - 1, 1))
    if plan.head:
        coarse, fine = refs["coarse"][place], refs["fine"][place]
        into_query = into_key = jnp.exp(coarse + fine)
        if plan.exclusive:
            into_key = jnp.exp(refs["key_coarse"][place] + refs["key_fine"][place])
        end = (*place, pl.ds(plan.size - 1, 1))
        end_coarse, end_fine = refs["coarse"][end], refs["fine"][end]
        to_end = jnp.exp((end_coarse - coarse) + (end_fine - fine))
        whole = jnp.exp(end_coarse + end_fine)
    if "counts" in refs:
        counts, end = refs["counts"][place[:2]], refs["counts"][last]
        into_query = jnp.where(counts == 0, into_query, 0.0)
        into_key = jnp.where(counts == 0, into_key, 0.0)
        to_end = jnp.where(counts == end, to_end, 0.0)
        whole = jnp.where(end == 0, whole, 0.0)
    return into_query, into_key, to_end, whole


def head_pairs(plan, refs, place, strict):
    """Decay between rows, 0 where one does not see the other: `[t, j]`, float32.

    With `strict` of keys: below the diagonal, and to the row before for exclusive ones.
    """
    keep = lower(plan.size, strict)
    if "counts" in refs:
        counts = refs["counts"][place[:2]]
        keep &= counts[:, None] == counts[None, :]
    if not plan.head:
        return keep.astype(jnp.float32)
    coarse, fine = refs["coarse"][place], refs["fine"][place]
    row_coarse, row_fine = coarse, fine
    if strict and plan.exclusive:
        row_coarse, row_fine = refs["key_coarse"][place], refs["key_fine"][place]
    difference = row_coarse[:, None] - coarse[None, :]
    difference += row_fine[:, None] - fine[None, :]
    return jnp.exp(jnp.where(keep, difference, -jnp.inf))


def square(plan, name, refs, place, x, transposed=False):
    """Product of a stored square, or of its transpose, and a float32 tile."""
    rounded = plan.operand(x)
    total = plan.dot(refs[name][(*place, 0)], rounded, left=transposed)
    for part in range(1, plan.parts):
        total += plan.dot(refs[name][(*place, part)], rounded, left=transposed)
    return total


def store_square(plan, ref, place, x):
    """Stores a float32 square in its operands."""
    for part, tile in enumerate(plan.split(x)):
        ref[(*place, part)] = tile
