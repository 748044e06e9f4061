"""Initializers of the layers' weights."""

import math

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable("keras_mom")
class Blocks(keras.initializers.Initializer):
    """Draws equal blocks side by side, each as a kernel of its own.

    The kernel of a projection for M memories holds M kernels `[D, units]`. Each is
    drawn with the fans, and from the seed, of its own.

    Args:
        initializer: initializer of one block.
        count: number of blocks.
        axis: the axis along which they stand.
    """

    def __init__(self, initializer, count, axis=-1):
        self.initializer = keras.initializers.get(initializer)
        self.count = count
        self.axis = axis

    def __call__(self, shape, dtype=None):
        block = list(shape)
        block[self.axis] //= self.count
        blocks = [self._of_block(i)(block, dtype=dtype) for i in range(self.count)]
        return ops.concatenate(blocks, axis=self.axis)

    def _of_block(self, index):
        # An initializer draws the same values again and again, unless its seed is a
        # `SeedGenerator`.
        config = getattr(self.initializer, "get_config", dict)()
        seed = config.get("seed")
        if isinstance(seed, int):
            config = {**config, "seed": seed + index}
        elif seed is not None or "seed" not in config:
            return self.initializer
        return self.initializer.__class__.from_config(config)

    def get_config(self):
        return {
            "initializer": keras.initializers.serialize(self.initializer),
            "count": self.count,
            "axis": self.axis,
        }


@keras.saving.register_keras_serializable("keras_mom")
class Scaled(keras.initializers.Initializer):
    """Draws of another initializer, times a number.

    Projections that end in a residual stream of N additions are scaled by
    `N**-0.5` (GPT-2).

    Args:
        initializer: the other initializer.
        scale: the number.
    """

    def __init__(self, initializer, scale):
        self.initializer = keras.initializers.get(initializer)
        self.scale = float(scale)

    def __call__(self, shape, dtype=None):
        return self.initializer(shape, dtype=dtype) * self.scale

    def clone(self):
        return Scaled(clone_initializer(self.initializer), self.scale)

    def get_config(self):
        return {
            "initializer": keras.initializers.serialize(self.initializer),
            "scale": self.scale,
        }


@keras.saving.register_keras_serializable("keras_mom")
class LogUniform(keras.initializers.Initializer):
    """Logarithm of values that are uniform in `(low, high)`.

    `A_log` of Mamba-2 and of the gated delta rule (arXiv 2405.21060, 2412.06464).
    """

    def __init__(self, low, high, seed=None):
        self.low = low
        self.high = high
        self.seed = seed
        self._uniform = keras.initializers.RandomUniform(low, high, seed=seed)

    def __call__(self, shape, dtype=None):
        return ops.log(ops.maximum(self._uniform(shape, dtype=dtype), 1e-4))

    def get_config(self):
        return {"low": self.low, "high": self.high, "seed": self.seed}


@keras.saving.register_keras_serializable("keras_mom")
class InverseSoftplusLogUniform(keras.initializers.Initializer):
    """Values whose softplus is log-uniform in `(low, high)`.

    `dt_bias` of Mamba-2 and of the gated delta rule (arXiv 2405.21060, 2412.06464).
    """

    def __init__(self, low, high, seed=None):
        self.low = low
        self.high = high
        self.seed = seed
        self._uniform = keras.initializers.RandomUniform(
            math.log(low), math.log(high), seed=seed
        )

    def __call__(self, shape, dtype=None):
        step = ops.exp(self._uniform(shape, dtype=dtype))
        return step + ops.log(-ops.expm1(-step))

    def get_config(self):
        return {"low": self.low, "high": self.high, "seed": self.seed}


@keras.saving.register_keras_serializable("keras_mom")
class Ramp(keras.initializers.Initializer):
    """Values that rise from `low` to `high` in the order of the entries.

    `low + (high - low) r^power`, with r from 0 to 1 in even steps.
    """

    def __init__(self, low, high, power=1.0):
        self.low = low
        self.high = high
        self.power = power

    def __call__(self, shape, dtype=None):
        rising = ops.linspace(0.0, 1.0, math.prod(shape)) ** self.power
        values = self.low + (self.high - self.low) * rising
        return ops.cast(ops.reshape(values, shape), dtype or "float32")

    def get_config(self):
        return {"low": self.low, "high": self.high, "power": self.power}


@keras.saving.register_keras_serializable("keras_mom")
class Cycle(keras.initializers.Initializer):
    """The given values again and again, in the order of the entries."""

    def __init__(self, values):
        self.values = list(values)

    def __call__(self, shape, dtype=None):
        entries = np.resize(self.values, shape)
        return ops.convert_to_tensor(entries, dtype or "float32")

    def get_config(self):
        return {"values": self.values}


def clone_initializer(initializer):
    """A copy with a seed of its own where the original has none."""
    initializer = keras.initializers.get(initializer)
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    return initializer.clone()
