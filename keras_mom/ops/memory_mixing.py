"""What a token's memories answer, mixed, normalized and gated."""

from typing import Any, NamedTuple

from keras import ops

from keras_mom.ops.dispatch import dispatch, register
from keras_mom.ops.padding import pad
from keras_mom.ops.rows import gather_rows, sum_rows


class OutputNorm(NamedTuple):
    """RMS norm of each head's V channels, and the gate behind it.

    Attributes:
        scale: float `[V]`.
        gate: float `[B, T, H * V]`, which goes through SiLU, or None.
        epsilon: of the norm.
        dtype: name of the result's dtype.
    """

    scale: Any
    gate: Any
    epsilon: float
    dtype: str

    def __call__(self, mixed):
        """Float32 `[B, T, H, V]` to `[B, T, H * V]` of `dtype`."""
        mean_square = ops.mean(ops.square(mixed), axis=-1, keepdims=True)
        normalized = mixed * ops.rsqrt(mean_square + self.epsilon)
        normalized = normalized * ops.cast(self.scale, "float32")
        batch, length, heads, width = ops.shape(normalized)
        output = ops.reshape(normalized, (batch, length, heads * width))
        if self.gate is not None:
            output = output * ops.silu(ops.cast(self.gate, "float32"))
        return ops.cast(output, self.dtype)


def memory_mixing(outputs, weights, packing, norm, *, implementation=None):
    """Sums each token's packed rows by weight, then normalizes and gates the sum.

    Source: arXiv 2502.13685.

    Args:
        outputs: float `[B, R, H, V]`, what the packed rows read.
        weights: float32 `[B, T, k]`. A shared memory's row has weight 1.
        packing: `Packing`, of the rows.
        norm: `OutputNorm`.
        implementation: as in `keras_mom.ops.memory_scan`.

    Returns:
        `[B, T, H * V]`, of the dtype of `norm`. A token without rows gives zeros.
    """
    return dispatch("memory_mixing", implementation, outputs, weights, packing, norm)


def output_norm(mixed, norm, *, implementation=None):
    """Normalizes and gates what tokens have read already.

    Args:
        mixed: float32 `[B, T, H, V]`.
        norm: `OutputNorm`.
        implementation: as in `keras_mom.ops.memory_scan`.

    Returns:
        `[B, T, H * V]`, of the dtype of `norm`.
    """
    return dispatch("output_norm", implementation, mixed, norm)


@register("output_norm", "portable")
def _portable_norm(mixed, norm):
    return norm(mixed)


@register("memory_mixing", "portable")
def _portable(outputs, weights, packing, norm):
    batch, length, top_k = ops.shape(weights)
    slots = packing.targets.shape[2]
    if slots > top_k:
        weights = pad(weights, 2, after=1, fill=1)
    row_weights = gather_rows(
        ops.reshape(weights, (batch, length * slots, 1)),
        packing.slot,
        ops.reshape(packing.targets, (batch, length * slots, 1)),
    )
    _, rows, heads, width = ops.shape(outputs)
    outputs = ops.cast(outputs, "float32")
    outputs = ops.reshape(outputs, (batch, rows, heads * width))
    mixed = sum_rows(outputs * row_weights, packing.token, packing.targets)
    return norm(ops.reshape(mixed, (batch, length, heads, width)))
