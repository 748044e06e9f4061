"""LoRA and quantization of a backbone's projections."""

from typing import Any

import keras

from keras_mom.checks import check_positive


def forget_functions(model):
    """Has a model traced anew, because its variables are others than before."""
    model.train_function = model.test_function = model.predict_function = None


class AdaptationMixin:
    """Methods that change how the projections of `MoMBackbone` are kept."""

    blocks: list
    trainable: bool
    dtype_policy: Any
    _flatten_layers: Any

    def default_lora_layer_names(self):
        """Names of the projections that get LoRA: of query and value."""
        return ["query", "value"]

    def enable_lora(self, rank, target_layer_names=None):
        """Adds low-rank updates to projections, and freezes all else.

        Args:
            rank: rank of the updates.
            target_layer_names: names of the layers to update, among `query`, `key`,
                `value`, `gate`, `up`, `down` and `output`. Defaults to
                `default_lora_layer_names()`.

        Raises:
            ValueError: if a name is that of no layer, or LoRA is enabled already.
        """
        check_positive("rank", rank)
        names = target_layer_names or self.default_lora_layer_names()
        layers = [x for x in self._flatten_layers(include_self=False) if x.weights]
        targets = [
            (index, layer)
            for index, layer in enumerate(layers)
            if layer.name in names
            and hasattr(layer, "enable_lora")
            # Those which are made of others leave it to them.
            and len(layer._flatten_layers()) == 1
        ]
        unknown = set(names) - {layer.name for _, layer in targets}
        if unknown:
            raise ValueError(
                "`target_layer_names` must be names of projections in the model. "
                f"Received: {sorted(unknown)}"
            )
        self.trainable = True
        for layer in layers:
            layer.trainable = False
        for _, layer in targets:
            layer.trainable = True
            layer.enable_lora(rank)
        self.lora_rank, self.lora_layers = rank, list(names)
        # What KerasHub's `save_lora_weights` reads.
        self._lora_rank = rank
        self._lora_enabled_layers = [index for index, _ in targets]
        forget_functions(self)

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """Quantizes projections and embeddings; see `keras.Model.quantize`.

        Without `filters`, routers and the update rules' own projections keep their
        precision.
        """
        if filters is None:
            filters = self.is_quantizable
        super().quantize(  # pyright: ignore[reportAttributeAccessIssue]
            mode, config=config, filters=filters, **kwargs
        )

    def is_quantizable(self, layer):
        """Whether `quantize` takes this layer, when it is given no other filter."""
        kept = set()
        for block in self.blocks:
            rule = getattr(block.mixer, "update_rule", None)
            routers = (
                getattr(part, "router", None)
                for part in (block.mixer, block.feed_forward)
            )
            for part in (rule, *routers):
                if part is not None:
                    kept.update(id(x) for x in part._flatten_layers())
        return id(layer) not in kept and isinstance(
            layer, keras.layers.Dense | keras.layers.Embedding
        )

    def _quantized_policy(self):
        """The dtype policy, with those of the quantized layers."""
        policy = self.dtype_policy
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            return policy
        quantized = {
            layer.path: layer.dtype_policy
            for layer in self._flatten_layers(include_self=False)
            if layer.quantization_mode is not None
        }
        if not quantized:
            return policy
        return keras.dtype_policies.DTypePolicyMap(policy.name, quantized)
