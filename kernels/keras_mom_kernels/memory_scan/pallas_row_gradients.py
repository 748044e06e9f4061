"""Gradients of a chunk's rows: Pallas kernels that work on all chunks at once.

The counterpart of `triton_row_gradients`, without decay or with one a head. A program
works on a block of key channels; all that is computed is linear in them. The gradient
of a log decay is a sum over what it decays alone: no large numbers cancel, so that
those of strong decays keep their digits.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from keras_mom_kernels.memory_scan.pallas_common import (
    barrier,
    call,
    head_decays,
    head_pairs,
    index,
)

_DECAYS = ("coarse", "fine", "key_coarse", "key_fine", "counts")


def row_gradients(plan, tensors):
    """Gradients of query, key, value, log decay and beta.

    Args:
        plan: `Plan`.
        tensors: dict of what `pallas_scan.forward` takes, of what it returns with
            `keep`, of what `pallas_scan.backward` returns, and `output_grad`.

    Returns:
        Dict: `query`, `key`, `value`, as those; `log_decay` and `beta`, float32
        `[B, G, H, C]`, or None.
    """
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    launch = plan.config.gradients
    blocks, grid, sums, squares = _shapes(plan, tensors, launch)
    outputs = dict(
        query_grad=jax.ShapeDtypeStruct(query.shape, query.dtype),
        key_grad=jax.ShapeDtypeStruct(key.shape, key.dtype),
        squares=squares,
    )
    if plan.head:
        outputs["reads"] = outputs["ends"] = outputs["moved"] = sums
    names = ("query", "key", *_DECAYS, "states", "state_grads", "writes")
    inputs = {name: tensors.get(name) for name in (*names, "output_grad")}
    results = call(through_states, plan, launch, grid, inputs, outputs)
    solved: dict = dict(key_grad=results["key_grad"])
    beta = tensors["beta"]
    if plan.delta or beta is not None:
        solved |= _through_solve(plan, tensors, results["key_grad"])
    value_grad = solved.get("value_grad", tensors["write_grads"])
    if beta is not None and "value_grad" not in solved:
        strength = jnp.swapaxes(beta, 2, 3)[..., None]
        value_grad = (value_grad * strength).astype(value.dtype)
    return dict(
        query=results["query_grad"],
        key=solved["key_grad"],
        value=value_grad,
        log_decay=_log_decay(plan, results, solved) if plan.head else None,
        beta=None if beta is None else jnp.sum(solved["strength"], 0),
    )


def _shapes(plan, tensors, launch):
    """K blocks, grid, partial sums `[K blocks, B, G, H, C]` and squares."""
    batch, chunks, size, heads, key_dim = tensors["key"].shape
    blocks = key_dim // min(launch.block_k, key_dim)
    sums = (blocks, batch, chunks, heads, size)
    return (
        blocks,
        (blocks, heads, chunks, batch),
        jax.ShapeDtypeStruct(sums, jnp.float32),
        jax.ShapeDtypeStruct((*sums, size), plan.narrow),
    )


def _through_solve(plan, tensors, key_grad):
    launch = plan.config.solve_gradients
    blocks, grid, sums, squares = _shapes(plan, tensors, launch)
    names = ("key", "value", "beta", *_DECAYS, "states", "writes", "write_grads")
    inputs = {name: tensors.get(name) for name in names}
    outputs, aliases = {}, {}
    if plan.delta:
        inputs["partial_key_grad"] = key_grad
        outputs["key_grad"] = jax.ShapeDtypeStruct(key_grad.shape, key_grad.dtype)
        aliases["key_grad"] = "partial_key_grad"
        outputs["squares"] = squares
        if plan.head:
            outputs["reading"] = outputs["erased"] = sums
    if tensors["beta"] is not None:
        outputs["strength"] = sums
        if blocks == 1:
            value = tensors["write_grads"]
            outputs["value_grad"] = jax.ShapeDtypeStruct(value.shape, value.dtype)
    return call(through_solve, plan, launch, grid, inputs, outputs, aliases)


def _log_decay(plan, results, solved):
    """Gradients of log decays, from what they decay.

    A log decay decays what is read at its row and behind it, and what is written
    before it.
    """
    # Sums that a reader meets at row t belong to the log decays up to t, or to t - 1
    # where keys read with the decay of the row before.
    before = jnp.pad(jnp.sum(results["ends"], 0), [(0, 0)] * 3 + [(1, 0)])[..., :-1]
    behind = jnp.sum(results["reads"], 0)
    moved = jnp.sum(results["moved"], 0)
    if plan.delta:
        reading = jnp.sum(solved["reading"], 0)
        if plan.exclusive:
            reading = jnp.pad(reading, [(0, 0)] * 3 + [(0, 1)])[..., 1:]
        behind += reading
        moved += jnp.sum(solved["erased"], 0)
    return (
        jnp.cumsum(before, axis=-1)
        + jnp.flip(jnp.cumsum(jnp.flip(behind, -1), axis=-1), -1)
        + moved
    )


def _pairs_log_decay(plan, products, exclusive):
    """Gradient `[C]` of each log decay from a chunk's pairs `[t, j]`.

    The pair (t, j) holds the log decays of j + 1 to t, to t - 1 with `exclusive`.
    """
    size = plan.size
    t, j = index(size, 0, (size, size)), index(size, 1, (size, size))
    earlier = plan.operand((t < j).astype(jnp.float32))
    # Products of correlated keys nearly cancel in their sums.
    total = sum(plan.dot(part, earlier) for part in plan.split(products))
    return jnp.sum(jnp.where(t > j if exclusive else t >= j, total, 0.0), axis=0)


def _place(refs, launch):
    """K block, its channels, how many, and batch row, chunk and head of a program."""
    block, head, chunk, row = (pl.program_id(axis) for axis in range(4))
    size = min(launch.block_k, refs["key"].shape[-1])
    return block, pl.ds(block * size, size), size, (row, chunk, head)


def _value_blocks(refs, launch, step, carry):
    """`step(values, carry)` for each block of value channels."""
    width = refs["writes"].shape[-1]
    block = min(launch.block_v, width)

    def body(count, carry):
        return step(pl.ds(count * block, block), carry)

    return jax.lax.fori_loop(0, width // block, body, carry)


def through_states(plan, refs):
    """Gradients of a chunk's rows but for what comes through the solve."""
    launch = plan.config.gradients
    block, channels, count, place = _place(refs, launch)
    row, chunk, head = place
    size, everything = plan.size, slice(None)
    keys = (row, chunk, everything, head, channels)
    into_query, _, to_end, whole = head_decays(plan, refs, place)

    # 1. Through the states before and behind the chunk.
    def step(values, carry):
        dq, dk, pairs, held = carry
        kept = (*place, channels, values)
        tile = (row, chunk, everything, head, values)
        state, next_grad = refs["states"][kept], refs["state_grads"][kept]
        out = plan.operand(refs["output_grad"][tile])
        wrote = refs["writes"][tile]
        if plan.head:
            product = state.astype(jnp.float32) * next_grad.astype(jnp.float32)
            held += jnp.sum(product, axis=1)
        dq += plan.dot(out, state, right=True)
        dk += plan.dot(wrote, next_grad, right=True)
        pairs += plan.dot(out, wrote, right=True)
        return dq, dk, pairs, held

    rows = jnp.zeros((size, count), jnp.float32)
    pairs = jnp.zeros((size, size), jnp.float32)
    held = jnp.zeros((count,), jnp.float32)
    dq, dk, pairs, held = _value_blocks(refs, launch, step, (rows, rows, pairs, held))
    query, key = plan.operand(refs["query"][keys]), plan.operand(refs["key"][keys])
    dq *= (into_query * plan.scale)[:, None]
    dk *= to_end[:, None]
    if plan.head:
        sums = (block, *place)
        refs["reads"][sums] = jnp.sum(query.astype(jnp.float32) * dq, axis=1)
        refs["ends"][sums] = jnp.sum(key.astype(jnp.float32) * dk, axis=1)
        held = jnp.sum(held, axis=0) * whole

    # 2. Through the query-key products. A square is stored and read again where it is
    # needed transposed: Triton up to 3.7 miscompiles products of a transposed
    # accumulator on Hopper.
    pairs *= head_pairs(plan, refs, place, False) * plan.scale
    refs["squares"][(block, *place)] = plan.operand(pairs)
    barrier(plan)
    # What correlated keys add up to nearly cancels.
    for part in plan.split(pairs):
        dq += plan.dot(part, key)
    refs["query_grad"][keys] = dq.astype(refs["query_grad"].dtype)
    if plan.head:
        pairs *= plan.dot(query, key, right=True)
        refs["moved"][sums] = _pairs_log_decay(plan, pairs, False) + held
    dk += plan.dot(refs["squares"][(block, *place)], query, left=True)
    refs["key_grad"][keys] = dk.astype(refs["key_grad"].dtype)


