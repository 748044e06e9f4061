"""The one place in `keras_mom` that imports a framework.

Each module of this package offers the same five names for one Keras backend:

- `scan(step, carry, length, reverse)`: a loop without a gradient of its own. `step`
  takes a carry and an index, and returns a carry and a tuple of tensors, which are
  joined along their second axis, in the order of the index;
- `Differentiable(name, forward, backward, infer)`: a function with a gradient
  written by hand;
- `full_precision()`: a context in which float32 products are float32 products;
- `accelerator()`: the kind of accelerator in use, or None on a CPU;
- `is_concrete(tensor)`: whether the values can be read without a device sync.
"""

import keras

if keras.backend.backend() == "jax":
    from keras_mom.backend import jax as _implementation
elif keras.backend.backend() == "torch":
    from keras_mom.backend import torch as _implementation
elif keras.backend.backend() == "tensorflow":
    from keras_mom.backend import tensorflow as _implementation
else:
    raise ImportError(
        "keras_mom runs on the Keras backends jax, torch and tensorflow. "
        f"Received: KERAS_BACKEND={keras.backend.backend()!r}"
    )

Differentiable = _implementation.Differentiable
accelerator = _implementation.accelerator
full_precision = _implementation.full_precision
is_concrete = _implementation.is_concrete
scan = _implementation.scan

__all__ = ["Differentiable", "accelerator", "full_precision", "is_concrete", "scan"]
