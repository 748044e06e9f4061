"""Routing: which memories a token goes to, with what weight, and how evenly."""

from typing import NamedTuple

from keras import ops

from keras_mom import backend
from keras_mom.ops.constants import at_least, select
from keras_mom.ops.dispatch import dispatch, register


def route(logits, top_k, *, implementation=None):
    """Probabilities of the memories, and each token's `top_k` most probable ones.

    Source: arXiv 2502.13685, section 3.1.

    Args:
        logits: float32 `[B, T, M]`.
        top_k: k, as in `top_k_routing`.
        implementation: as in `keras_mom.ops.memory_scan`.

    Returns:
        `softmax(logits)`, float32 `[B, T, M]`, and weights and indices as
        `top_k_routing` returns them.
    """
    return dispatch("routing", implementation, logits, top_k)


def project_and_route(inputs, kernel, top_k, *, implementation=None):
    """`route` for the logits `inputs @ kernel`, which are float32.

    Args:
        inputs: float `[B, T, D]`.
        kernel: float32 `[D, M]`.
        top_k, implementation: as in `route`.

    Returns:
        As `route`.
    """
    return dispatch("projected_routing", implementation, inputs, kernel, top_k)


@register("projected_routing", "portable")
def _portable_projected(inputs, kernel, top_k):
    return _portable(logits_of(inputs, kernel), top_k)


def logits_of(inputs, kernel):
    """float32 `[B, T, M]`."""
    return ops.matmul(ops.cast(inputs, "float32"), kernel)


@register("routing", "portable")
def _portable(logits, top_k):
    probabilities = ops.softmax(logits)
    return probabilities, *top_k_routing(probabilities, top_k)


def top_k_routing(probabilities, top_k):
    """Picks the `top_k` most probable memories of each token.

    Ties go to the lowest index on every backend. A token whose probabilities are not
    numbers goes to the first `top_k` memories, with weights that are not numbers.

    Source: arXiv 2502.13685, section 3.1.

    Args:
        probabilities: float `[B, T, M]`.
        top_k: k, the number of memories a token, 1 to M.

    Returns:
        Weights, float `[B, T, k]`, which sum to 1, and memory indices, int32
        `[B, T, k]`, most probable first.
    """
    memories = probabilities.shape[-1]
    if not 1 <= top_k <= memories:
        raise ValueError(
            f"`top_k` must be between 1 and the number of memories, {memories}. "
            f"Received: top_k={top_k}"
        )
    return _top_k_routing(top_k, probabilities)


@backend.compiled
def _top_k_routing(top_k, probabilities):
    memories = probabilities.shape[-1]
    numbers = select(ops.logical_not(ops.isnan(probabilities)), probabilities, -1.0)
    mine, other = numbers[..., :, None], numbers[..., None, :]
    index = ops.arange(memories, dtype="int32")
    lower = index[None, :] < index[:, None]
    ahead = ops.logical_or(other > mine, ops.logical_and(other == mine, lower))
    rank = ops.sum(ops.cast(ahead, "int32"), axis=-1)
    # [B, T, k, M]: whether memory m is the j-th choice.
    chosen = rank[..., None, :] == ops.arange(top_k, dtype="int32")[:, None]
    indices = ops.sum(select(chosen, index, 0), axis=-1)
    picked = ops.sum(select(chosen, probabilities[..., None, :], 0.0), axis=-1)
    return picked / ops.sum(picked, axis=-1, keepdims=True), indices


class RoutingStatistics(NamedTuple):
    """How a batch was routed; masked tokens do not count.

    Attributes:
        share: float32 `[M]`, the share of all routed tokens in each memory; sums to 1.
        entropy: float32 `[]`, mean entropy of the router's probabilities, in nats.
        balance_loss: float32 `[]`, `M * sum_m f_m P_m / k` with `f_m` the fraction of
            tokens routed to m and `P_m` its mean probability: 1 if perfectly even.
    """

    share: object
    entropy: object
    balance_loss: object


def routing_statistics(probabilities, indices, mask=None, *, implementation=None):
    """Computes `RoutingStatistics`.

    The balance loss is that of the Switch Transformer (arXiv 2101.03961, equation 4).

    Args:
        probabilities: float32 `[B, T, M]`.
        indices: int32 `[B, T, k]`.
        mask: bool `[B, T]`, False at tokens that do not count, or None.
        implementation: as in `keras_mom.ops.memory_scan`.
    """
    tensors = [
        x if x is None or ops.is_tensor(x) else ops.convert_to_tensor(x)
        for x in (probabilities, indices, mask)
    ]
    return dispatch("routing_statistics", implementation, *tensors)


@register("routing_statistics", "portable")
def _portable_statistics(probabilities, indices, mask):
    return _statistics((), probabilities, indices, mask)


@backend.compiled
def _statistics(_, probabilities, indices, mask):
    memories, top_k = probabilities.shape[-1], indices.shape[-1]
    index = ops.arange(memories, dtype="int32")
    routed = ops.sum(ops.cast(indices[..., None] == index, "float32"), axis=2)
    entropy = -ops.sum(probabilities * ops.log(at_least(probabilities, 1e-30)), axis=-1)
    if mask is None:
        valid = ops.ones_like(entropy)
    else:
        valid = ops.cast(mask, "float32")
        # Not a product: a masked token may hold anything.
        probabilities = select(mask[..., None], probabilities, 0.0)
        entropy = select(mask, entropy, 0.0)
    tokens = at_least(ops.sum(valid), 1.0)
    fraction = ops.sum(routed * valid[..., None], axis=(0, 1)) / tokens
    mean_probability = ops.sum(probabilities, axis=(0, 1)) / tokens
    return RoutingStatistics(
        share=fraction / top_k,
        entropy=ops.sum(entropy) / tokens,
        balance_loss=memories * ops.sum(fraction * mean_probability) / top_k,
    )
