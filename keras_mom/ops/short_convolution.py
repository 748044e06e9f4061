"""Short causal convolution, depthwise, over sequences and packed sequences."""

from keras import ops

from keras_mom.ops.dispatch import dispatch, register
from keras_mom.ops.padding import pad


def short_convolution(
    inputs,
    kernel,
    *,
    segment_ids=None,
    initial_state=None,
    return_state=False,
    activation="silu",
    implementation=None,
):
    """Mixes each channel with its own last rows.

    `y_t = activation(sum_i kernel[i] * x_{t - width + 1 + i})`, where rows before the
    first one, or of another segment, count as zeros or come from the state.

    Args:
        inputs: float `[B, T, channels]`.
        kernel: float `[width, channels]`; the last row meets the current input.
        segment_ids: integer `[B, T]`: rows of another segment are not read. The
            initial state belongs to the segment of the first row. None means one
            segment a batch row.
        initial_state: float `[B, width - 1, channels]`, the inputs before the first,
            or None for zeros.
        return_state: whether to return the last `width - 1` inputs too.
        activation: `"silu"` or None.
        implementation: as in `keras_mom.ops.memory_scan`.

    Returns:
        `[B, T, channels]` of the dtype of `inputs`; with `return_state` also the
        state, `[B, width - 1, channels]` of the same dtype. Rows of the state that
        are not of the last row's segment are zeros.

    Raises:
        ValueError: if a shape or `activation` does not fit.
    """
    inputs, kernel = ops.convert_to_tensor(inputs), ops.convert_to_tensor(kernel)
    if len(inputs.shape) != 3:
        raise ValueError(
            "`inputs` must have shape [B, T, channels]. "
            f"Received: {tuple(inputs.shape)}"
        )
    batch, length, channels = inputs.shape
    if len(kernel.shape) != 2 or kernel.shape[1] != channels:
        raise ValueError(
            f"`kernel` must have shape [width, {channels}]. "
            f"Received: {tuple(kernel.shape)}"
        )
    if activation not in ("silu", None):
        raise ValueError(
            f"`activation` must be 'silu' or None. Received: {activation!r}"
        )
    if segment_ids is not None:
        segment_ids = ops.convert_to_tensor(segment_ids)
        _check_shape("segment_ids", segment_ids, (batch, length))
    if initial_state is not None:
        initial_state = ops.convert_to_tensor(initial_state)
        expected = (batch, kernel.shape[0] - 1, channels)
        _check_shape("initial_state", initial_state, expected)
    output, state = dispatch(
        "short_convolution",
        implementation,
        inputs,
        kernel,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=return_state,
        activation=activation,
    )
    return (output, state) if return_state else output


@register("short_convolution", "portable")
def _portable(inputs, kernel, *, segment_ids, initial_state, return_state, activation):
    # The taps are summed in float32, whatever the inputs' dtype.
    dtype = inputs.dtype
    inputs, kernel = ops.cast(inputs, "float32"), ops.cast(kernel, "float32")
    history = kernel.shape[0] - 1
    length = ops.shape(inputs)[1]
    if initial_state is None:
        extended = pad(inputs, 1, before=history)
    else:
        initial_state = ops.cast(initial_state, inputs.dtype)
        extended = ops.concatenate([initial_state, inputs], axis=1)
    if segment_ids is not None:
        first = ops.repeat(segment_ids[:, :1], history, axis=1)
        extended_ids = ops.concatenate([first, segment_ids], axis=1)
    output = inputs * kernel[history]
    for i in range(history):
        tap = extended[:, i : i + length]
        if segment_ids is not None:
            same = extended_ids[:, i : i + length] == segment_ids
            tap = ops.where(same[..., None], tap, ops.zeros((), tap.dtype))
        output = output + tap * kernel[i]
    if activation == "silu":
        output = ops.silu(output)
    output = ops.cast(output, dtype)
    if not return_state:
        return output, None
    state = extended[:, length:]
    if segment_ids is not None:
        same = extended_ids[:, length:] == extended_ids[:, -1:]
        state = ops.where(same[..., None], state, ops.zeros((), state.dtype))
    return output, ops.cast(state, dtype)


def _check_shape(name, tensor, expected):
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        a is None or b is None or a == b for a, b in zip(shape, expected)
    )
    if not fits:
        raise ValueError(
            f"`{name}` must have shape {list(expected)} to fit `inputs`. "
            f"Received: {shape}"
        )
