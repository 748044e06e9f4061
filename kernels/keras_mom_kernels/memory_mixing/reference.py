"""The output of a Mixture-of-Memories layer before its projection, token by token.

Runs on NumPy, and on torch (`xp=torch`) for gradients; in float64 it decides what is
right. Source: arXiv 2502.13685, and its implementation's gated RMSNorm.
"""

import numpy as np


def memory_mixing(outputs, weights, targets, scale, gate=None, *, epsilon=1e-6, xp=np):
    """Shapes and meaning are those of `keras_mom_kernels.memory_mixing.torch`.

    Returns:
        `[B, T, H * V]`, of the dtype of `outputs`.
    """
    _, _, heads, width = outputs.shape
    batch, length, _ = targets.shape
    results = []
    for b in range(batch):
        # Iterating, not indexing: on torch the gradient of an index is as large as
        # what is indexed.
        rows, of_tokens = list(outputs[b]), list(weights[b])
        for t in range(length):
            # 1. The weighted sum of what the token's memories answer.
            mixed = xp.zeros((heads, width), dtype=outputs.dtype)
            for j, row in enumerate(targets[b][t].tolist()):
                if row >= 0:
                    weight = of_tokens[t][j] if j < weights.shape[2] else 1.0
                    mixed = mixed + weight * rows[row]
            # 2. RMSNorm of each head.
            mean_square = (mixed * mixed).mean(-1)[:, None]
            normalized = mixed / xp.sqrt(mean_square + epsilon) * scale
            # 3. The gate.
            result = normalized.reshape(heads * width)
            if gate is not None:
                result = result * gate[b, t] / (1 + xp.exp(-gate[b, t]))
            results.append(result)
    return xp.stack(results).reshape(batch, length, heads * width)
