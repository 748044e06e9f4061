"""One token through a layer's memories, on torch through Triton kernels.

    from keras_mom_kernels.memory_step.torch import convolution_step, memory_step

What decoding needs between the projections of a token and its mixed output: a launch
each for routing, convolution and memories, with nothing read back to the host and
nothing of a data-dependent shape, so that they are captured in CUDA graphs. Runs where
the memory scan does. None has a gradient. No kernel uses atomics; a batch row's results
do not depend on the others.
"""

import torch

from keras_mom_kernels.memory_scan.torch import check_served
from keras_mom_kernels.memory_step.torch_launches import (
    launch_convolution,
    launch_spread,
    launch_step,
    new_output,
    new_routing,
    new_rows,
)


def memory_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    log_decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    weights: torch.Tensor,
    active: torch.Tensor,
    state: torch.Tensor,
    write: str = "delta",
    erase_before_decay: bool = False,
    read_before_update: bool = False,
    scale: float | None = None,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes a token to the memories that take it, reads them, and mixes what they say.

    Per head and active memory m, with `g = log_decay`:

        S' = diag(exp(g)) S_m
        r  = k^T S'                     (k^T S_m with `erase_before_decay`)
        S_m <- S' + k (beta (v - r))^T  (`r = 0` for additive writes)
        output = sum over m of weights_m * scale * q^T S_m

    A memory that is not active is neither read nor changed, whatever its inputs hold.

    Args:
        query, key: float32, bfloat16 or float16 `[B, M, H, K]`, K up to 256.
        value: `[B, M, H, V]`, V up to 256.
        log_decay: `[B, M, H]` or `[B, M, H, K]`; None for no decay.
        beta: write strength `[B, M, H]`, or None for 1.
        weights: `[B, M]`.
        active: bool or int32 `[B, M]`: the memories that take the token.
        state: float32 `[B, M, H, K, V]`.
        write: `"delta"` or `"additive"`.
        erase_before_decay: whether the delta rule reads the state before its decay.
        read_before_update: whether the query reads the state before decay and write.
        scale: factor of the query, `K ** -0.5` by default.
        in_place: whether `state`, which is contiguous then, is updated and returned.

    Returns:
        Mixed output, float32 `[B, H, V]`, and the state behind the token.

    Raises:
        NotImplementedError: if the kernels cannot serve the call, with the reason; an
            input that needs a gradient is one.
    """
    check_served(query, key, value, "key", log_decay)
    _check_gradients(query, key, value, log_decay, beta, weights, state)
    _check_state("state", state)
    if in_place and not state.is_contiguous():
        raise NotImplementedError("a state that is updated in place is contiguous")
    tensors = (query, key, value, log_decay, beta, weights, _integers(active), state)
    tensors = [None if x is None else x.contiguous() for x in tensors]
    scale = key.shape[-1] ** -0.5 if scale is None else float(scale)
    options = (write, erase_before_decay, read_before_update, scale)
    if in_place:
        return _step_in_place(*tensors, *options), state
    return _step(*tensors, *options)


def convolution_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernels: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    window: torch.Tensor | None,
    active: torch.Tensor,
    *,
    activations: tuple[str | None, ...] = ("silu", "silu", "silu"),
    normalized: tuple[bool, bool] = (False, False),
    heads: int,
    set_of_memory: tuple[int, ...],
    epsilon: float = 1e-6,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A token's query, key and value in every memory, behind the short convolution.

    Args:
        query: float32, bfloat16 or float16 `[B, H * K]`, shared by the memories.
        key: `[B, P, H * K]`, by projection set.
        value: `[B, P, H * V]`.
        kernels: of query, key and value, `[W + 1, H * K or H * V]` each; the last row
            meets the token. None for no convolution.
        window: float32 `[B, M, W, H * (2 * K + V)]`: the last inputs that each memory
            took, of query, key and value side by side. None without `kernels`.
        active: bool or int32 `[B, M]`: the memories that take the token.
        activations: `"silu"` or None for query, key and value.
        normalized: whether each head of query and key is L2-normalized behind that.
        heads: H.
        set_of_memory: the projection set of each of the M memories.
        epsilon: of the normalization `x / sqrt(sum(x^2) + epsilon)`.
        in_place: whether `window`, which is contiguous then, is updated and returned.

    Returns:
        Query, key and value `[B, M, H, K or V]`, of the dtypes of the inputs, and the
        window behind the token, or None. Memories that are not active get zeros, and
        keep their window bit for bit.

    Raises:
        NotImplementedError: if the kernels cannot serve the call, with the reason; an
            input that needs a gradient is one.
        ValueError: if one of `kernels` and `window` is given without the other.
    """
    rows = [x.unflatten(-1, (heads, -1)) for x in (query, key, value)]
    check_served(rows[0], rows[1], rows[2], "key", None)
    _check_gradients(query, key, value, *(kernels or ()), window)
    if (kernels is None) != (window is None):
        raise ValueError("`kernels` and `window` are given together, or neither is")
    if window is not None:
        _check_state("window", window)
    if in_place and (window is None or not window.is_contiguous()):
        raise NotImplementedError("a window that is updated in place is contiguous")
    tensors = (query, key, value, *(kernels or [None] * 3), window, _integers(active))
    tensors = [None if x is None else x.contiguous() for x in tensors]
    options = (
        [activation == "silu" for activation in activations],
        [bool(x) for x in normalized],
        heads,
        list(set_of_memory),
        epsilon,
    )
    if in_place:
        return *_convolve_in_place(*tensors, *options), window
    *rows, moved = _convolve(*tensors, *options)
    return *rows, None if kernels is None else moved


