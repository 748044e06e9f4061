"""Inputs and blocks that the model builders share."""

import inspect
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_mom.checks import check_positive
from keras_mom.layers.mom_layer import MoMLayer
from keras_mom.models.gated_mlp import GatedMLP
from keras_mom.models.token_embedding import TokenEmbedding

# What a builder decides for itself.
_RESERVED = (
    "return_sequences",
    "return_state",
    "go_backwards",
    "stateful",
    "lora_rank",
    "lora_alpha",
    "dtype",
    "name",
)
_MOM_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(MoMLayer.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in _RESERVED
)


class Blocks:
    """Pre-norm blocks of a MoM layer and a gated feed-forward network, and a last norm.

    Args:
        num_layers: number of blocks.
        hidden_dim: width, D.
        num_heads, key_dim, value_dim: of `keras_mom.MoMLayer`.
        bidirectional: whether each block reads the sequence in both directions.
        intermediate_dim: width of the feed-forward network; `2 * hidden_dim` if None.
        dropout: rate of the dropout of what is added to the residual stream.
        remat: whether each layer is computed anew in the backward pass.
        seed: seed of the dropout.
        dtype: dtype policy of all layers.
        mom_arguments: further arguments of `keras_mom.MoMLayer`.

    Raises:
        ValueError: if an argument does not fit; the message names it.
    """

    def __init__(
        self,
        num_layers,
        hidden_dim,
        num_heads,
        key_dim,
        value_dim,
        *,
        bidirectional,
        intermediate_dim,
        dropout,
        remat,
        seed,
        dtype,
        mom_arguments,
    ):
        check_positive("num_layers", num_layers)
        check_positive("hidden_dim", hidden_dim)
        if intermediate_dim is not None:
            check_positive("intermediate_dim", intermediate_dim)
        if not 0 <= dropout < 1:
            raise ValueError(
                f"`dropout` must be at least 0 and below 1. Received: {dropout!r}"
            )
        for name in mom_arguments:
            if name not in _MOM_ARGUMENTS:
                raise ValueError(
                    f"`{name}` is no argument of this function. Beside its own, it "
                    f"takes those of `keras_mom.MoMLayer`: {', '.join(_MOM_ARGUMENTS)}"
                )
        self.num_layers = num_layers
        self.hidden_dim = hidden_dim
        self.bidirectional = bool(bidirectional)
        self.dropout = dropout
        self.remat = bool(remat)
        self.seed = seed
        self.dtype = keras.dtype_policies.get(
            keras.config.dtype_policy() if dtype is None else dtype
        )
        self.epsilon = mom_arguments.get("norm_epsilon", 1e-6)
        self.mixer = dict(
            mom_arguments, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim
        )
        self.feed_forward: dict[str, Any] = {
            name: value
            for name, value in mom_arguments.items()
            if name in ("kernel_initializer", "kernel_regularizer", "kernel_constraint")
        }
        self.feed_forward["intermediate_dim"] = (
            2 * hidden_dim if intermediate_dim is None else intermediate_dim
        )
        # The arguments that MoMLayer checks are checked before a graph is begun.
        MoMLayer(**self.mixer)

    @property
    def output_dtype(self):
        """Dtype policy of a head: float32 for a model of 16 bits."""
        half = self.dtype.compute_dtype in ("float16", "bfloat16")
        return "float32" if half else self.dtype

    def __call__(self, x, mask=None):
        """Adds the blocks to a graph.

        Args:
            x: symbolic `[B, T, hidden_dim]`.
            mask: symbolic bool `[B, T]`, or None.

        Returns:
            Symbolic `[B, T, hidden_dim]`, normalized.
        """
        for index in range(self.num_layers):
            block = f"block_{index}"
            mixed = self._mixer(f"{block}_mixer")(
                self._norm(f"{block}_mixer_norm")(x), mask=mask
            )
            x = self._add(f"{block}_mixer", x, mixed, 2 * index)
            with self._scope(f"{block}_feed_forward"):
                feed_forward = GatedMLP(
                    dtype=self.dtype, name=f"{block}_feed_forward", **self.feed_forward
                )
            moved = feed_forward(self._norm(f"{block}_feed_forward_norm")(x))
            x = self._add(f"{block}_feed_forward", x, moved, 2 * index + 1)
        return self._norm("final_norm")(x)

    def _mixer(self, name):
        if not self.bidirectional:
            with self._scope(name):
                return MoMLayer(dtype=self.dtype, name=name, **self.mixer)
        # The wrapper is not computed anew as a whole: its layers' losses would be too.
        with self._scope(f"forward_{name}", f"backward_{name}"):
            return keras.layers.Bidirectional(
                MoMLayer(dtype=self.dtype, name=name, **self.mixer),
                merge_mode="sum",
                dtype=self.dtype,
                name=name,
            )

    def _scope(self, *names):
        mode = "list_of_layers" if self.remat else None
        return keras.RematScope(mode=mode, layer_names=names)

    def _norm(self, name):
        return keras.layers.RMSNormalization(
            epsilon=self.epsilon, dtype=self.dtype, name=name
        )

    def _add(self, name, x, y, place):
        if self.dropout:
            seed = None if self.seed is None else self.seed + place
            y = keras.layers.Dropout(
                self.dropout, seed=seed, dtype=self.dtype, name=f"{name}_dropout"
            )(y)
        return keras.layers.Add(dtype=self.dtype, name=f"{name}_residual")([x, y])


