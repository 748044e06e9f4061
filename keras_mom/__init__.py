"""Mixture-of-Memories (arXiv 2502.13685) for Keras 3."""

from keras_mom import config, distribution, models, ops, rules
from keras_mom.layers import MoMLayer

__version__ = "0.1.0"

__all__ = ["MoMLayer", "config", "distribution", "models", "ops", "rules"]
