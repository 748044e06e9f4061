"""The memory scan as an update rule calls it."""

from keras import ops

from keras_mom.ops.dispatch import dispatch
from keras_mom.ops.padding import pad


class RowScan:
    """Scans packed rows of memories.

    Rows are `[B, R, H, ...]` and states `[B, M, H, K, V]`, the shared memory last.
    `keras_mom.ops.memory_step.TokenScan` is its like for single tokens.

    Args:
        implementation: in the sense of `keras_mom.ops.memory_scan`.
        segments: `AlignedSegments`. A rule that reads before it writes needs a row of
            history before each segment.
    """

    def __init__(self, implementation, segments):
        self._implementation = implementation
        self._segments = segments

    def __call__(
        self,
        query,
        key,
        value,
        *,
        log_decay,
        beta,
        initial_state,
        write="additive",
        erase_before_decay=False,
        read_before_update=False,
        decay_axis="key",
        scale=None,
    ):
        """Writes the rows and reads them.

        Args:
            query, key: `[..., H, K]`.
            value: `[..., H, V]`.
            log_decay, beta, write, erase_before_decay, decay_axis, scale: as in
                `keras_mom.ops.memory_scan`.
            initial_state: float32, or None for an empty one.
            read_before_update: whether a row reads the state of the row before,
                before this row's decay.

        Returns:
            Outputs `[..., H, V]` and the final state.
        """
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        segments = self._segments
        outputs, memories = dispatch(
            "memory_scan",
            self._implementation,
            _earlier(query) if read_before_update else query,
            key,
            value,
            log_decay=log_decay,
            beta=beta,
            write=write,
            erase_before_decay=erase_before_decay,
            decay_axis=decay_axis,
            cu_seqlens=None,
            aligned=segments,
            initial_state=initial_state,
            scale=scale,
        )
        if read_before_update:
            outputs = _moved_back(outputs, segments.resets)
        return outputs, memories


def _earlier(query):
    """Each query in the row before its own, where it belongs to the same memory."""
    return pad(query[:, 1:], 1, after=1)


def _moved_back(outputs, resets):
    """What `_earlier` read, in the rows that it is for."""
    outputs = pad(outputs[:, :-1], 1, before=1)
    if resets is None:
        return outputs
    # The row before belongs to another document.
    emptied = resets[..., None, None] > 0
    return ops.where(emptied, ops.zeros((), outputs.dtype), outputs)
