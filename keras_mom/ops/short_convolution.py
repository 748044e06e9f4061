"""Short causal convolution, depthwise, over sequences and packed sequences."""

from keras import ops

from keras_mom.ops.cu_seqlens import checked_cu_seqlens, sequence_of
from keras_mom.ops.dispatch import dispatch, register
from keras_mom.ops.padding import pad
from keras_mom.ops.rows import gather_rows
from keras_mom.ops.tap_sums import tap_sums


def short_convolution(
    inputs,
    kernel,
    *,
    segment_ids=None,
    cu_seqlens=None,
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
        cu_seqlens: int32 `[S + 1]` with B == 1: packs S sequences, of the rows
            `cu_seqlens[s]` to `cu_seqlens[s + 1] - 1`, each with a state of its own.
            Rows behind the last sequence give zeros.
        initial_state: float `[B or S, width - 1, channels]`, the inputs before the
            first, or None for zeros.
        return_state: whether to return the last `width - 1` inputs too.
        activation: `"silu"` or None.
        implementation: as in `keras_mom.ops.memory_scan`.

    Returns:
        `[B, T, channels]` of the dtype of `inputs`; with `return_state` also the
        state, `[B or S, width - 1, channels]` of the same dtype. Rows of the state that
        are not of the last row's segment are zeros.

    Raises:
        ValueError: if a shape, `cu_seqlens` or `activation` does not fit.
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
    sequences = batch
    if cu_seqlens is not None:
        if batch != 1 or segment_ids is not None:
            raise ValueError(
                "`cu_seqlens` packs sequences in one batch row, and takes the place of "
                f"`segment_ids`. Received: `inputs` of shape {tuple(inputs.shape)}, "
                f"segment_ids={segment_ids}"
            )
        cu_seqlens = checked_cu_seqlens(cu_seqlens, "inputs", length)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        initial_state = ops.convert_to_tensor(initial_state)
        expected = (sequences, kernel.shape[0] - 1, channels)
        _check_shape("initial_state", initial_state, expected)
    output, state = dispatch(
        "short_convolution",
        implementation,
        inputs,
        kernel,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        return_state=return_state,
        activation=activation,
    )
    return (output, state) if return_state else output


@register("short_convolution", "portable")
def _portable(
    inputs,
    kernel,
    *,
    segment_ids,
    cu_seqlens,
    initial_state,
    return_state,
    activation,
):
    # The taps are summed in float32, whatever the inputs' dtype.
    kernel = ops.cast(kernel, "float32")
    if initial_state is not None:
        initial_state = ops.cast(initial_state, inputs.dtype)
    if cu_seqlens is not None:
        return _packed(inputs, kernel, cu_seqlens, initial_state, activation)
    output = tap_sums(activation, inputs, kernel, segment_ids, initial_state)
    if not return_state:
        return output, None
    return output, _last_rows(inputs, segment_ids, initial_state, kernel.shape[0] - 1)


def _last_rows(inputs, segment_ids, initial_state, history):
    """The state behind the inputs."""
    # Of sequences shorter than the state, a part of the old state stays.
    tail = inputs[:, -history:] if history else inputs[:, :0]
    ids = None if segment_ids is None else segment_ids[:, -history:]
    missing = ops.maximum(history - ops.shape(inputs)[1], 0)
    if isinstance(inputs.shape[1], int):
        missing = max(history - inputs.shape[1], 0)
    if initial_state is None:
        tail = pad(tail, 1, before=missing)
    elif not isinstance(missing, int) or missing:
        old = initial_state[:, history - missing :]
        tail = ops.concatenate([old, tail], axis=1)
    if ids is None or not history:
        return tail
    if not isinstance(missing, int) or missing:
        first = ops.broadcast_to(ids[:, :1], (ops.shape(ids)[0], missing))
        ids = ops.concatenate([first, ids], axis=1)
    same = ids == ids[:, -1:]
    return ops.where(same[..., None], tail, ops.zeros((), tail.dtype))


def _packed(inputs, kernel, cu_seqlens, initial_state, activation):
    """Packed sequences: each is moved behind rows that hold its state."""
    history = kernel.shape[0] - 1
    rows, channels = ops.shape(inputs)[1:]
    sequences = cu_seqlens.shape[0] - 1
    # Sequence s begins s + 1 states later than before.
    row = ops.arange(rows, dtype="int32")
    target = row + (sequence_of(row, cu_seqlens) + 1) * history
    target = ops.where(row < cu_seqlens[-1], target, -1)
    steps = ops.arange(sequences + 1, dtype="int32") * history
    borders = cu_seqlens + steps
    moved = ops.arange(rows + sequences * history, dtype="int32")
    sequence = sequence_of(moved, borders)
    place = moved - ops.take(borders[:-1], sequence)
    source = ops.where(
        ops.logical_and(place >= history, moved < borders[-1]),
        moved - (sequence + 1) * history,
        -1,
    )
    # States are taken from behind the inputs.
    held = ops.where(place < history, rows + sequence * history + place, -1)
    held = ops.where(moved < borders[-1], held, -1)
    offset = ops.arange(history, dtype="int32")
    holders = ops.reshape(borders[:-1, None] + offset, (sequences * history,))
    if initial_state is None:
        initial_state = ops.zeros((sequences, history, channels), inputs.dtype)
    states = ops.reshape(initial_state, (1, sequences * history, channels))
    extended = gather_rows(
        ops.concatenate([inputs, states], axis=1),
        ops.maximum(source, held)[None],
        ops.concatenate([target, holders])[None, :, None],
    )
    output = tap_sums(activation, extended, kernel, sequence[None], None)
    output = gather_rows(output, target[None], source[None, :, None])
    last = ops.reshape(borders[1:, None] - history + offset, (sequences * history,))
    state = ops.take(extended[0], last, axis=0)
    return output, ops.reshape(state, (sequences, history, channels))


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
