"""A pre-norm block: a sequence layer and a feed-forward network."""

from typing import Any

import keras
from keras import ops

from keras_mom.layers.mom_layer import MoMLayer
from keras_mom.layers.rematerialization import call_on_tensors
from keras_mom.models.causal_attention import CausalAttention
from keras_mom.models.mixture_of_experts import MixtureOfExperts
from keras_mom.ops.constants import select

# What a block needs of a `MoMLayer`.
_FIXED = {"return_sequences": True, "return_state": False, "stateful": False}


@keras.saving.register_keras_serializable("keras_mom")
class MoMDecoderBlock(keras.layers.Layer):
    """`x + mixer(norm(x))`, and then `x + feed_forward(norm(x))`.

    Args:
        mixer: `keras_mom.MoMLayer` or `keras_mom.models.CausalAttention`.
        feed_forward: `keras_mom.models.GatedMLP` or
            `keras_mom.models.MixtureOfExperts`.
        dropout: rate of the dropout of what is added to the residual stream.
        norm_epsilon: epsilon of the two RMS norms.
        seed: seed of the dropout.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: float `[B, T, D]`.
        mask: bool or integer `[B, T]`, False or 0 at tokens that do not count.
        segment_ids: integer `[B, T]`: a new document begins wherever the id changes.
        training: whether dropout is applied and routing statistics are kept.

    Returns:
        `[B, T, D]` of the compute dtype.
    """

    mixer: Any
    feed_forward: Any

    def __init__(
        self,
        mixer,
        feed_forward,
        *,
        dropout=0.0,
        norm_epsilon=1e-6,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not 0 <= dropout < 1:
            raise ValueError(
                f"`dropout` must be at least 0 and below 1. Received: {dropout!r}"
            )
        for argument, value in _FIXED.items():
            received = getattr(mixer, argument, value)
            if received != value:
                raise ValueError(
                    f"`mixer` must have `{argument}={value}` in a block. "
                    f"Received: {argument}={received}"
                )
        self.mixer = mixer
        self.feed_forward = feed_forward
        self.dropout = dropout
        self.norm_epsilon = norm_epsilon
        self.seed = seed
        self.supports_masking = True
        self.seed_generator = keras.random.SeedGenerator(seed) if dropout else None
        # The block is rematerialized as a whole, or not.
        with keras.RematScope(mode=None):
            self.mixer_norm = self._norm("mixer_norm")
            self.feed_forward_norm = self._norm("feed_forward_norm")

    def _norm(self, name):
        norm = keras.layers.RMSNormalization(
            epsilon=self.norm_epsilon, dtype=self.dtype_policy, name=name
        )
        norm.supports_masking = True
        return norm

    def build(self, inputs_shape):
        for layer in (
            self.mixer_norm,
            self.mixer,
            self.feed_forward_norm,
            self.feed_forward,
        ):
            if not layer.built:
                layer.build(inputs_shape)
        self.built = True

    def call(self, inputs, mask=None, segment_ids=None, training=None):
        kept = self._draw_kept(inputs, training)
        arguments: dict[str, Any] = {"mask": _as_bool(mask)}
        if segment_ids is not None:
            arguments["segment_ids"] = segment_ids
        if isinstance(self.mixer, MoMLayer):
            arguments["training"] = training
        x = self.mixer(self.mixer_norm(inputs), **arguments)
        x = inputs + self._drop(x, kept[0])
        return x + self._drop(self._feed_forward(x, mask, training), kept[1])

    def _feed_forward(self, x, mask, training):
        x = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, MixtureOfExperts):
            return self.feed_forward(x, mask=_as_bool(mask), training=training)
        return self.feed_forward(x)

    def _draw_kept(self, inputs, training):
        """Which entries two dropouts keep: bool `[2, B, T, D]`, or Nones."""
        if not (self.dropout and training):
            return None, None
        shape = (2, *ops.shape(inputs))
        return keras.random.uniform(shape, seed=self.seed_generator) >= self.dropout

    def _drop(self, x, kept):
        if kept is None:
            return x
        return select(kept, x / (1 - self.dropout), 0)

    # Rematerialization: only what has no side effects may run twice.

    def rematerialized_call(self, layer_call, *args, **kwargs):
        wrap = super().rematerialized_call

        def call(inputs, mask=None, segment_ids=None, training=None):
            kept = self._draw_kept(inputs, training)
            output, *statistics = call_on_tensors(
                lambda function: wrap(function, *args, **kwargs),
                self._compute,
                (inputs, mask, segment_ids, kept[0], kept[1]),
            )
            of_mixer, of_feed_forward = statistics
            if of_mixer is not None:
                self.mixer._record(training, output, None, of_mixer)
            if of_feed_forward is not None:
                self.feed_forward._record(training, output, of_feed_forward)
            return output

        return call

    def _compute(self, inputs, mask, segment_ids, *kept):
        """Output, and the routing statistics of the two layers, where they route."""
        mask = _as_bool(mask)
        x = self.mixer_norm(inputs)
        of_mixer = of_feed_forward = None
        if isinstance(self.mixer, MoMLayer):
            x, _, of_mixer = self.mixer._compute(x, mask, None, segment_ids)
        else:
            x = self.mixer(x, mask=mask, segment_ids=segment_ids)
        inputs = inputs + self._drop(x, kept[0])
        x = self.feed_forward_norm(inputs)
        if isinstance(self.feed_forward, MixtureOfExperts):
            x, of_feed_forward = self.feed_forward._compute(x, mask)
        else:
            x = self.feed_forward(x)
        return inputs + self._drop(x, kept[1]), of_mixer, of_feed_forward

    # Reading in pieces.

    def get_initial_cache(self, batch_size, max_length=None):
        """What the mixer carries from call to call, before the first."""
        if isinstance(self.mixer, CausalAttention):
            return self.mixer.get_initial_cache(batch_size, max_length)
        return self.mixer.get_initial_state(batch_size)

    def call_with_cache(
        self, inputs, cache, places, segment_ids=None, anew=None, in_place=False
    ):
        """A call on the next tokens; see `MoMBackbone.call_with_cache`.

        Args:
            inputs: `[B, T, D]`.
            cache: as `get_initial_cache` gives it.
            places: `keras_mom.models.cache.Places`.
            segment_ids: int32 `[B, T]` or None.
            anew: bool `[B]`, whether a row's first valid token begins a new document,
                or None.
            in_place: whether the tensors of `cache` may be overwritten.

        Returns:
            Output `[B, T, D]` and the new cache.
        """
        x = self.mixer_norm(inputs)
        if isinstance(self.mixer, CausalAttention):
            x, cache = self.mixer.call_with_cache(x, cache, places)
        else:
            if anew is not None:
                cache = tuple(
                    ops.where(
                        ops.reshape(anew, (-1, *[1] * (len(part.shape) - 1))),
                        ops.zeros_like(part),
                        part,
                    )
                    for part in cache
                )
            x, cache = self.mixer.call_with_state(
                x, cache, places.mask, segment_ids, in_place
            )
        inputs = inputs + x
        x = self.feed_forward_norm(inputs)
        if isinstance(self.feed_forward, MixtureOfExperts):
            x, _ = self.feed_forward._compute(x, places.mask)
        else:
            x = self.feed_forward(x)
        return inputs + x, cache

    # Keras' protocols.

    def compute_mask(self, inputs, mask=None):
        return mask

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def compute_output_spec(self, inputs, mask=None, segment_ids=None, training=None):
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def save_own_variables(self, store):
        # Keras leaves the state of random numbers out of its files; training that is
        # taken up from one would draw other dropout than training that went on.
        if self.seed_generator is not None:
            store["seed_state"] = ops.convert_to_numpy(self.seed_generator.state)

    def load_own_variables(self, store):
        if self.seed_generator is not None and "seed_state" in store.keys():
            self.seed_generator.state.assign(store["seed_state"])

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "mixer": serialize(self.mixer),
            "feed_forward": serialize(self.feed_forward),
            "dropout": self.dropout,
            "norm_epsilon": self.norm_epsilon,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in ("mixer", "feed_forward"):
            config[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**config)


def _as_bool(mask):
    return None if mask is None else ops.cast(mask, "bool")
