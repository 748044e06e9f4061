"""Mixture-of-Memories (arXiv 2502.13685) for Keras 3."""

# All are imported here, so that Keras knows every class by the time it loads a file.
from keras_mom import (
    callbacks,
    config,
    convert,
    distribution,
    models,
    ops,
    rules,
    tasks,
    visualization,
)
from keras_mom.layers import MoMLayer

__version__ = "0.1.0"

__all__ = [
    "MoMLayer",
    "callbacks",
    "config",
    "convert",
    "distribution",
    "models",
    "ops",
    "rules",
    "tasks",
    "visualization",
]
