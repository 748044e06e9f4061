"""A language model that predicts the next token."""

import keras

from keras_mom.models import hub
from keras_mom.models.generation import GenerationMixin


@keras.saving.register_keras_serializable("keras_mom")
class MoMCausalLM(GenerationMixin, hub.CausalLM):
    """A `MoMBackbone` and the scores of every token's successor.

    Args:
        backbone: `keras_mom.models.MoMBackbone`.
        preprocessor: what turns strings into the inputs of the model, and token ids
            into strings. Defaults to None: the model takes token ids.
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

    def __init__(self, backbone, preprocessor=None, **kwargs):
        inputs = backbone.input
        hidden = backbone(inputs)
        logits = backbone.token_embedding(hidden, reverse=True)
        super().__init__(inputs=inputs, outputs=logits, **kwargs)
        self.backbone = backbone
        self.preprocessor = preprocessor

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
