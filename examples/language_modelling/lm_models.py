"""The models that are compared: the same but for what mixes tokens."""

import math
from dataclasses import dataclass

import keras_mom
from keras_mom.models import MoMBackbone

# What mixes tokens, and how it is named in tables.
KINDS = {
    "single": "one memory",
    "mom": "MoM",
    "mom_unshared": "MoM without the shared memory",
    "hybrid": "MoM and softmax attention",
    "attention": "softmax attention",
}
ROUTED = ("mom", "mom_unshared", "hybrid")  # those with a balance loss
VOCABULARY = 256  # bytes
# The feed-forward network is a multiple of this wide.
WIDTH_STEP = 8


@dataclass(frozen=True)
class ModelSettings:
    """What a model is built of.

    Attributes:
        model: a key of `KINDS`.
        rule: update rule, or "" where there is none.
        balance_weight: of the routers' balance loss, or "" where there is none.
        layers, width: number of layers, and D.
        heads, key_dim, value_dim: H, and K and V a head, of one memory.
        memories, top_k: M and k.
        attention_heads: heads of softmax attention.
        attention_every: every how many layers of a hybrid one is softmax attention.
        target: activated parameters that the feed-forward width is chosen for.
    """

    model: str
    rule: str
    balance_weight: float | str
    layers: int
    width: int
    heads: int
    key_dim: int
    value_dim: int
    memories: int
    top_k: int
    attention_heads: int
    attention_every: int
    target: int

    def backbone(self, intermediate_dim, **options):
        """`keras_mom.models.MoMBackbone` with a feed-forward network of this width."""
        if self.model == "hybrid" and self.attention_every > self.layers:
            raise ValueError(
                "`--attention-every` must be `--layers` at most, for a layer with "
                f"attention. Received: {self.attention_every} of {self.layers}"
            )
        routed = self.model in ROUTED
        every = {"attention": 1, "hybrid": self.attention_every}.get(self.model)
        return MoMBackbone(
            VOCABULARY,
            self.layers,
            self.width,
            self.heads,
            self.key_dim,
            value_dim=self.value_dim,
            intermediate_dim=intermediate_dim,
            attention_layers=() if every is None else every,
            num_attention_heads=self.attention_heads,
            num_memories=self.memories if routed else 1,
            top_k=self.top_k if routed else 1,
            shared_memory=routed and self.model != "mom_unshared",
            update_rule=self.rule or "gated_delta_net",
            balance_loss_weight=float(self.balance_weight or 0),
            **options,
        )

    def fitted_backbone(self, **options):
        """The backbone whose activated parameters are nearest to the target.

        Raises:
            ValueError: if the target is too small.
        """
        least = activated_parameters(self.backbone(WIDTH_STEP))
        step = 3 * self.layers * self.width * WIDTH_STEP
        steps = 1 + round((self.target - least) / step)
        if steps < 1:
            raise ValueError(
                f"`--parameters` must be {least:,} or more for {self.model!r} of these "
                f"sizes. Received: {self.target:,}"
            )
        return self.backbone(steps * WIDTH_STEP, **options)


def parameters(layer):
    """The number of trainable parameters."""
    return sum(math.prod(weight.shape) for weight in layer.trainable_weights)


def activated_parameters(backbone):
    """The number of parameters that one token uses, the embedding's included.

    All but those of the keys, values and gates of the memories that it is not sent to.
    """
    idle = 0
    for block in backbone.blocks:
        layer = block.mixer
        if isinstance(layer, keras_mom.MoMLayer) and layer.per_memory_projections:
            rule = layer.update_rule._flatten_layers(include_self=False)
            apart = [layer.key_projection, layer.value_projection, *rule]
            # The rule's weights are those of its Dense layers, a kernel a memory.
            held = sum(parameters(part) for part in apart)
            idle += held * (layer.num_memories - layer.top_k) // layer.sizes.projections
    return parameters(backbone) - idle
