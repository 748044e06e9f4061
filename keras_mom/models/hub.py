"""The base classes of the models: KerasHub's where it is installed.

With KerasHub, `MoMBackbone` and `MoMCausalLM` are its `Backbone` and `CausalLM`, so
that `keras_hub.models.CausalLM.from_preset` and its preprocessors serve them. Without,
they offer the same methods, and read and write the same folders.
"""

import importlib.util
import warnings

import keras

from keras_mom.models import presets


def _installed():
    """The module `keras_hub`, or None."""
    if importlib.util.find_spec("keras_hub") is None:
        return None
    try:
        return importlib.import_module("keras_hub")
    except Exception as error:
        warnings.warn(
            "KerasHub is installed, but cannot be imported, so the models of "
            f"`keras_mom` do without it: {error}",
            stacklevel=2,
        )
        return None


class PlainBackbone(keras.Model):
    """What `keras_hub.models.Backbone` offers, without KerasHub."""

    def __init__(self, *args, dtype=None, **kwargs):
        super().__init__(*args, **kwargs)
        if dtype is not None:
            self.dtype_policy = keras.dtype_policies.get(dtype)

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        return presets.load_backbone(cls, preset, load_weights, **kwargs)

    def save_to_preset(self, preset_dir, max_shard_size=10):
        presets.save_backbone(self, preset_dir, max_shard_size)


class PlainCausalLM(keras.Model):
    """What `keras_hub.models.CausalLM` offers, without KerasHub."""

    backbone_cls: type | None = None

    def __init__(self, *args, compile=True, **kwargs):
        super().__init__(*args, **kwargs)
        if compile:
            self.compile()

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        return presets.load_task(cls, preset, load_weights, **kwargs)

    def save_to_preset(self, preset_dir, max_shard_size=10):
        presets.save_task(self, preset_dir, max_shard_size)


keras_hub = _installed()
if keras_hub is None:
    Backbone, CausalLM = PlainBackbone, PlainCausalLM
else:
    Backbone, CausalLM = keras_hub.models.Backbone, keras_hub.models.CausalLM