def through_solve(plan, refs):
    """Gradients of keys through the solve, of `beta` and of the values."""
    launch = plan.config.solve_gradients
    block, channels, count, place = _place(refs, launch)
    row, chunk, head = place
    size, everything = plan.size, slice(None)
    keys = (row, chunk, everything, head, channels)
    strength = jnp.ones((size,), jnp.float32)
    if "beta" in refs:
        strength = refs["beta"][place]

    def step(values, carry):
        dk, erase, own, wrote_own = carry
        tile = (row, chunk, everything, head, values)
        solved = refs["write_grads"][tile]
        x = solved.astype(jnp.float32)
        if "beta" in refs:
            own += jnp.sum(x * refs["value"][tile].astype(jnp.float32), axis=1)
        if plan.delta:
            wrote = refs["writes"][tile]
            wrote_own += jnp.sum(x * wrote.astype(jnp.float32), axis=1)
            solved = plan.operand(solved)
            erase += plan.dot(solved, wrote, right=True)
            dk += plan.dot(
                solved, refs["states"][(*place, channels, values)], right=True
            )
        if "value_grad" in refs:
            product = x * strength[:, None]
            refs["value_grad"][tile] = product.astype(refs["value_grad"].dtype)
        return dk, erase, own, wrote_own

    dk = jnp.zeros((size, count), jnp.float32)
    erase = jnp.zeros((size, size), jnp.float32)
    none = jnp.zeros((size,), jnp.float32)
    carry = (dk, erase, none, none)
    dk, erase, own, wrote_own = _value_blocks(refs, launch, step, carry)
    first = (block == 0).astype(jnp.float32)
    strength_grad = own * first
    if plan.delta:
        _, into_key, _, _ = head_decays(plan, refs, place)
        key = plan.operand(refs["key"][keys])
        reading = -into_key * jnp.sum(key.astype(jnp.float32) * dk, axis=1)
        strength_grad += reading
        dk *= (strength * -into_key)[:, None]
        erase *= -head_pairs(plan, refs, place, True)
        weighted = erase * strength[:, None]
        refs["squares"][(block, *place)] = plan.operand(weighted)
        barrier(plan)
        dk += refs["partial_key_grad"][keys].astype(jnp.float32)
        dk += plan.dot(plan.operand(weighted), key)
        dk += plan.dot(refs["squares"][(block, *place)], key, left=True)
        refs["key_grad"][keys] = dk.astype(refs["key_grad"].dtype)
        if "beta" in refs or plan.head:
            weighted = erase * plan.dot(key, key, right=True)
            strength_grad += jnp.sum(weighted, axis=1)
        if plan.head:
            refs["reading"][(block, *place)] = reading * strength
            weighted *= strength[:, None]
            erased = _pairs_log_decay(plan, weighted, plan.exclusive)
            refs["erased"][(block, *place)] = erased
        # Where a strength is not 0, `X U / beta` is its gradient too, and keeps more
        # digits when keys are correlated.
        positive = jnp.abs(strength) > 1e-20
        exact = wrote_own * first / jnp.where(positive, strength, 1.0)
        strength_grad = jnp.where(positive, exact, strength_grad)
    if "beta" in refs:
        refs["strength"][(block, *place)] = strength_grad
