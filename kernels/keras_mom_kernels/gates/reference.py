"""Decay and write strength of the gated delta rule, in float64.

Runs on NumPy, and on torch (`xp=torch`) for gradients. Source: arXiv 2412.06464.
"""

import numpy as np


def decay_and_write_strength(decay, write_strength, dt_bias, a_log, *, xp=np):
    """Shapes and meaning are those of `keras_mom_kernels.gates.torch`."""
    x = decay + dt_bias
    # softplus, without overflow.
    softplus = xp.maximum(x, 0 * x) + xp.log1p(xp.exp(-abs(x)))
    return -xp.exp(a_log) * softplus, 1 / (1 + xp.exp(-write_strength))