def spread_routing(
    weights: torch.Tensor,
    indices: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    num_memories: int,
    shared: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token's routing by memory, as the other functions take it.

    Args:
        weights: float `[B, k]`.
        indices: int32 `[B, k]`, which of the routed memories take the token.
        mask: bool `[B]`: whether there is a token, or None.
        num_memories: of the routed ones.
        shared: whether there is one more memory, which takes every token with weight 1.

    Returns:
        Weights, float32 `[B, M]`, and bool `[B, M]`: the memories that take the token;
        M counts the shared one, which is last.

    Raises:
        NotImplementedError: as of the others.
    """
    check_served(weights, weights, weights, "key", None)
    _check_gradients(weights)
    tensors = (weights, indices, None if mask is None else _integers(mask))
    tensors = [None if x is None else x.contiguous() for x in tensors]
    return _spread(*tensors, num_memories, shared)


def _integers(active):
    """bool as bytes, without a copy."""
    return active.view(torch.uint8) if active.dtype == torch.bool else active


def _check_gradients(*tensors):
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tensors
    ):
        raise NotImplementedError(
            "the Triton kernels of a single token have no gradient; call them under "
            "torch.no_grad()"
        )


def _check_state(name, tensor):
    if tensor.dtype != torch.float32:
        raise NotImplementedError(
            f"the Triton kernels keep a float32 {name}, not {tensor.dtype}"
        )


@torch.library.custom_op("keras_mom_kernels::memory_step", mutates_args=())
def _step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    weights: torch.Tensor,
    active: torch.Tensor,
    state: torch.Tensor,
    write: str,
    erase_before_decay: bool,
    read_before_update: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = (query, key, value, log_decay, beta, weights, active, state)
    options = (write, erase_before_decay, read_before_update, scale)
    new_state = torch.empty_like(state)
    return launch_step(tensors, new_state, *options), new_state


@_step.register_fake
def _(query, key, value, log_decay, beta, weights, active, state, *options):
    return new_output(value), torch.empty_like(state)


@torch.library.custom_op(
    "keras_mom_kernels::memory_step_in_place", mutates_args=("state",)
)
def _step_in_place(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    weights: torch.Tensor,
    active: torch.Tensor,
    state: torch.Tensor,
    write: str,
    erase_before_decay: bool,
    read_before_update: bool,
    scale: float,
) -> torch.Tensor:
    tensors = (query, key, value, log_decay, beta, weights, active, state)
    options = (write, erase_before_decay, read_before_update, scale)
    return launch_step(tensors, state, *options)


@_step_in_place.register_fake
def _(query, key, value, *others):
    return new_output(value)


@torch.library.custom_op("keras_mom_kernels::convolution_step", mutates_args=())
def _convolve(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_kernel: torch.Tensor | None,
    key_kernel: torch.Tensor | None,
    value_kernel: torch.Tensor | None,
    window: torch.Tensor | None,
    active: torch.Tensor,
    silu: list[bool],
    normalized: list[bool],
    heads: int,
    set_of_memory: list[int],
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    kernels = (query_kernel, key_kernel, value_kernel)
    return launch_convolution(
        (query, key, value),
        kernels,
        window,
        active,
        silu,
        normalized,
        heads,
        set_of_memory,
        epsilon,
        False,
    )


@torch.library.custom_op(
    "keras_mom_kernels::convolution_step_in_place", mutates_args=("window",)
)
def _convolve_in_place(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_kernel: torch.Tensor,
    key_kernel: torch.Tensor,
    value_kernel: torch.Tensor,
    window: torch.Tensor,
    active: torch.Tensor,
    silu: list[bool],
    normalized: list[bool],
    heads: int,
    set_of_memory: list[int],
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value, _ = launch_convolution(
        (query, key, value),
        (query_kernel, key_kernel, value_kernel),
        window,
        active,
        silu,
        normalized,
        heads,
        set_of_memory,
        epsilon,
        True,
    )
    return query, key, value


@torch.library.custom_op("keras_mom_kernels::spread_routing", mutates_args=())
def _spread(
    weights: torch.Tensor,
    indices: torch.Tensor,
    mask: torch.Tensor | None,
    num_memories: int,
    shared: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_spread(weights, indices, mask, num_memories, shared)


@_spread.register_fake
def _(weights, indices, mask, num_memories, shared):
    return new_routing(weights, num_memories + shared)


@_convolve.register_fake
def _(query, key, value, *others):
    window, _, _, _, heads, set_of_memory, _ = others[3:]
    return new_rows((query, key, value), window, heads, set_of_memory)


@_convolve_in_place.register_fake
def _(query, key, value, *others):
    heads, set_of_memory = others[7:9]
    return new_rows((query, key, value), None, heads, set_of_memory)[:3]
