"""The short convolution of packed rows on JAX, through Pallas kernels on GPUs.

    from keras_mom_kernels.packed_convolution.jax import packed_convolution

One kernel takes the rows, convolves and normalizes them; each row is read and written
once. The backward pass keeps the inputs alone. Where batch or groups of channels are
sharded, each device computes its shard.
"""

import functools

import jax
import jax.numpy as jnp

from keras_mom_kernels.jax_partitioning import by_shards
from keras_mom_kernels.packed_convolution import pallas_rows

# Channels of a head that a program holds in one piece.
_WIDEST_HEAD = 1024
# Channels of a group that is not normalized.
_GROUP = 128


def packed_convolution(
    inputs: jax.Array,
    kernel: jax.Array,
    source: jax.Array,
    targets: jax.Array,
    *,
    documents: jax.Array | None = None,
    activation: str | None = "silu",
    heads: int | None = None,
    epsilon: float = 1e-6,
    interpret: bool = False,
) -> jax.Array:
    """Takes rows into a packed layout and mixes each with the rows before it.

    With `x_r = inputs[source[r]]`, and zeros for an empty row:

        y_r = activation(sum_i kernel[i] * x_{r - W + i})       i from 0 to W
        y_r = y_r / sqrt(sum(y_r^2) + epsilon)                  a head, with `heads`

    Rows before row 0 count as zeros. Sums are float32. Differentiable in inputs and
    kernel, once.

    Args:
        inputs: float32, bfloat16 or float16 `[B, S, E]`. Rows that `source` does not
            name may hold anything.
        kernel: floating `[W + 1, E]`; its last row meets the current row.
        source: int32 `[B, R]`, the row of `inputs` in each packed row, -1 for an empty
            row. Its values are not checked.
        targets: int32 `[B, S, J]`, the packed rows that each row of `inputs` goes to,
            -1 for none: the inverse of `source`. The gradient needs it.
        documents: int32 `[B, R]`, or None for one document: rows of another document
            are not read.
        activation: `"silu"` or None.
        heads: number of heads to L2-normalize, a divisor of E, or None.
        epsilon: keeps the norm of an all-zero vector finite.
        interpret: whether the kernels run in Pallas' interpreter, for tests.

    Returns:
        `[B, R, E]`, of the dtype of `inputs`. Empty rows are zeros.

    Raises:
        NotImplementedError: if the kernels cannot serve the call, with the reason.
    """
    if inputs.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"no Pallas kernel for {inputs.dtype}")
    if activation not in ("silu", None):
        raise NotImplementedError(f"no Pallas kernel for activation={activation!r}")
    batch, length, width = inputs.shape
    if heads is not None and (width % heads or width // heads > _WIDEST_HEAD):
        raise NotImplementedError(
            f"the Pallas kernels normalize heads of up to {_WIDEST_HEAD} channels, not "
            f"{heads} heads of {width} channels"
        )
    rows = source.shape[1]
    if max(length, rows) * width >= 2**31:
        raise NotImplementedError(
            "the Pallas kernels take batch rows of up to 2**31 elements, not "
            f"{max(length, rows)} rows of {width}"
        )
    if not rows or not length:
        return jnp.zeros((batch, rows, width), inputs.dtype)
    groups = _groups(width) if heads is None else heads
    plan = pallas_rows.Plan(
        activation == "silu", heads is not None, float(epsilon), interpret
    )
    split = (groups, width // groups)
    # One a batch row: so are its gradients, wherever the row is computed.
    kernels = jnp.broadcast_to(kernel, (batch, *kernel.shape))
    output = _function(plan)(
        inputs.reshape(batch, length, *split),
        kernels.reshape(batch, -1, *split),
        source.astype(jnp.int32),
        targets.astype(jnp.int32),
        None if documents is None else documents.astype(jnp.int32),
    )
    return output.reshape(batch, rows, width)


def _groups(width):
    """The fewest groups of up to so many channels, all of one size."""
    least = -(-width // _GROUP)
    return next(n for n in range(least, width + 1) if width % n == 0)


_ROWS = "batch rows heads width"
_INPUTS = "batch tokens heads width"
_KERNELS = "batch taps heads width"
_PLACES = "batch rows"


@functools.cache
def _function(plan):
    """The convolution with its gradient, of groups of channels."""

    def forward(inputs, kernel, source, targets, documents):
        run = by_shards(
            lambda *x: (pallas_rows.convolve(plan, *x),),
            (_INPUTS, _KERNELS, _PLACES, _PLACES),
            (_ROWS,),
        )
        (output,) = run(inputs, kernel, source, documents)
        return output, (inputs, kernel, source, targets, documents)

    def backward(residuals, output_grad):
        run = by_shards(
            functools.partial(_gradients, plan),
            (_ROWS, _INPUTS, _KERNELS, _PLACES, "batch tokens slots", _PLACES),
            (_INPUTS, _KERNELS),
        )
        return *run(output_grad, *residuals), None, None, None

    # Of all layers of a model that call it alike, one is traced and lowered.
    function = jax.custom_vjp(jax.jit(lambda *tensors: forward(*tensors)[0]))
    function.defvjp(jax.jit(forward), jax.jit(backward))
    return function


def _gradients(plan, output_grad, inputs, kernel, source, targets, documents):
    """Of the inputs and of the kernels."""
    sum_grads, shares = pallas_rows.sum_gradients(
        plan, output_grad, inputs, kernel, source, documents
    )
    input_grad = pallas_rows.input_gradients(
        plan, sum_grads, kernel, targets, documents
    )
    return input_grad, jnp.sum(shares, 1).astype(kernel.dtype)
