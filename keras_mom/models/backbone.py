"""The stack of blocks of a language model."""

from typing import Any

import keras
from keras import ops

from keras_mom import rules
from keras_mom.checks import check_keywords, check_names, check_positive
from keras_mom.initializers import Scaled
from keras_mom.layers.mom_layer import MoMLayer
from keras_mom.models import hub, presets
from keras_mom.models.adaptation import AdaptationMixin
from keras_mom.models.cache import places
from keras_mom.models.causal_attention import CausalAttention
from keras_mom.models.decoder_block import MoMDecoderBlock
from keras_mom.models.exporting import ExportMixin
from keras_mom.models.gated_mlp import GatedMLP
from keras_mom.models.mixture_of_experts import MixtureOfExperts
from keras_mom.models.token_embedding import TokenEmbedding

# Of the paper's code, `initializer_range`.
_STDDEV = 0.02


@keras.saving.register_keras_serializable("keras_mom")
class MoMBackbone(AdaptationMixin, ExportMixin, hub.Backbone):
    """A language model's token embedding, blocks of MoM layers, and final norm.

    A functional model. Each block is a pre-norm `keras_mom.MoMLayer`, or causal
    softmax attention where `attention_layers` says so, and a pre-norm SwiGLU network,
    or a mixture of them. Norms are RMS norms, and no layer has a bias. Kernels are
    drawn as in the paper's code: normal of deviation 0.02, and divided by
    `sqrt(2 * num_layers)` where they end in the residual stream.

    Source: arXiv 2502.13685; hybrid models, section 3.3; with a mixture of experts,
    arXiv 2503.05447.

    Args:
        vocabulary_size: number of tokens.
        num_layers: number of blocks.
        hidden_dim: width, D.
        num_heads, key_dim, value_dim: of `keras_mom.MoMLayer`.
        intermediate_dim: width of the feed-forward networks, of each expert with
            experts. Defaults to `2 * hidden_dim`.
        attention_layers: indices of the blocks with softmax attention; or an integer
            n for every n-th block, which with 8 is one after every seven.
        num_attention_heads: attention heads, of size `hidden_dim /
            num_attention_heads`. Defaults to `num_heads`.
        num_key_value_heads: key and value heads of attention. Defaults to
            `num_attention_heads`.
        rope_max_wavelength: base of the rotary embedding of attention.
        sliding_window: how many tokens attention sees, the token itself included.
        num_experts: number of feed-forward experts; 0 for one plain network.
        experts_per_token: number of experts that a token uses.
        shared_expert: whether one more expert serves every token.
        expert_balance_loss_weight: weight of the loss that evens out the experts'
            shares.
        tie_embeddings: whether `token_embedding` uses its own weights in reverse, or
            others.
        dropout: rate of the dropout of what each layer adds to the residual stream.
        packed: whether the model takes `segment_ids` too.
        remat: whether blocks are computed anew in the backward pass, so that only
            their inputs are kept.
        num_memories, top_k, shared_memory, update_rule, per_memory_projections,
        conv_width, use_output_gate, balance_loss_weight, implementation: of
            `keras_mom.MoMLayer`.
        norm_epsilon: epsilon of all RMS norms.
        kernel_initializer: of all kernels. Defaults to the normal distribution above.
        kernel_regularizer, kernel_constraint: of the kernels of all blocks.
        seed: seed of the dropout.
        lora_rank, lora_layers: if given, LoRA is enabled, as after `enable_lora`.
        dtype: dtype policy of all layers; a `keras.dtype_policies.DTypePolicyMap` of
            their paths where some of them are quantized.
        **kwargs: `name` and `trainable`.

    Call arguments:
        inputs: dict of int32 tensors `[B, T]`: `token_ids`; `padding_mask`, 0 at
            tokens that do not count, anywhere in a row; and with `packed`
            `segment_ids`, where a new document begins wherever the id changes.

    Returns:
        Hidden states `[B, T, D]` of the compute dtype.

    Raises:
        ValueError: if an argument does not fit; the message names it.

    Example:

    >>> backbone = keras_mom.models.MoMBackbone(256, 2, 64, num_heads=2, key_dim=32)
    >>> ids = np.ones((1, 10), "int32")
    >>> backbone({"token_ids": ids, "padding_mask": ids}).shape
    (1, 10, 64)
    """

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        hidden_dim,
        num_heads,
        key_dim,
        *,
        value_dim=None,
        intermediate_dim=None,
        attention_layers: Any = (),
        num_attention_heads=None,
        num_key_value_heads=None,
        rope_max_wavelength=10000,
        sliding_window=None,
        num_experts=0,
        experts_per_token=2,
        shared_expert=False,
        expert_balance_loss_weight=0.01,
        tie_embeddings=True,
        dropout=0.0,
        packed=False,
        remat=False,
        num_memories=4,
        top_k=2,
        shared_memory=True,
        update_rule: Any = "gated_delta_net",
        per_memory_projections=True,
        conv_width=4,
        use_output_gate=True,
        balance_loss_weight=0.01,
        norm_epsilon=1e-6,
        implementation=None,
        kernel_initializer=None,
        kernel_regularizer=None,
        kernel_constraint=None,
        seed=None,
        lora_rank=None,
        lora_layers=None,
        dtype=None,
        **kwargs,
    ):
        check_positive("vocabulary_size", vocabulary_size)
        check_positive("num_layers", num_layers)
        check_positive("hidden_dim", hidden_dim)
        check_positive("num_heads", num_heads)
        if intermediate_dim is None:
            intermediate_dim = 2 * hidden_dim
        if num_attention_heads is None:
            num_attention_heads = num_heads
        with_attention = _attention_indices(attention_layers, num_layers)
        if with_attention and hidden_dim % num_attention_heads:
            raise ValueError(
                "`num_attention_heads` must divide `hidden_dim`. Received: "
                f"num_attention_heads={num_attention_heads}, hidden_dim={hidden_dim}"
            )
        if kernel_initializer is None:
            kernel_initializer = keras.initializers.RandomNormal(stddev=_STDDEV)
        kernel_initializer = keras.initializers.get(kernel_initializer)
        weights: dict[str, Any] = dict(
            kernel_initializer=kernel_initializer,
            output_initializer=Scaled(kernel_initializer, (2 * num_layers) ** -0.5),
            kernel_regularizer=keras.regularizers.get(kernel_regularizer),
            kernel_constraint=keras.constraints.get(kernel_constraint),
            dtype=dtype,
        )
        named = update_rule if isinstance(update_rule, str) else None
        update_rule = rules.serialize(rules.get(update_rule))
        if named is not None:
            # Not a name that counts the rules made so far: it is part of the paths of
            # weights.
            update_rule["config"]["name"] = named

        def mixer(index):
            if index in with_attention:
                return CausalAttention(
                    num_attention_heads,
                    hidden_dim // num_attention_heads,
                    num_key_value_heads,
                    sliding_window=sliding_window,
                    rope_max_wavelength=rope_max_wavelength,
                    name="attention",
                    **weights,
                )
            return MoMLayer(
                num_heads,
                key_dim,
                value_dim,
                num_memories=num_memories,
                top_k=top_k,
                shared_memory=shared_memory,
                update_rule=update_rule,
                per_memory_projections=per_memory_projections,
                conv_width=conv_width,
                use_output_gate=use_output_gate,
                balance_loss_weight=balance_loss_weight,
                norm_epsilon=norm_epsilon,
                implementation=implementation,
                name="mom",
                **weights,
            )

        def feed_forward():
            if not num_experts:
                return GatedMLP(intermediate_dim, name="feed_forward", **weights)
            return MixtureOfExperts(
                num_experts,
                experts_per_token,
                intermediate_dim,
                shared_expert=shared_expert,
                balance_loss_weight=expert_balance_loss_weight,
                implementation=implementation,
                name="feed_forward",
                **weights,
            )

        def block(index):
            # A block is rematerialized as a whole.
            with keras.RematScope(mode=None):
                layers = mixer(index), feed_forward()
            with keras.RematScope(mode="full" if remat else None):
                return MoMDecoderBlock(
                    *layers,
                    dropout=dropout,
                    norm_epsilon=norm_epsilon,
                    seed=None if seed is None else seed + index,
                    dtype=dtype,
                    name=f"block_{index}",
                )

        token_embedding = TokenEmbedding(
            vocabulary_size,
            hidden_dim,
            tie_weights=tie_embeddings,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=_STDDEV),
            # Keras would compute the scores of tokens in the dtype of the weights.
            reverse_dtype=keras.dtype_policies.get(dtype).compute_dtype,
            dtype=dtype,
            name="token_embedding",
        )
        blocks = [block(index) for index in range(num_layers)]
        final_norm = keras.layers.RMSNormalization(
            epsilon=norm_epsilon, dtype=dtype, name="final_norm"
        )
        # Masks go on to the end of the blocks, and the scores of tokens need none.
        token_embedding.supports_masking = final_norm.supports_masking = True

        names = ["token_ids", "padding_mask"] + ["segment_ids"] * bool(packed)
        inputs = {
            name: keras.Input((None,), dtype="int32", name=name) for name in names
        }
        x = token_embedding(inputs["token_ids"])
        for layer in blocks:
            x = layer(
                x, mask=inputs["padding_mask"], segment_ids=inputs.get("segment_ids")
            )
        outputs = final_norm(x)
        check_keywords("MoMBackbone", kwargs)
        model: dict[str, Any] = dict(inputs=inputs, outputs=outputs, dtype=dtype)
        super().__init__(**model, **kwargs)

        self.token_embedding = token_embedding
        self.blocks = blocks
        self.final_norm = final_norm
        self.lora_rank, self.lora_layers = None, None
        if lora_rank is not None:
            self.enable_lora(lora_rank, lora_layers)
        if not isinstance(attention_layers, int):
            attention_layers = [int(index) for index in attention_layers]
        self._config = {
            "vocabulary_size": vocabulary_size,
            "num_layers": num_layers,
            "hidden_dim": hidden_dim,
            "num_heads": num_heads,
            "key_dim": key_dim,
            "value_dim": value_dim,
            "intermediate_dim": intermediate_dim,
            "attention_layers": attention_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "rope_max_wavelength": rope_max_wavelength,
            "sliding_window": sliding_window,
            "num_experts": num_experts,
            "experts_per_token": experts_per_token,
            "shared_expert": bool(shared_expert),
            "expert_balance_loss_weight": expert_balance_loss_weight,
            "tie_embeddings": bool(tie_embeddings),
            "dropout": dropout,
            "packed": bool(packed),
            "remat": bool(remat),
            "num_memories": num_memories,
            "top_k": top_k,
            "shared_memory": bool(shared_memory),
            "update_rule": update_rule,
            "per_memory_projections": bool(per_memory_projections),
            "conv_width": conv_width,
            "use_output_gate": bool(use_output_gate),
            "balance_loss_weight": balance_loss_weight,
            "norm_epsilon": norm_epsilon,
            "implementation": implementation,
            "kernel_initializer": keras.initializers.serialize(kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(
                weights["kernel_regularizer"]
            ),
            "kernel_constraint": keras.constraints.serialize(
                weights["kernel_constraint"]
            ),
            "seed": seed,
        }

    # Reading in pieces.

    def __call__(self, inputs, *args, **kwargs):
        if isinstance(inputs, dict):
            check_names(inputs, self.input)
        return super().__call__(inputs, *args, **kwargs)

    def get_initial_cache(self, batch_size, max_length=None):
        """What is carried from call to call, before the first.

        Args:
            batch_size: B.
            max_length: the largest number of valid tokens that a row will have. Only
                attention without a sliding window needs it, to make room for their
                keys and values; it must not be exceeded.

        Returns:
            A dict of tensors of fixed shapes: `layers`, a list of each block's state;
            and int32 `[B]` each, `position`, the number of valid tokens so far,
            `document_start`, how many of them came before the document that goes on,
            and `segment_id`, that of the last valid token.
        """
        return {
            "layers": [
                block.get_initial_cache(batch_size, max_length) for block in self.blocks
            ],
            **{
                name: ops.zeros((batch_size,), "int32")
                for name in ("position", "document_start", "segment_id")
            },
        }

    def call_with_cache(
        self, token_ids, cache, padding_mask=None, segment_ids=None, in_place=False
    ):
        """Reads the next tokens of each row.

        Any split of a row into calls gives the outputs of one call. Nothing is left
        behind: no losses, no routing statistics.

        Args:
            token_ids: int32 `[B, T]`.
            cache: as `get_initial_cache` or a call before gives it.
            padding_mask: `[B, T]`, 0 or False at tokens that do not count. They take
                no place in the cache.
            segment_ids: int32 `[B, T]`: a new document begins wherever the id of a
                valid token differs from that of the one before, which may have come
                in an earlier call. None where all tokens go on with the document.
            in_place: whether the tensors of `cache` may be overwritten, because
                nobody needs them any more. Only torch does so.

        Returns:
            Hidden states `[B, T, D]`, and the cache for the next call. The cache given
            is not changed.
        """
        token_ids = ops.convert_to_tensor(token_ids)
        mask = None
        if padding_mask is not None:
            mask = ops.cast(ops.convert_to_tensor(padding_mask), "bool")
        if segment_ids is not None:
            segment_ids = ops.cast(ops.convert_to_tensor(segment_ids), "int32")
        where, anew, following = places(cache, token_ids, mask, segment_ids)
        x = self.token_embedding(token_ids)
        layers = []
        for block, state in zip(self.blocks, cache["layers"], strict=True):
            x, state = block.call_with_cache(
                x, state, where, segment_ids, anew, in_place
            )
            layers.append(state)
        cache = {**following, "layers": layers}
        return self.final_norm(x), cache

    # Keras' protocols.

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Makes the backbone of a name or of a folder.

        Args:
            preset: `"mom_340m"`, `"mom_1.3b"` or `"mom_tiny"`, configurations with
                random weights; the path of a folder that `save_to_preset` wrote; or
                with KerasHub whatever it takes.
            load_weights: whether to load a folder's weights.
            **kwargs: arguments of the backbone that differ.

        Raises:
            ValueError: if there is no such preset.
        """
        config = presets.configuration(preset)
        if config is not None:
            return cls(**{**config, **kwargs})
        return super().from_preset(preset, load_weights=load_weights, **kwargs)

    def get_config(self):
        return {
            **self._config,
            "lora_rank": self.lora_rank,
            "lora_layers": self.lora_layers,
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self._quantized_policy()),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        del custom_objects
        config = dict(config)
        if isinstance(config.get("dtype"), dict):
            config["dtype"] = keras.dtype_policies.deserialize(config["dtype"])
        return cls(**config)


def _attention_indices(attention_layers, num_layers):
    """The indices of blocks with attention, from a list or from n for every n-th."""
    given: Any = attention_layers
    if isinstance(attention_layers, int) and not isinstance(attention_layers, bool):
        check_positive("attention_layers", attention_layers)
        return set(range(attention_layers - 1, num_layers, attention_layers))
    try:
        indices = [int(index) for index in given]
    except (TypeError, ValueError):
        indices = None
    if indices is None or not all(0 <= index < num_layers for index in indices):
        raise ValueError(
            "`attention_layers` must be an integer n, for every n-th block, or a list "
            f"of indices from 0 to {num_layers - 1}. Received: {attention_layers!r}"
        )
    return set(indices)
