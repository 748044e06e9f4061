"""LoRA and quantization of a layer's projections, and how both survive a file."""

from typing import Any

import keras


class ProjectionsMixin:
    """LoRA and quantization for a layer that is made of `keras.layers.Dense` layers.

    The Dense layers keep these settings; the layer's config repeats them, because it
    makes its Dense layers anew when it is loaded.
    """

    built: bool
    query_projection: Any
    key_projection: Any
    value_projection: Any
    gate_projection: Any
    output_projection: Any
    update_rule: Any
    _loaded_projections: Any = None

    def _projections(self):
        """The layer's own Dense layers, those of the update rule left out."""
        layers = (
            self.query_projection,
            self.key_projection,
            self.value_projection,
            self.gate_projection,
            self.output_projection,
        )
        return [layer for layer in layers if layer is not None]

    def _all_projections(self):
        rule = [
            x for x in self.update_rule._layers if isinstance(x, keras.layers.Dense)
        ]
        return self._projections() + rule

    def enable_lora(
        self,
        rank,
        a_initializer="he_uniform",
        b_initializer="zeros",
        lora_alpha=None,
    ):
        """Adds a low-rank update to each projection and freezes the projection itself.

        Args:
            rank: rank of the update.
            a_initializer, b_initializer: initializers of its two factors.
            lora_alpha: the update counts `lora_alpha / rank`. Defaults to `rank`.

        Raises:
            ValueError: if the layer is not built, or has LoRA already.
        """
        if not self.built:
            raise ValueError("Cannot enable LoRA on a layer that isn't yet built.")
        for layer in self._projections():
            layer.enable_lora(
                rank,
                a_initializer=a_initializer,
                b_initializer=b_initializer,
                lora_alpha=lora_alpha,
            )
        self.lora_rank = rank
        self.lora_alpha = rank if lora_alpha is None else lora_alpha

    def quantize(self, mode=None, type_check=True, config=None):
        """Quantizes each projection, in the sense of `keras.layers.Dense.quantize`.

        The router, the update rule's gates, the convolutions and the memories keep
        their precision.

        Args:
            mode: `"int8"`, or another mode that `keras.layers.Dense` knows.
            type_check, config: as in `keras.layers.Dense.quantize`.
        """
        del type_check
        for layer in self._projections():
            layer.quantize(mode, config=config)

    def _set_lora(self, rank, alpha):
        self.lora_rank = rank
        self.lora_alpha = alpha
        for layer in self._projections():
            layer.lora_rank = rank
            layer.lora_alpha = rank if alpha is None else alpha

    def _prepare_sublayer(self, layer):
        """Gives a projection that is made in `build` the settings of the others."""
        layer.lora_rank = self.lora_rank
        layer.lora_alpha = (
            self.lora_rank if self.lora_alpha is None else self.lora_alpha
        )
        self._restore_quantization(layer)

    def _restore_quantization(self, layer):
        policy = (self._loaded_projections or {}).get(layer.name)
        if policy is not None:
            layer.dtype_policy = keras.dtype_policies.deserialize(policy)

    def _projections_config(self):
        quantized = {
            layer.name: keras.dtype_policies.serialize(layer.dtype_policy)
            for layer in self._all_projections()
            if layer.dtype_policy.quantization_mode is not None
        }
        config = {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}
        if quantized:
            config["quantized_projections"] = quantized
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        quantized = config.pop("quantized_projections", None)
        layer = cls(**config)
        layer._loaded_projections = quantized
        for projection in layer._all_projections():
            layer._restore_quantization(projection)
        return layer
