"""A language model that predicts the next token."""

from typing import Any

import keras

from keras_mom.checks import check_keywords
from keras_mom.models import hub, presets
from keras_mom.models.adaptation import forget_functions
from keras_mom.models.backbone import MoMBackbone
from keras_mom.models.exporting import ExportMixin
from keras_mom.models.generation import GenerationMixin
from keras_mom.models.training import TrainingMixin


@keras.saving.register_keras_serializable("keras_mom")
class MoMCausalLM(ExportMixin, GenerationMixin, TrainingMixin, hub.CausalLM):
    """A `MoMBackbone` and the scores of every token's successor.

    Args:
        backbone: `keras_mom.models.MoMBackbone`.
        preprocessor: what turns strings into the inputs of the model, and token ids
            into strings. Defaults to None: the model takes token ids.
        compile: whether to compile the model with default arguments.
        **kwargs: `name` and `trainable`.

    Call arguments:
        inputs: dict of int32 tensors `[B, T]`, as of the backbone.

    Returns:
        Logits `[B, T, vocabulary_size]`, of the compute dtype.

    Example:

    >>> backbone = keras_mom.models.MoMBackbone(256, 2, 64, num_heads=2, key_dim=32)
    >>> lm = keras_mom.models.MoMCausalLM(backbone)
    >>> ids = np.ones((1, 10), "int32")
    >>> lm({"token_ids": ids, "padding_mask": ids}).shape
    (1, 10, 256)
    """

    backbone_cls = MoMBackbone

    def __init__(self, backbone, preprocessor=None, compile=True, **kwargs):
        check_keywords("MoMCausalLM", kwargs)
        inputs = backbone.input
        hidden = backbone(inputs)
        logits = backbone.token_embedding(hidden, reverse=True)
        model: dict[str, Any] = dict(inputs=inputs, outputs=logits, compile=False)
        super().__init__(**model, **kwargs)
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.dtype_policy = backbone.dtype_policy
        if compile:
            self.compile()

    def call_with_cache(
        self, token_ids, cache, padding_mask=None, segment_ids=None, in_place=False
    ):
        """Reads the next tokens of each row; see `MoMBackbone.call_with_cache`.

        Returns:
            Logits `[B, T, vocabulary_size]`, hidden states `[B, T, D]`, and the cache
            for the next call.
        """
        hidden, cache = self.backbone.call_with_cache(
            token_ids, cache, padding_mask, segment_ids, in_place
        )
        logits = self.backbone.token_embedding(hidden, reverse=True)
        return logits, hidden, cache

    def enable_lora(self, rank, target_layer_names=None):
        """See `MoMBackbone.enable_lora`."""
        self.backbone.enable_lora(rank, target_layer_names)
        forget_functions(self)

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """See `MoMBackbone.quantize`."""
        if filters is None:
            filters = self.backbone.is_quantizable
        super().quantize(mode, config=config, filters=filters, **kwargs)

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Makes the language model of a name or of a folder.

        Args:
            preset, load_weights: as of `MoMBackbone.from_preset`. The folder may be
                that of a backbone.
            **kwargs: `preprocessor`, `compile`, `name`, and `dtype`, which goes to the
                backbone; for a name, also the backbone's other arguments.
        """
        config = presets.configuration(preset)
        if config is None:
            return super().from_preset(preset, load_weights=load_weights, **kwargs)
        own = {
            name: kwargs.pop(name)
            for name in ("preprocessor", "compile", "name", "trainable")
            if name in kwargs
        }
        return cls(cls.backbone_cls(**{**config, **kwargs}), **own)

    def save_to_preset(self, preset_dir, max_shard_size=10):
        """Writes the language model to a folder, for `from_preset`.

        Args:
            preset_dir: path of the folder.
            max_shard_size: the largest size in GB of a file of weights, or None.
        """
        preprocessor = self.preprocessor
        if preprocessor is None or isinstance(preprocessor, keras.layers.Layer):
            super().save_to_preset(preset_dir, max_shard_size=max_shard_size)
        else:
            # KerasHub knows preprocessors that are layers.
            presets.save_task(self, preset_dir, max_shard_size)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        preprocessor = self.preprocessor
        return {
            "backbone": serialize(self.backbone),
            "preprocessor": None if preprocessor is None else serialize(preprocessor),
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        for name in ("backbone", "preprocessor"):
            if isinstance(config.get(name), dict):
                config[name] = keras.saving.deserialize_keras_object(
                    config[name], custom_objects=custom_objects
                )
        return cls(**config)