class Source(NamedTuple):
    """The inputs of a model.

    Attributes:
        inputs: symbolic tensor, or a dict of them.
        hidden: symbolic `[B, T, hidden_dim]`.
        mask: symbolic bool `[B, T]`, or None.
    """

    inputs: Any
    hidden: Any
    mask: Any


def sequence_source(
    blocks, vocabulary_size, feature_dim, sequence_length, padding_id, padding_mask
):
    """The inputs of a model of token ids or of features, embedded.

    Raises:
        ValueError: if an argument does not fit; the message names it.
    """
    if (vocabulary_size is None) == (feature_dim is None):
        raise ValueError(
            "One of `vocabulary_size` (token ids come in) and `feature_dim` (features "
            f"come in) must be given. Received: vocabulary_size={vocabulary_size}, "
            f"feature_dim={feature_dim}"
        )
    if sequence_length is not None:
        check_positive("sequence_length", sequence_length)
    if vocabulary_size is not None:
        check_positive("vocabulary_size", vocabulary_size)
        name = "token_ids"
        source = keras.Input((sequence_length,), dtype="int32", name=name)
        hidden = TokenEmbedding(
            vocabulary_size, blocks.hidden_dim, dtype=blocks.dtype, name="embedding"
        )(source)
    else:
        check_positive("feature_dim", feature_dim)
        name = "features"
        source = keras.Input((sequence_length, feature_dim), name=name)
        hidden = keras.layers.Dense(
            blocks.hidden_dim, dtype=blocks.dtype, name="embedding"
        )(source)
    mask = None
    if padding_id is not None:
        _check_padding_id(padding_id, vocabulary_size, padding_mask)
        mask = ops.not_equal(source, padding_id)
    if not padding_mask:
        return Source(source, hidden, mask)
    given = padding_mask_input(sequence_length)
    inputs = {name: source, "padding_mask": given}
    return Source(inputs, hidden, ops.cast(given, "bool"))


def padding_mask_input(sequence_length):
    """A model's input that says which tokens count."""
    return keras.Input((sequence_length,), dtype="int32", name="padding_mask")


def _check_padding_id(padding_id, vocabulary_size, padding_mask):
    if padding_mask:
        raise ValueError(
            "`padding_id` and `padding_mask` are two ways to say the same; one may be "
            f"given. Received: padding_id={padding_id}, padding_mask={padding_mask}"
        )
    if vocabulary_size is None or not 0 <= padding_id < vocabulary_size:
        raise ValueError(
            "`padding_id` must be a token id below `vocabulary_size`. "
            f"Received: padding_id={padding_id}, vocabulary_size={vocabulary_size}"
        )
