"""Mixture-of-Memories (arXiv 2502.13685) for Keras 3."""

import importlib

from keras_mom import config, distribution, ops, rules
from keras_mom.layers import MoMLayer

__version__ = "0.1.0"

__all__ = ["MoMLayer", "config", "convert", "distribution", "models", "ops", "rules"]


def __getattr__(name):
    # With KerasHub, the models take seconds to import: only those who use them wait.
    if name in ("convert", "models"):
        return importlib.import_module(f"keras_mom.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
