"""Pallas kernels of the memory scan on GPUs that work chunk by chunk.

The counterpart of `triton_forward` and `triton_backward`, without decay or with one a
head. `scan_chunks` hands the state of a segment on, `scan_gradients` its gradient
back; a program works on one head and a block of value channels.

Source: arXiv 2406.06484 and 2412.06464; "erase before decay" reads with the decay of
the row before.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from keras_mom_kernels.memory_scan.pallas_common import call, head_decays, square

_DECAYS = ("coarse", "fine", "key_coarse", "key_fine", "counts")


def forward(plan, tensors, *wanted):
    """Hands states on, and returns those of these results that are wanted.

    Args:
        plan: `Plan`.
        tensors: dict: `query`, `key` `[B, G, C, H, K]`, `value` `[B, G, C, H, V]`,
            `beta`, and the parts of the decays, float32 `[B, G, H, C]`, `counts` of
            resets, int32 `[B, G, C]`, `offsets` `[B, S + 1]`, `initial` float32
            `[B, S, H, K, V]`, and what `prepare` returns. None for those that a call
            does not have; without `value`, values are zeros.
        wanted: `"output"` `[B, G, C, H, V]` of the values' dtype; `"final"`, float32
            `[B, S, H, K, V]`; and in the dtype of operands `"states"` before each
            chunk, `[B, G, H, K, V]`, and `"writes"`, what rows write,
            `[B, G, C, H, V]`.

    Returns:
        Dict.
    """
    value = tensors["value"]
    names = ["key", "value", "beta", *_DECAYS, "inverse", "offsets", "initial"]
    if "output" in wanted:
        names += ["query", "attention"]
    launch = plan.config.scan if "output" in wanted else plan.config.states
    width = tensors["initial" if value is None else "value"].shape[-1]
    states, final, grid = _sizes(tensors, width, launch)
    outputs = dict(
        output=None
        if value is None
        else jax.ShapeDtypeStruct(value.shape, value.dtype),
        final=jax.ShapeDtypeStruct(final, jnp.float32),
        states=jax.ShapeDtypeStruct(states, plan.narrow),
        writes=None
        if value is None
        else jax.ShapeDtypeStruct(value.shape, plan.narrow),
    )
    inputs = {name: tensors.get(name) for name in names}
    outputs = {name: outputs[name] for name in wanted}
    return call(scan_chunks, plan, launch, grid, inputs, outputs)


def backward(plan, tensors, *wanted):
    """Hands gradients of states back, and returns those of these results wanted.

    Args:
        plan: `Plan`.
        tensors: dict of what `forward` takes, but for `initial`, and `output_grad`
            and `final_grad`, or None for zeros.
        wanted: `"state_grads"`, of the states behind each chunk, `[B, G, H, K, V]` in
            the dtype of operands; `"write_grads"`, what the solve hands back,
            `[B, G, C, H, V]` in that of the values; `"initial_grad"`, of first
            states, float32 `[B, S, H, K, V]`.

    Returns:
        Dict.
    """
    launch, value = plan.config.reverse, tensors["value"]
    states, final, grid = _sizes(tensors, value.shape[-1], launch)
    outputs = dict(
        state_grads=jax.ShapeDtypeStruct(states, plan.narrow),
        write_grads=jax.ShapeDtypeStruct(value.shape, value.dtype),
        initial_grad=jax.ShapeDtypeStruct(final, jnp.float32),
    )
    names = ("query", "key", "beta", *_DECAYS, "attention", "inverse", "offsets")
    inputs = {name: tensors.get(name) for name in (*names, "output_grad", "final_grad")}
    outputs = {name: outputs[name] for name in wanted}
    return call(scan_gradients, plan, launch, grid, inputs, outputs)


def _sizes(tensors, width, launch):
    """Shapes of states and of final states, and the grid, for V channels."""
    key, offsets = tensors["key"], tensors["offsets"]
    batch, chunks, _, heads, key_dim = key.shape
    segments, state = offsets.shape[1] - 1, (heads, key_dim, width)
    grid = (width // min(launch.block_v, width), heads, batch * segments)
    return (batch, chunks, *state), (batch, segments, *state), grid


def _program(refs, block):
    """Value channels, head, batch row, segment and its chunks, of a program.

    The last segments of all batch rows come first: a layer's shared memory, which has
    more rows than any other, is the last of its batch row, and would be waited for.
    """
    batch, segments = refs["offsets"].shape
    place = pl.program_id(2)
    row, segment = place % batch, segments - 2 - place // batch
    begin, end = refs["offsets"][row, segment], refs["offsets"][row, segment + 1]
    values = pl.ds(pl.program_id(0) * block, block)
    return values, pl.program_id(1), row, segment, begin, end


def scan_chunks(plan, refs):
    """Hands the state of a segment's head from chunk to chunk."""
    launch = plan.config.scan if "output" in refs else plan.config.states
    key_dim = refs["key"].shape[-1]
    width = refs["value" if "value" in refs else "initial"].shape[-1]
    block = min(launch.block_v, width)
    values, head, row, segment, begin, end = _program(refs, block)
    everything = slice(None)
    final = (row, segment, head, everything, values)

    def step(count, state):
        chunk = begin + count
        place = (row, chunk, head)
        keys = (row, chunk, everything, head, everything)
        tile = (row, chunk, everything, head, values)
        key, before = plan.operand(refs["key"][keys]), plan.operand(state)
        if "states" in refs:
            refs["states"][(*place, everything, values)] = before
        into_query, into_key, to_end, whole = head_decays(plan, refs, place)

        # What each row writes.
        write = jnp.zeros((plan.size, block), jnp.float32)
        if "value" in refs:
            write = refs["value"][tile].astype(jnp.float32)
        if plan.delta:
            write -= plan.dot(key, before) * into_key[:, None]
        if "beta" in refs:
            write *= refs["beta"][place][:, None]
        if plan.delta:
            write = square(plan, "inverse", refs, place, write)

        # What each row reads.
        if "writes" in refs:
            refs["writes"][tile] = plan.operand(write)
        if "output" in refs:
            query = plan.operand(refs["query"][keys])
            out = plan.dot(query, before) * into_query[:, None]
            out += square(plan, "attention", refs, place, write)
            if plan.parts == 2:
                rest = plan.split(write)[1]
                out += plan.dot(refs["attention"][(*place, 0)], rest)
            refs["output"][tile] = (out * plan.scale).astype(refs["output"].dtype)

        # The state behind the chunk.
        state *= whole[:, None]
        for part in plan.split(write * to_end[:, None]):
            state += plan.dot(key, part, left=True)
        return state

    state = jnp.zeros((key_dim, block), jnp.float32)
    if "initial" in refs:
        state = refs["initial"][final]
    state = jax.lax.fori_loop(0, end - begin, step, state)
    if "final" in refs:
        refs["final"][final] = state


