"""Pallas kernels that prepare the chunks of the memory scan, all at once.

The counterpart of `triton_prepare`: `A`, the decayed key products below the diagonal
times the write strength, `(I + A)^-1`, and `P`, the decayed query-key products.

Source: arXiv 2406.06484 and 2412.06464.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from keras_mom_kernels.memory_scan.pallas_common import (
    call,
    head_pairs,
    index,
    store_square,
)

# Rows of a block of the solve.
_BLOCK = 16


def prepare(plan, tensors, attention=True):
    """`attention` and, for the delta rule, `inverse`: `[B, G, H, parts, C, C]`.

    Args:
        plan: `Plan`.
        tensors: dict of what `pallas_scan.forward` takes, but for these.
        attention: whether it is wanted; without it only for the delta rule.
    """
    batch, chunks, size, heads, _ = tensors["key"].shape
    grid = (heads, chunks, batch)
    pairs = (batch, chunks, heads, size, size)
    squares = jax.ShapeDtypeStruct((*pairs[:3], plan.parts, size, size), plan.narrow)
    names = "key beta coarse fine key_coarse key_fine counts".split()
    outputs = {}
    if attention:
        names.append("query")
        outputs["attention"] = squares
    if plan.delta:
        outputs["pairs"] = jax.ShapeDtypeStruct(pairs, jnp.float32)
    inputs = {name: tensors[name] for name in names}
    results = call(pair_rows, plan, plan.config.pairs, grid, inputs, outputs)
    if plan.delta:
        inputs = dict(pairs=results.pop("pairs"))
        outputs = dict(inverse=squares)
        results |= call(solve_pairs, plan, plan.config.solve, grid, inputs, outputs)
    return results


def pair_rows(plan, refs):
    """Decayed products of a chunk's rows: P in operands, and A for the delta rule."""
    head, chunk, row = (pl.program_id(axis) for axis in range(3))
    place = (row, chunk, head)
    size, key_dim = plan.size, refs["key"].shape[-1]
    block = min(plan.config.pairs.block_k, key_dim)
    read = erase = jnp.zeros((size, size), jnp.float32)
    for start in range(0, key_dim, block):
        tile = (row, chunk, slice(None), head, pl.ds(start, block))
        key = plan.operand(refs["key"][tile])
        if "attention" in refs:
            query = plan.operand(refs["query"][tile])
            read += plan.dot(query, key, right=True)
        if plan.delta:
            erase += plan.dot(key, key, right=True)
    if "attention" in refs:
        read *= head_pairs(plan, refs, place, False)
        store_square(plan, refs["attention"], place, read)
    if plan.delta:
        erase *= head_pairs(plan, refs, place, True)
        if "beta" in refs:
            erase *= refs["beta"][place][:, None]
        refs["pairs"][place] = erase


def solve_pairs(plan, refs):
    """`(I + A)^-1` of a chunk, in operands.

    Substitution row by row in the diagonal blocks, then blocks are merged: a Neumann
    series loses every digit where keys are correlated.
    """
    head, chunk, row = (pl.program_id(axis) for axis in range(3))
    place = (row, chunk, head)
    count = plan.size // _BLOCK
    shape = (count, _BLOCK, _BLOCK)
    block, t, j = (index(size, axis, shape) for axis, size in enumerate(shape))
    pairs, inverse = refs["pairs"], refs["inverse"]
    diagonal = pairs[(*place, block * _BLOCK + t, block * _BLOCK + j)]
    solved = -jnp.where(t > j, diagonal, 0.0)
    first = index(count, 0, (count, _BLOCK)) * _BLOCK
    column = index(_BLOCK, 1, (count, _BLOCK))

    def substitute(i, solved):
        line = pairs[(*place, first + i, first + column)]
        line = jnp.where(column < i, -line, 0.0)
        line += jnp.sum(line[:, :, None] * solved, axis=1)
        return jnp.where(t == i, line[:, None, :], solved)

    for i in range(2, _BLOCK):
        solved = substitute(i, solved)
    solved += (t == j).astype(jnp.float32)

    def stored(m, n, tile):
        rows, columns = pl.ds(m * _BLOCK, _BLOCK), pl.ds(n * _BLOCK, _BLOCK)
        for part, operand in enumerate(plan.split(tile)):
            inverse[(*place, part, rows, columns)] = operand
        return tile

    def product(x, y):
        return plan.dot(x, y, precision=plan.config.exact)

    def pair(m, n):
        rows, columns = pl.ds(m * _BLOCK, _BLOCK), pl.ds(n * _BLOCK, _BLOCK)
        return pairs[(*place, rows, columns)]

    known = {}
    for m in range(count):
        own = jnp.sum(jnp.where(block == m, solved, 0.0), axis=0)
        known[m, m] = stored(m, m, own)
        for n in range(m + 1, count):
            stored(m, n, jnp.zeros((_BLOCK, _BLOCK), jnp.float32))
    for m in range(1, count):
        for n in range(m - 1, -1, -1):
            total = product(pair(m, n), known[n, n])
            for between in range(n + 1, m):
                total += product(pair(m, between), known[between, n])
            known[m, n] = stored(m, n, -product(known[m, m], total))
