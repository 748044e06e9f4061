"""Routing of tokens to memories, token by token, in float64 NumPy.

Sources: arXiv 2502.13685, section 3.1; the balance loss of the Switch Transformer,
arXiv 2101.03961, equation 4.
"""

from typing import NamedTuple

import numpy as np


class Routing(NamedTuple):
    """Meaning and shapes are those of `keras_mom.ops`' routing functions.

    Attributes:
        weights: `[B, T, k]`.
        indices: integer `[B, T, k]`.
        share: `[M]`.
        entropy: number.
        balance_loss: number.
    """

    weights: np.ndarray
    indices: np.ndarray
    share: np.ndarray
    entropy: float
    balance_loss: float


def softmax(logits):
    """Probabilities of the memories, `[..., M]`."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def route(probabilities, top_k, mask=None):
    """Routes tokens of `probabilities` `[B, T, M]`; `mask` is bool `[B, T]`."""
    probabilities = np.asarray(probabilities, "float64")
    batch, length, memories = probabilities.shape
    weights = np.zeros((batch, length, top_k))
    indices = np.zeros((batch, length, top_k), "int32")
    routed, probability, entropies = np.zeros(memories), np.zeros(memories), []
    for b, t in np.ndindex(batch, length):
        p = probabilities[b, t]
        # 1. The k most probable memories; of equal ones, the lowest index.
        best = sorted(range(memories), key=lambda m: (-p[m], m))[:top_k]
        indices[b, t] = best
        # 2. Their weights sum to 1.
        weights[b, t] = p[best] / p[best].sum()
        # 3. What masked tokens do does not count.
        if mask is None or mask[b, t]:
            routed[best] += 1
            probability += p
            entropies.append(-sum(x * np.log(x) for x in p if x > 0))
    # 4. f, the fraction of tokens routed to each memory, and P, its mean probability.
    tokens = max(len(entropies), 1)
    fraction, mean = routed / tokens, probability / tokens
    return Routing(
        weights,
        indices,
        share=fraction / top_k,
        entropy=sum(entropies) / tokens,
        balance_loss=memories * (fraction @ mean) / top_k,
    )
