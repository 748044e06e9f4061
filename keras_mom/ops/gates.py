"""The gates of the gated delta rule."""

from keras import ops

from keras_mom.ops.dispatch import dispatch, register


def decay_and_write_strength(
    decay, write_strength, dt_bias, a_log, *, implementation=None
):
    """`-exp(a_log) * softplus(decay + dt_bias)` and `sigmoid(write_strength)`.

    Source: arXiv 2412.06464.

    Args:
        decay, write_strength: float `[..., H]`.
        dt_bias, a_log: float32 `[H]`.
        implementation: as in `keras_mom.ops.memory_scan`.

    Returns:
        Log decay and write strength, float32 `[..., H]`.
    """
    return dispatch("gates", implementation, decay, write_strength, dt_bias, a_log)


@register("gates", "portable")
def _portable(decay, write_strength, dt_bias, a_log):
    decay = ops.cast(decay, "float32") + dt_bias
    log_decay = -ops.exp(a_log) * ops.softplus(decay)
    return log_decay, ops.sigmoid(ops.cast(write_strength, "float32"))
