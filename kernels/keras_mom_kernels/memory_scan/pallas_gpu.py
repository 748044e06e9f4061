"""The recurrence between chunks on GPUs: Pallas kernels in its Triton lowering.

With the factors of `chunk_factors`, of which `U0` are the writes into an empty state:

    U = U0 - W S                S_next = whole S + E^T U
    dU = L + E N                dS = R + whole N - W^T dU

A program hands one head's state, of some value channels, through one segment. All
that is special to this lowering is here.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def hand_on(factors, writes, offsets, initial, interpret=False):
    """States before each chunk, what its rows write, and the states behind segments.

    Args:
        factors: dict: `weights` W `[B, G, H, C, K]` or None for additive writes,
            `ending` E `[B, G, H, C, K]`, `whole` float32 `[B, G, H, K or 1]` or None
            for no decay. W and E are of one dtype, which the products take; `rest` is
            what rounding to it took from E, in the same dtype, or None.
        writes: float32 U0 `[B, G, H, C, V]`.
        offsets: int32 `[B, S + 1]`: segment s of a batch row holds the chunks
            `offsets[s]` to `offsets[s + 1] - 1`.
        initial: float32 `[B, S, H, K, V]`, or None for zeros.
        interpret: whether to run in Pallas' interpreter.

    Returns:
        States float32 `[B, G, H, K, V]`, U float32 `[B, G, H, C, V]` and final states
        float32 `[B, S, H, K, V]`. Chunks of no segment are left as they come.
    """
    batch, chunks, heads, _, width = writes.shape
    key_dim, segments = factors["ending"].shape[-1], offsets.shape[1] - 1
    states = (batch, chunks, heads, key_dim, width)
    final = (batch, segments, heads, key_dim, width)
    inputs = dict(factors, writes=writes, offsets=offsets, first=initial)
    outputs = dict(states=states, written=writes.shape, last=final)
    return _call(_hand_on, inputs, outputs, interpret)


def hand_back(factors, local, reads, offsets, last, interpret=False):
    """Gradients of the states behind each chunk, of writes, and of first states.

    Args:
        factors, offsets, interpret: as in `hand_on`, without `rest`.
        local: float32 L `[B, G, H, C, V]`: what the outputs give to the writes.
        reads: float32 R `[B, G, H, K, V]`: what they give to the states before chunks.
        last: float32 `[B, S, H, K, V]`: gradient of the final states.

    Returns:
        N float32 `[B, G, H, K, V]`, dU float32 `[B, G, H, C, V]`, and dS of segments'
        first states, float32 `[B, S, H, K, V]`.
    """
    inputs = dict(factors, local=local, reads=reads, offsets=offsets, first=last)
    outputs = dict(states=reads.shape, written=local.shape, last=last.shape)
    return _call(_hand_back, inputs, outputs, interpret)


def _call(kernel, inputs, outputs, interpret):
    inputs = {name: x for name, x in inputs.items() if x is not None}
    batch, segments, heads, key_dim, width = outputs["last"]
    block = min(width, 64 if key_dim <= 64 else 32)
    names = (*inputs, *outputs)

    def body(*refs):
        refs = dict(zip(names, refs))
        program, head = pl.program_id(0), pl.program_id(1)
        values = pl.ds(pl.program_id(2) * block, block)
        row, segment = program // segments, program % segments
        begin, end = refs["offsets"][row, segment], refs["offsets"][row, segment + 1]
        place = (row, segment, head, slice(None), values)
        state = jnp.zeros((key_dim, block), jnp.float32)
        if "first" in refs:
            state = refs["first"][place]
        step = functools.partial(kernel, refs, row, head, values, begin, end)
        refs["last"][place] = jax.lax.fori_loop(0, end - begin, step, state)

    call = pl.pallas_call(
        body,
        grid=(batch * segments, heads, width // block),
        out_shape=[jax.ShapeDtypeStruct(x, jnp.float32) for x in outputs.values()],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )
    return call(*inputs.values())


def _hand_on(refs, row, head, values, begin, end, step, state):
    place = (row, begin + step, head)
    refs["states"][(*place, slice(None), values)] = state
    write = refs["writes"][(*place, slice(None), values)]
    if "weights" in refs:
        write -= _product(refs["weights"][place], state)
    refs["written"][(*place, slice(None), values)] = write
    if "whole" in refs:
        state *= refs["whole"][place][:, None]
    state += _product(refs["ending"][place], write, True, split=True)
    if "rest" in refs:
        state += _product(refs["rest"][place], write, True)
    return state


def _hand_back(refs, row, head, values, begin, end, step, state):
    place = (row, end - 1 - step, head)
    refs["states"][(*place, slice(None), values)] = state
    grad = refs["local"][(*place, slice(None), values)]
    grad += _product(refs["ending"][place], state)
    refs["written"][(*place, slice(None), values)] = grad
    if "whole" in refs:
        state *= refs["whole"][place][:, None]
    state += refs["reads"][(*place, slice(None), values)]
    if "weights" in refs:
        state -= _product(refs["weights"][place], grad, transposed=True)
    return state


def _product(x, y, transposed=False, split=False):
    """`x y`, or `x^T y`, in the dtype of `x`, with float32 sums.

    With `split` a bfloat16 product takes `y` in two operands.
    """
    contracted = ((0,) if transposed else (1,), (0,))

    def product(y):
        return jax.lax.dot_general(
            x,
            y,
            (contracted, ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    rounded = y.astype(x.dtype)
    total = product(rounded)
    if split and x.dtype == jnp.bfloat16:
        total += product((y - rounded.astype(jnp.float32)).astype(x.dtype))
    return total
