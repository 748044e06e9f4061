"""Reference forms and kernels of the operations of `keras_mom`. Never imports Keras.

    from keras_mom_kernels import memory_scan

gives the function on torch, with Triton kernels. Torch is imported then, not before:
what other frameworks need is in the operations' folders.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_mom_kernels.memory_scan.torch import memory_scan
    from keras_mom_kernels.memory_step.torch import convolution_step, memory_step

__all__ = ["convolution_step", "memory_scan", "memory_step"]

_FOLDERS = {
    "convolution_step": "memory_step",
    "memory_scan": "memory_scan",
    "memory_step": "memory_step",
}


def __getattr__(name):
    if name not in _FOLDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_FOLDERS[name]}.torch")
    return getattr(module, name)


class _Package(ModuleType):
    """A package whose functions keep their names where folders have them too."""

    def __setattr__(self, name, value):
        # Python's import puts an imported folder here, by its name.
        if name not in _FOLDERS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
