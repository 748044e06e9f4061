"""The memory scan of one token, over all memories, as a Pallas kernel for GPUs."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from keras_mom_kernels.memory_scan.configurations import power_of_two

# Value channels a program takes: few, so that a small batch fills a chip too.
_BLOCK_V = 16


def step_memories(
    rule, interpret, query, key, value, log_decay, beta, weights, active, state
):
    """A program takes some value channels of a head, and one memory after the other.

    Args:
        rule: `keras_mom_kernels.memory_step.jax.Rule`.
        interpret: whether to run in Pallas' interpreter.
        query, key, value, log_decay, beta, weights, active, state: as `memory_step`
            takes them.

    Returns:
        Mixed output, float32 `[B, H, V]`, and the new states.
    """
    batch, memories, heads, key_dim, value_dim = state.shape
    block_k = power_of_two(key_dim)
    inputs = dict(
        query=query,
        key=key,
        value=value,
        log_decay=log_decay,
        beta=beta,
        weights=weights,
        active=active.astype(jnp.int32),
        state=state,
    )
    inputs = {name: x for name, x in inputs.items() if x is not None}
    names = (*inputs, "output", "new_state")

    def body(*refs):
        _step(rule, block_k, dict(zip(names, refs)))

    # The lowering names kernels so.
    body.__name__ = "step_memories"
    output, state = pl.pallas_call(
        body,
        grid=(pl.cdiv(value_dim, _BLOCK_V), heads, batch),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, value_dim), jnp.float32),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ],
        input_output_aliases={list(inputs).index("state"): 1},
        compiler_params=plgpu.CompilerParams(
            num_warps=max(1, block_k * _BLOCK_V // 512), num_stages=1
        ),
        interpret=interpret,
        name="step_memories",
    )(*inputs.values())
    return output, state


def _step(rule, block_k, refs):
    memories, _, key_dim, value_dim = refs["state"].shape[1:]
    head, row = pl.program_id(1), pl.program_id(2)
    start = pl.program_id(0) * _BLOCK_V
    keys, values = pl.ds(0, block_k), pl.ds(start, _BLOCK_V)
    in_k = jax.lax.broadcasted_iota(jnp.int32, (block_k,), 0) < key_dim
    in_v = start + jax.lax.broadcasted_iota(jnp.int32, (_BLOCK_V,), 0) < value_dim

    def step(memory, total):
        place = (row, memory, head)
        used = refs["active"][row, memory] != 0
        # A memory that does not take the token has no channels.
        of_k, of_v = in_k & used, in_v & used
        tile = of_k[:, None] & of_v[None, :]

        def load(name, where, mask):
            x = plgpu.load(refs[name].at[where], mask=mask, other=0)
            return x.astype(jnp.float32)

        query, key = (load(name, (*place, keys), of_k) for name in ("query", "key"))
        written = load("value", (*place, values), of_v)
        old = decayed = load("state", (*place, keys, values), tile)
        if "log_decay" in refs and len(refs["log_decay"].shape) == 3:
            decayed = jnp.exp(refs["log_decay"][place].astype(jnp.float32)) * old
        elif "log_decay" in refs:
            decayed = jnp.exp(load("log_decay", (*place, keys), of_k))[:, None] * old
        if rule.write == "delta":
            read_from = old if rule.erase_before_decay else decayed
            written -= jnp.sum(key[:, None] * read_from, axis=0)
        if "beta" in refs:
            written *= refs["beta"][place].astype(jnp.float32)
        new = decayed + key[:, None] * written[None, :]
        plgpu.store(refs["new_state"].at[(*place, keys, values)], new, mask=tile)
        read_from = old if rule.read_before_update else new
        read = jnp.sum(query[:, None] * read_from, axis=0)
        weight = rule.scale * refs["weights"][row, memory].astype(jnp.float32)
        return total + jnp.where(of_v, weight * read, 0.0)

    total = jnp.zeros((_BLOCK_V,), jnp.float32)
    total = jax.lax.fori_loop(0, memories, step, total)
    plgpu.store(refs["output"].at[row, head, values], total, mask=in_v)
