"""The memory scan on JAX, through Pallas kernels on GPUs and TPUs.

    from keras_mom_kernels.memory_scan.jax import memory_scan

`jax_fused` serves GPUs but for decays of key channels; `jax_factors` serves those and
TPUs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from keras_mom_kernels.jax_partitioning import by_shards
from keras_mom_kernels.memory_scan import jax_factors, jax_fused
from keras_mom_kernels.memory_scan.chunked_scan import ScanOptions

# C, the rows of a chunk.
CHUNK_SIZE = 64
# Mosaic's interface still changes: from this release of JAX on, none has been tried.
_UNTRIED = (0, 12)


def memory_scan(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    log_decay=None,
    beta=None,
    write="delta",
    erase_before_decay=False,
    cu_seqlens=None,
    chunk_offsets=None,
    chunk_size=CHUNK_SIZE,
    resets=None,
    initial_state=None,
    scale=None,
    kernels=None,
    interpret=False,
):
    """Writes sequences into matrix-valued memories and reads them back, row by row.

    Per head, with a state `S` of `[K, V]` in float32 and `g_t = log_decay[t]`:

        S'  = diag(exp(g_t)) S_{t-1}
        r_t = k_t^T S'                  (k_t^T S_{t-1} with `erase_before_decay`)
        S_t = S' + k_t (beta_t (v_t - r_t))^T      (`r_t = 0` for additive writes)
        o_t = scale * q_t^T S_t

    Differentiable in query, key, value, log_decay, beta and initial_state.

    Args:
        query, key: float32, bfloat16 or float16 `[B, T, H, K]`.
        value: `[B, T, H, V]`.
        log_decay: at or below zero, `[B, T, H]` or `[B, T, H, K]`; None for no decay.
        beta: write strength `[B, T, H]`, or None for 1.
        write: `"delta"` or `"additive"`.
        erase_before_decay: whether the delta rule reads the state before its decay.
        cu_seqlens: int32 `[S + 1]` with B == 1: sequence s holds the rows
            `cu_seqlens[s]` to `cu_seqlens[s + 1] - 1`; rows behind the last give
            zeros. Its values are not checked.
        chunk_offsets: int32 `[B, S + 1]`: segment s of a batch row holds its chunks
            `chunk_offsets[s]` to `chunk_offsets[s + 1] - 1` of `chunk_size` rows; T is
            a multiple of it, and every chunk belongs to a segment.
        chunk_size: with `chunk_offsets`, a power of two of 16 or more.
        resets: int32 `[B, T]`, 1 at a row before which the state is emptied, or None;
            not with `cu_seqlens`.
        initial_state: float32 `[B, H, K, V]`; `[S, H, K, V]` with `cu_seqlens`,
            `[B, S, H, K, V]` with `chunk_offsets`. None for zeros.
        scale: factor of the query, `K ** -0.5` by default.
        kernels: `"gpu"` or `"tpu"`; `"mosaic"` for those of GPUs with `mosaic_scan` in
            the forward pass, which serves some calls on Hopper GPUs. None for what
            serves the call best on the platform that JAX runs on.
        interpret: whether the kernels run in Pallas' interpreter, for tests.

    Returns:
        Output `[B, T, H, V]`, of the dtype of `value`, and the final state, float32,
        shaped as `initial_state`.

    Raises:
        NotImplementedError: if no kernel serves the call, with the reason.
    """
    automatic = kernels is None
    kernels = platform() if automatic else kernels
    check_served(query, key, value, kernels)
    if chunk_offsets is not None and not 16 <= chunk_size <= CHUNK_SIZE:
        raise NotImplementedError(
            f"the Pallas kernels take chunks of 16 to {CHUNK_SIZE} rows, not "
            f"{chunk_size}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    dtype = value.dtype
    rows = [query, key, value, log_decay, beta]
    size = chunk_size if chunk_offsets is not None else CHUNK_SIZE
    options = ScanOptions(write, bool(erase_before_decay), size, 1, scale)
    tried = automatic and not interpret and jax.__version_info__ < _UNTRIED
    if kernels == "mosaic" or (kernels == "gpu" and tried):
        call = query, key, value, log_decay, resets, options, interpret
        reason = _why_no_mosaic(*call)
        if reason is None:
            kernels = "mosaic"
        elif kernels == "mosaic":
            raise NotImplementedError(reason)
    fused = kernels in ("gpu", "mosaic") and (log_decay is None or log_decay.ndim == 3)
    dtype_of_products = _products(kernels, query, key, value)
    scan = _function(options, kernels, fused, interpret, dtype_of_products)
    if chunk_offsets is not None:
        output, state = scan(*rows, resets, chunk_offsets, initial_state)
    elif cu_seqlens is not None:
        output, state = _packed(scan, size, rows, cu_seqlens, initial_state)
    else:
        output, state = _padded(scan, size, rows, resets, initial_state)
    return jnp.asarray(output, dtype), state


def platform():
    """`"gpu"` or `"tpu"`; raises `NotImplementedError` where JAX has no kernels."""
    config: Any = jax.config
    name, device = jax.default_backend(), config.jax_default_device
    if device is not None:
        name = getattr(device, "platform", device)
    if name not in ("gpu", "tpu"):
        raise NotImplementedError(
            f"the Pallas kernels need a GPU or a TPU; JAX runs on {name!r}"
        )
    if name == "gpu" and not _new_enough():
        raise NotImplementedError("the Pallas kernels need sm_80 or later")
    return name


@functools.cache
def _new_enough():
    device = jax.local_devices(backend="gpu")[0]
    if "rocm" in device.client.platform_version.lower():
        return True
    return float(device.compute_capability) >= 8


def check_served(query, key, value, kernels):
    """Raises `NotImplementedError`, with the reason, for calls without a kernel."""
    if kernels == "gpu" and max(key.shape[-1], value.shape[-1]) > 256:
        raise NotImplementedError(
            "the Pallas kernels for GPUs take key and value channels up to 256, not "
            f"{key.shape[-1]} and {value.shape[-1]}"
        )
    for x in (query, key, value):
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"no Pallas kernel for {x.dtype}")


def _why_no_mosaic(*call):
    """Why `mosaic_scan` does not serve a call, or None."""
    try:
        # Not every JAX has what this imports.
        from keras_mom_kernels.memory_scan import mosaic_scan
    except ImportError:
        return "this JAX has no Mosaic GPU"
    try:
        mosaic_scan.check_served(*call)
    except NotImplementedError as error:
        return str(error)
    return None


def _products(kernels, *tensors):
    """The dtype of the factors that meet the state."""
    dtype = jnp.result_type(*tensors)
    if dtype == jnp.float16 and kernels == "tpu":
        # No TPU multiplies it.
        return jnp.dtype("float32")
    return dtype if dtype in (jnp.bfloat16, jnp.float16) else jnp.dtype("float32")


def _padded(scan, size, rows, resets, initial_state):
    """One sequence a batch row: rows are added, which hold nothing."""
    batch, length = rows[0].shape[:2]
    chunks = max(-(-length // size), 1)
    missing = chunks * size - length
    rows, resets = [_with_rows(x, missing) for x in rows], _with_rows(resets, missing)
    offsets = jnp.tile(jnp.array([[0, chunks]], "int32"), (batch, 1))
    if initial_state is not None:
        initial_state = initial_state[:, None]
    output, state = scan(*rows, resets, offsets, initial_state)
    return output[:, :length], state[:, 0]


def _with_rows(x, missing):
    """`[B, T, ...]` with rows of zeros behind."""
    if x is None or missing == 0:
        return x
    return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])


def _packed(scan, size, rows, cu_seqlens, initial_state):
    """Packed sequences: each is moved to a place that begins with a whole chunk."""
    length, segments = rows[0].shape[1], cu_seqlens.shape[0] - 1
    chunks = -(-(length + segments * (size - 1)) // size)
    starts, lengths = cu_seqlens[:-1], jnp.diff(cu_seqlens)
    offsets = jnp.pad(jnp.cumsum(-(-lengths // size)), (1, 0)).astype("int32")

    def sequence(row, borders):
        found = jnp.searchsorted(borders[1:], row, side="right")
        return jnp.minimum(found, segments - 1)

    # Where each aligned row comes from, and where each packed row went.
    aligned = jnp.arange(chunks * size)
    own = sequence(aligned, offsets * size)
    place = aligned - offsets[own] * size
    source = jnp.where(place < lengths[own], starts[own] + place, length)
    row = jnp.arange(length)
    own = sequence(row, cu_seqlens)
    target = offsets[own] * size + row - starts[own]
    target = jnp.where(row < cu_seqlens[-1], target, chunks * size)

    offsets = offsets.at[-1].set(chunks)[None]
    if initial_state is not None:
        initial_state = initial_state[None]
    rows = [None if x is None else _moved(x, source, target) for x in rows]
    output, state = scan(*rows, None, offsets, initial_state)
    return _moved(output, target, source), state[0]


@jax.custom_vjp
def _moved(x, index, back):
    """Rows `index` of `[1, R, ...]`, zeros for an index behind the last.

    Args:
        x: rows.
        index: integers, the row to take.
        back: for each row of `x`, where it went. JAX' own gradient would add up rows
            one by one, of which none meets another.
    """
    return _taken(x, index)


def _taken(x, index):
    return x.at[:, index].get(mode="fill", fill_value=0)


_moved.defvjp(
    lambda x, index, back: (_taken(x, index), back),
    lambda back, gradient: (_taken(gradient, back), None, None),
)


# Axes of what the scan of aligned rows takes, and of its results.
_AXES = (
    "batch time heads key",
    "batch time heads key",
    "batch time heads value",
    "batch time heads channels",
    "batch time heads",
    "batch time",
    "batch borders",
    "batch segments heads key value",
)
_RESULTS = "batch time heads value", "batch segments heads key value"
# Without a gradient: resets and offsets.
_INTEGERS = (5, 6)


@functools.cache
def _function(options, kernels, fused, interpret, dtype):
    """The scan of aligned rows with its gradient.

    It takes query, key, value, log_decay, beta, resets, chunk_offsets and initial
    state, and returns output and final state.
    """
    form: Any = jax_fused if fused else jax_factors
    how = form.plan(options, kernels, interpret, dtype)

    def forward(*tensors):
        run = functools.partial(form.forward, how)
        output, final, *kept = by_shards(run, _axes(tensors), _RESULTS + form.KEPT)(
            *tensors
        )
        return (output, final), (tensors, kept)

    def backward(residuals, gradients):
        tensors, kept = residuals
        axes = _axes(tensors)
        results = [
            None if x is None or i in _INTEGERS else axes[i]
            for i, x in enumerate(tensors)
        ]
        run = functools.partial(form.backward, how)
        operands = (*_RESULTS, *form.KEPT, *axes)
        return by_shards(run, operands, results)(*gradients, *kept, *tensors)

    # Of all layers of a model that call it alike, one is traced and lowered.
    function = jax.custom_vjp(jax.jit(lambda *tensors: forward(*tensors)[0]))
    function.defvjp(jax.jit(forward), jax.jit(backward))
    return function


def _axes(tensors):
    """The names of all axes; a log decay may be one a head."""
    axes, log_decay = list(_AXES), tensors[3]
    if log_decay is not None and log_decay.ndim == 3:
        axes[3] = "batch time heads"
    return tuple(axes)