def scan_gradients(plan, refs):
    """Hands the gradient of a segment's state back from chunk to chunk."""
    key_dim, width = refs["key"].shape[-1], refs["output_grad"].shape[-1]
    block = min(plan.config.reverse.block_v, width)
    values, head, row, segment, begin, end = _program(refs, block)
    everything = slice(None)
    final = (row, segment, head, everything, values)

    def step(count, state_grad):
        chunk = end - 1 - count
        place = (row, chunk, head)
        keys = (row, chunk, everything, head, everything)
        tile = (row, chunk, everything, head, values)
        next_grad = plan.operand(state_grad)
        if "state_grads" in refs:
            refs["state_grads"][(*place, everything, values)] = next_grad
        into_query, into_key, to_end, whole = head_decays(plan, refs, place)

        # Gradient of what each row writes, from the outputs and the state.
        out = plan.operand(refs["output_grad"][tile])
        grad = square(plan, "attention", refs, place, out, True) * plan.scale
        key = plan.operand(refs["key"][keys])
        grad += plan.dot(key, next_grad) * to_end[:, None]
        if plan.delta:
            grad = square(plan, "inverse", refs, place, grad, True)
        if "write_grads" in refs:
            refs["write_grads"][tile] = grad.astype(refs["write_grads"].dtype)

        # Gradient of the state before the chunk.
        query = plan.operand(refs["query"][keys])
        read = out.astype(jnp.float32) * (into_query * plan.scale)[:, None]
        state_grad *= whole[:, None]
        state_grad += plan.dot(query, plan.operand(read), left=True)
        if plan.delta:
            if "beta" in refs:
                grad *= refs["beta"][place][:, None]
            for part in plan.split(grad * into_key[:, None]):
                state_grad -= plan.dot(key, part, left=True)
        return state_grad

    state_grad = jnp.zeros((key_dim, block), jnp.float32)
    if "final_grad" in refs:
        state_grad = refs["final_grad"][final]
    state_grad = jax.lax.fori_loop(0, end - begin, step, state_grad)
    if "initial_grad" in refs:
        refs["initial_grad"][final] = state_grad
