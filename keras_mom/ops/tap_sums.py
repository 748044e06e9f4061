"""The sums of the short convolution, a block of rows at a time, and their gradient.

`y_t = activation(sum_i kernel[i] * x_{t - W + i})` for i from 0 to W, where `x` is
zero, or comes from the state, before row 0. The backward pass keeps the inputs alone.
"""

from keras import ops

from keras_mom import backend
from keras_mom.ops.blocks import join_blocks, row_blocks
from keras_mom.ops.padding import pad


def tap_sums(activation, inputs, kernel, segment_ids, initial_state):
    """Convolves rows with their predecessors of the same segment.

    Args:
        activation: `"silu"` or None.
        inputs: `[B, T, channels]`.
        kernel: float32 `[W + 1, channels]`.
        segment_ids: integer `[B, T]` or None.
        initial_state: `[B, W, channels]`, of the dtype of `inputs`, or None.

    Returns:
        `[B, T, channels]`, of the dtype of `inputs`; sums are float32.
    """
    return _TAP_SUMS((activation,), inputs, kernel, segment_ids, initial_state)[0]


class _Rows:
    """Rows of the inputs, and of what comes before them, by number."""

    def __init__(self, inputs, kernel, segment_ids, initial_state):
        self.inputs, self.kernel = inputs, kernel
        self.ids, self.initial = segment_ids, initial_state
        self.history = kernel.shape[0] - 1
        self.shape = ops.shape(inputs)
        self.length = self.shape[1]

    def span(self, start, stop):
        """Rows `start` to `stop - 1`, float32; `start` may be negative."""
        rows = ops.cast(self.inputs[:, max(start, 0) : stop], "float32")
        if start >= 0:
            return rows
        if self.initial is None:
            return pad(rows, 1, before=-start)
        state = ops.cast(self.initial[:, self.history + start :], "float32")
        return ops.concatenate([state, rows], axis=1)

    def ids_of(self, start, stop):
        """Segment ids of rows; rows before row 0 belong to its segment."""
        if self.ids is None:
            return None
        ids = self.ids[:, max(start, 0) : stop]
        first = [self.ids[:, :1]] * max(0, -start)
        return ops.concatenate([*first, ids], axis=1)

    def taps(self, start, stop):
        """For each i the rows that `kernel[i]` meets, as rows `start` to `stop - 1`."""
        rows = self.span(start - self.history, stop)
        ids = self.ids_of(start - self.history, stop)
        count = stop - start
        for i in range(self.history + 1):
            tap = rows[:, i : i + count]
            if ids is not None and i < self.history:
                same = ids[:, i : i + count] == ids[:, self.history :]
                tap = ops.where(same[..., None], tap, 0.0)
            yield i, tap

    def sums(self, start, stop):
        total = 0.0
        for i, tap in self.taps(start, stop):
            total = total + tap * self.kernel[i]
        return total


def _forward(options, *tensors):
    rows = _Rows(*tensors)
    outputs = []
    for start, stop in row_blocks(rows.shape):
        sums = rows.sums(start, stop)
        output = ops.silu(sums) if options[0] == "silu" else sums
        outputs.append(ops.cast(output, rows.inputs.dtype))
    return (join_blocks(outputs),)


def _backward(options, tensors, outputs, gradients):
    rows = _Rows(*tensors)
    history = rows.history
    of_inputs, of_kernel, of_initial = [], 0.0, None
    for start, stop in row_blocks(rows.shape):
        # Rows behind the block have met its last rows.
        last = stop if stop is rows.length else min(stop + history, rows.length)
        of_sums = ops.cast(gradients[0][:, start:last], "float32")
        if options[0] == "silu":
            of_sums = of_sums * _silu_slope(rows.sums(start, last))
        own = of_sums[:, : stop - start]
        of_kernel = of_kernel + ops.stack(
            [ops.sum(tap * own, axis=(0, 1)) for _, tap in rows.taps(start, stop)]
        )
        of_sums = pad(of_sums, 1, after=stop + history - last)
        ids = rows.ids_of(start, last)
        if ids is not None:
            ids = pad(ids, 1, after=stop + history - last)
        of_inputs.append(_to_taps(rows, of_sums, ids, stop - start))
        if start == 0 and rows.initial is not None:
            head = pad(of_sums[:, :history], 1, before=history)
            if ids is not None:
                first = ops.repeat(ids[:, :1], history, axis=1)
                ids = ops.concatenate([first, ids[:, :history]], axis=1)
            of_initial = _to_taps(rows, head, ids, history)
            of_initial = ops.cast(of_initial, rows.initial.dtype)
    of_inputs = join_blocks([ops.cast(x, rows.inputs.dtype) for x in of_inputs])
    return of_inputs, of_kernel, None, of_initial


def _to_taps(rows, of_sums, ids, count):
    """Gradient of the first `count` rows from that of their and later sums."""
    total = 0.0
    for i in range(rows.history + 1):
        ahead = rows.history - i
        part = of_sums[:, ahead : ahead + count]
        if ids is not None and ahead:
            same = ids[:, ahead : ahead + count] == ids[:, :count]
            part = ops.where(same[..., None], part, 0.0)
        total = total + part * rows.kernel[i]
    return total


def _silu_slope(x):
    gate = ops.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _infer(_, inputs, kernel, segment_ids, initial_state):
    return ((tuple(inputs.shape), str(inputs.dtype).rpartition(".")[2]),)


_TAP_SUMS = backend.Differentiable("tap_sums", _forward, _backward, _infer)
