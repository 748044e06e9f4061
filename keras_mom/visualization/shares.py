"""What is counted of a model's routing."""

import numpy as np

from keras_mom.checks import check_positive


def memory_shares(routing):
    """Each memory's share of the routed tokens (arXiv 2502.13685, Figures 5 and 9).

    Args:
        routing: list of `LayerRouting`, all with the same number of memories.

    Returns:
        float64 `[layers, M]`; each row adds up to 1, or is 0 without valid tokens.
    """
    shares = []
    for layer in routing:
        counts = _counts(layer, np.zeros_like(layer.indices[..., 0]), 1)[0]
        shares.append(counts / max(counts.sum(), 1))
    return np.stack(shares)


def router_entropy(routing):
    """Mean entropy of the routers' probabilities, in nats: float64 `[layers]`.

    It is `log(M)` where a router tells nothing apart, and 0 where it is certain.
    """
    entropies = []
    for layer in routing:
        p = layer.probabilities.astype("float64")
        entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)
        entropies.append(entropy[layer.mask].mean() if layer.mask.any() else 0.0)
    return np.array(entropies)


def memory_tokens(layer, token_ids, vocabulary_size):
    """How often each token goes to each memory.

    Args:
        layer: `LayerRouting`.
        token_ids: integers `[B, T]`, the tokens that were routed.
        vocabulary_size: number of token ids.

    Returns:
        int64 `[vocabulary_size, M]`. Masked tokens are not counted.

    Raises:
        ValueError: if the tokens are not those that were routed.
    """
    check_positive("vocabulary_size", vocabulary_size)
    token_ids = np.asarray(token_ids)
    if token_ids.shape != layer.mask.shape:
        raise ValueError(
            f"`token_ids` must have the shape {layer.mask.shape} of the routed tokens. "
            f"Received: shape {token_ids.shape}"
        )
    if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < vocabulary_size:
        raise ValueError(
            f"`token_ids` must be from 0 to {vocabulary_size - 1}. Received: "
            f"{token_ids.min()} to {token_ids.max()}"
        )
    return _counts(layer, token_ids, vocabulary_size)


def _counts(layer, groups, size):
    """Valid tokens by group and memory: int64 `[size, M]`."""
    memories = layer.probabilities.shape[-1]
    places = groups[..., None] * memories + layer.indices
    places = places[np.broadcast_to(layer.mask[..., None], places.shape)]
    counts = np.bincount(places.ravel(), minlength=size * memories)
    return counts.reshape(size, memories)
