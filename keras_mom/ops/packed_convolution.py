"""The short convolution of packed rows: taken, convolved and normalized at once."""

from keras import ops

from keras_mom.ops.constants import select
from keras_mom.ops.dispatch import dispatch, register
from keras_mom.ops.normalization import l2_normalize
from keras_mom.ops.padding import pad
from keras_mom.ops.rows import gather_rows, take_rows
from keras_mom.ops.short_convolution import short_convolution


def packed_convolution(
    inputs,
    kernel,
    source,
    targets,
    *,
    documents=None,
    activation: str | None = "silu",
    heads=None,
    epsilon=1e-6,
    implementation=None,
):
    """Takes rows into a packed layout and mixes each with the rows before it.

    With `x_r = inputs[source[r]]`, and zeros for an empty row,
    `y_r = activation(sum_i kernel[i] * x_{r - W + i})`. A region's rows of history
    keep its sums apart from the region before. What an empty row holds is not defined.

    Args:
        inputs: float `[B, S, E]`, or `[1, S, E]` for rows that batch rows share: then
            `source` and `targets`, `[1, S, J]`, number them, and the packed rows of
            all batch rows one after the other, throughout.
        kernel: float `[W + 1, E]`; the last row meets the current one. None for no
            convolution, and no activation.
        source: int32 `[B, R]`, the row of `inputs` to take, -1 for an empty row.
        targets: int32 `[B, S, J]`, the up to J packed rows that each row of `inputs`
            goes to, -1 for none. The inverse of `source`.
        documents: int32 `[B, R]`, or None: rows of another document are not read.
        activation: `"silu"` or None.
        heads: number of heads to L2-normalize behind the convolution, or None.
        epsilon: as `keras_mom.ops.normalization.l2_normalize` takes it.
        implementation: as in `keras_mom.ops.memory_scan`.

    Returns:
        `[B, R, E]`, of the dtype of `inputs`; normalized ones may be float32.
    """
    batch, rows = ops.shape(source)
    together = _shared(inputs, source)
    if together:
        # A region's history keeps batch rows apart too.
        source = ops.reshape(source, (1, batch * rows))
        if documents is not None:
            documents = ops.reshape(documents, (1, batch * rows))
    output = dispatch(
        "packed_convolution",
        implementation,
        inputs,
        kernel,
        source,
        targets,
        documents=documents,
        activation=activation,
        heads=heads,
        epsilon=epsilon,
    )
    return ops.reshape(output, (batch, rows, -1)) if together else output


def _shared(inputs, source):
    """Whether batch rows share the inputs' rows."""
    return inputs.shape[0] == 1 and source.shape[0] not in (1, None)


@register("packed_convolution", "portable")
def _portable(
    inputs, kernel, source, targets, *, documents, activation, heads, epsilon
):
    rows = gather_rows(inputs, source, targets)
    if kernel is not None:
        rows = short_convolution(
            rows,
            kernel,
            segment_ids=documents,
            activation=activation,
            implementation="portable",
        )
    if heads is None:
        return rows
    shape = ops.shape(rows)
    split = ops.reshape(rows, (*shape[:-1], heads, shape[-1] // heads))
    return ops.reshape(l2_normalize(split, epsilon), shape)


def behind_windows(packing, inputs, moves, window):
    """What `packed_convolution` takes where windows stand in the history rows.

    Args:
        packing: `Packing`.
        inputs: `[B, T * P, E]`, or `[1, S, E]`, as `packed_convolution` takes them.
        moves: source and targets.
        window: `[B, M, W, E]`, the rows before the first of each memory, or None.

    Returns:
        Inputs with the windows behind them, source and targets.
    """
    source, targets = moves
    if window is None:
        return inputs, source, targets
    batch, memories, history, width = ops.shape(window)
    window = ops.cast(window, inputs.dtype)
    history_source, history_targets = packing.history_source(ops.shape(inputs)[1])
    count = memories * history
    if _shared(inputs, source):
        row = ops.arange(batch, dtype="int32")[:, None]
        inside = history_source >= 0
        history_source = select(inside, history_source + row * count, -1)
        history_targets = history_targets[..., 0] + row * packing.rows
        history_targets = ops.reshape(history_targets, (1, batch * count, 1))
        window = ops.reshape(window, (1, batch * count, width))
    else:
        window = ops.reshape(window, (batch, count, width))
    missing = targets.shape[-1] - 1
    history_targets = pad(history_targets, 2, after=missing, fill=-1)
    return (
        ops.concatenate([inputs, window], axis=1),
        ops.maximum(source, history_source),
        ops.concatenate([targets, history_targets], axis=1),
    )


def last_windows(packing, documents, taken, history):
    """The rows of the inputs that a next call's convolution meets.

    Args:
        packing: `Packing`.
        documents: `Documents` or None.
        taken: what `behind_windows` returned, for each of query, key and value.
        history: W.

    Returns:
        float32 `[B, M, W, channels]`, zeros for rows of an older document.
    """
    last = packing.window_rows(history)
    batch, count = ops.shape(last)
    rows = [ops.take_along_axis(source, last, axis=1) for _, source, _ in taken[:2]]
    windows = []
    # Keys and values are projected for the same sets.
    for (x, source, _), index in zip(taken, (*rows, rows[1])):
        if _shared(x, source):
            index = ops.reshape(index, (1, batch * count))
        window = take_rows(x, index)
        windows.append(ops.reshape(window, (batch, count, x.shape[-1])))
    windows = ops.cast(ops.concatenate(windows, axis=-1), "float32")
    if documents is not None:
        number = ops.take_along_axis(documents.of_rows, last, axis=1)
        fresh = number == documents.last[:, None]
        windows = select(fresh[..., None], windows, 0.0)
    width = windows.shape[-1]
    return ops.reshape(windows, (batch, packing.num_memories, history, width))
