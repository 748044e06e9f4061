"""JAX' array functions under the names that `chunk_algebra` asks for.

`ROUNDED` and `EXACT` differ in how they multiply float32 matrices on accelerators.
"""

import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp


def _slice(x, start, shape):
    return jax.lax.dynamic_slice(x, start, shape)


def _cast(x, dtype):
    return x.astype(dtype)


def _take(x, index, axis=0):
    return jnp.take(x, index, axis=axis, mode="clip")


_FUNCTIONS = dict(
    arange=jnp.arange,
    cast=_cast,
    clip=jnp.clip,
    concatenate=jnp.concatenate,
    convert_to_tensor=jnp.asarray,
    cumsum=jnp.cumsum,
    diagonal=jnp.diagonal,
    exp=jnp.exp,
    floor=jnp.floor,
    matmul=jnp.matmul,
    maximum=jnp.maximum,
    ones_like=jnp.ones_like,
    reshape=jnp.reshape,
    shape=jnp.shape,
    slice=_slice,
    stack=jnp.stack,
    sum=jnp.sum,
    swapaxes=jnp.swapaxes,
    take=_take,
    where=jnp.where,
    zeros=jnp.zeros,
    zeros_like=jnp.zeros_like,
    full_precision=contextlib.nullcontext,
    unit_lower_inverse=None,
)
EXACT = SimpleNamespace(**_FUNCTIONS)
