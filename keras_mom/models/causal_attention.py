"""Causal softmax attention with grouped queries and rotary positions."""

import keras
from keras import ops

from keras_mom.checks import check_positive
from keras_mom.initializers import clone_initializer
from keras_mom.layers.checks import check_call
from keras_mom.layers.projections import ProjectionsMixin
from keras_mom.models.cache import (
    check_room,
    hide,
    slot_positions,
    write_piece,
    write_token,
)
from keras_mom.ops.constants import at_least, select
from keras_mom.ops.packing import document_numbers


@keras.saving.register_keras_serializable("keras_mom")
class CausalAttention(ProjectionsMixin, keras.layers.Layer):
    """Causal softmax attention: the other layer of hybrid models.

    Queries share keys and values in groups (arXiv 2305.13245), and query and key are
    turned by their position (rotary embedding, arXiv 2104.09864, halves of a head
    paired). Positions count valid tokens.

    Args:
        num_heads: number of query heads, H.
        head_dim: size of a head, K; even.
        num_key_value_heads: number of key and value heads, which divides `num_heads`.
            Defaults to `num_heads`.
        sliding_window: if given, a token sees itself and the `sliding_window - 1`
            tokens before it.
        rope_max_wavelength: base of the rotary embedding's wavelengths.
        kernel_initializer, kernel_regularizer, kernel_constraint: of the kernels of
            all projections.
        output_initializer: of the output projection's kernel. Defaults to
            `kernel_initializer`.
        lora_rank, lora_alpha: if given, the projections are built with LoRA.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: float `[B, T, D]`.
        mask: bool `[B, T]`, False at tokens that do not count, anywhere in the
            sequence. No other token sees them, and their output is 0.
        segment_ids: integer `[B, T]`: a new document begins wherever the id changes,
            and sees nothing of those before it.
        training: changes nothing.

    Returns:
        `[B, T, D]` of the compute dtype.

    Raises:
        ValueError: if an argument does not fit; the message names it.
    """

    def __init__(
        self,
        num_heads,
        head_dim,
        num_key_value_heads=None,
        *,
        sliding_window=None,
        rope_max_wavelength=10000,
        kernel_initializer="glorot_uniform",
        kernel_regularizer=None,
        kernel_constraint=None,
        output_initializer=None,
        lora_rank=None,
        lora_alpha=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if num_key_value_heads is None:
            num_key_value_heads = num_heads
        check_positive("num_heads", num_heads)
        check_positive("head_dim", head_dim)
        check_positive("num_key_value_heads", num_key_value_heads)
        if num_heads % num_key_value_heads:
            raise ValueError(
                "`num_key_value_heads` must divide `num_heads`. Received: "
                f"num_key_value_heads={num_key_value_heads}, num_heads={num_heads}"
            )
        if head_dim % 2:
            raise ValueError(
                "`head_dim` must be even, for the rotary embedding. "
                f"Received: head_dim={head_dim}"
            )
        if sliding_window is not None:
            check_positive("sliding_window", sliding_window)
        if not rope_max_wavelength > 0:
            raise ValueError(
                "`rope_max_wavelength` must be positive. "
                f"Received: rope_max_wavelength={rope_max_wavelength}"
            )
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_key_value_heads = num_key_value_heads
        self.sliding_window = sliding_window
        self.rope_max_wavelength = rope_max_wavelength
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.supports_masking = True
        self.update_rule = None
        self.gate_projection = None
        with keras.RematScope(mode=None):
            self.query_projection = self._dense(num_heads * head_dim, "query")
            of_keys = num_key_value_heads * head_dim
            self.key_projection = self._dense(of_keys, "key")
            self.value_projection = self._dense(of_keys, "value")
        # Its width is that of the inputs: see `build`.
        self.output_projection = None
        self._set_lora(lora_rank, lora_alpha)

    def _dense(self, units, name, initializer=None):
        initializer = initializer or self.kernel_initializer
        return keras.layers.Dense(
            units,
            use_bias=False,
            kernel_initializer=clone_initializer(initializer),
            kernel_regularizer=self.kernel_regularizer,
            kernel_constraint=self.kernel_constraint,
            dtype=self.dtype_policy,
            name=name,
        )

    def build(self, inputs_shape):
        width = inputs_shape[-1]
        if width is None:
            raise ValueError(
                "The last axis of `inputs` must be known. "
                f"Received: shape {tuple(inputs_shape)}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=3, axes={-1: width})
        with keras.RematScope(mode=None):
            self.output_projection = self._dense(
                width, "output", self.output_initializer
            )
        self._prepare_sublayer(self.output_projection)
        for layer in self._projections():
            if layer is not self.output_projection:
                layer.build(inputs_shape)
        heads = self.num_heads * self.head_dim
        self.output_projection.build((*inputs_shape[:-1], heads))
        self.built = True

    def _all_projections(self):
        return self._projections()

    def call(self, inputs, mask=None, segment_ids=None, training=None):
        del training
        check_call(inputs, mask, segment_ids)
        length = ops.shape(inputs)[1]
        index = ops.arange(length, dtype="int32")
        position, visible = index[None], None
        if mask is not None:
            mask = ops.cast(mask, "bool")
            position = ops.cumsum(ops.cast(mask, "int32"), axis=1) - 1
        query, key, value = self._project(inputs, position)
        if self.sliding_window is not None or not (
            mask is None and segment_ids is None
        ):
            document = None
            if segment_ids is not None:
                document = document_numbers(ops.cast(segment_ids, "int32"), mask)
            visible = self._visible(position, document, mask, index)
            # A masked token sees itself, so that every row of scores has an entry.
            visible = ops.logical_or(visible, index[:, None] == index)[:, None]
        groups = self.num_heads // self.num_key_value_heads
        if groups > 1:
            key, value = (ops.repeat(x, groups, axis=2) for x in (key, value))
        mixed = ops.dot_product_attention(
            query, key, value, mask=visible, is_causal=visible is None
        )
        return self._output(mixed, mask)

    def _visible(self, position, document, mask, index):
        """Which tokens of a call each of them sees: bool `[B or 1, T, T]`."""
        visible = (index[:, None] >= index)[None]
        if mask is not None:
            visible = ops.logical_and(visible, mask[:, None])
        if document is not None:
            same = document[:, :, None] == document[:, None]
            visible = ops.logical_and(visible, same)
        if self.sliding_window is not None:
            near = position[:, :, None] - position[:, None] < self.sliding_window
            visible = ops.logical_and(visible, near)
        return visible

    def _project(self, inputs, position):
        """Query `[B, T, H, K]`, turned, and key and value of their heads."""
        batch, length, _ = ops.shape(inputs)

        def heads(x):
            return ops.reshape(x, (batch, length, -1, self.head_dim))

        turn = self._turns(position)
        query = _rotate(heads(self.query_projection(inputs)), turn)
        key = _rotate(heads(self.key_projection(inputs)), turn)
        return query, key, heads(self.value_projection(inputs))

    def _turns(self, position):
        """Cosines and sines, float32 `[B or 1, T, 1, K / 2]`."""
        half = self.head_dim // 2
        exponent = ops.arange(half, dtype="float32") / half
        frequency = float(self.rope_max_wavelength) ** -exponent
        angle = ops.cast(position, "float32")[..., None, None] * frequency
        return ops.cos(angle), ops.sin(angle)

    def _output(self, mixed, mask):
        batch, length, _, _ = ops.shape(mixed)
        mixed = ops.reshape(mixed, (batch, length, self.num_heads * self.head_dim))
        output = self.output_projection(ops.cast(mixed, self.compute_dtype))
        return output if mask is None else select(mask[..., None], output, 0)

    # Reading in pieces.

    def get_initial_cache(self, batch_size, max_length=None):
        """Room for the keys and values of a sequence.

        Args:
            batch_size: B.
            max_length: the largest number of valid tokens in a row. May be None with
                a sliding window, which needs room for the window only.

        Returns:
            Keys and values, zeros of the compute dtype `[B, key_value_heads, S, K]`.
        """
        slots = self.sliding_window
        if max_length is not None:
            check_positive("max_length", max_length)
            slots = max_length if slots is None else min(slots, max_length)
        if slots is None:
            raise ValueError(
                "`max_length` must be given, because attention without a sliding "
                "window keeps every token. Received: max_length=None"
            )
        # A head's rows lie together: else products would copy them at every token.
        shape = (batch_size, self.num_key_value_heads, slots, self.head_dim)
        return tuple(ops.zeros(shape, self.compute_dtype) for _ in range(2))

    def call_with_cache(self, inputs, cache, places):
        """Attends to the tokens of this call and of those before.

        Args:
            inputs: `[B, T, D]`.
            cache: keys and values, as `get_initial_cache` gives them.
            places: `keras_mom.models.cache.Places`.

        Returns:
            Output `[B, T, D]` and the new cache. The one given is not changed.

        Raises:
            ValueError: if a row has more valid tokens than the cache has room for.
                In compiled functions and on accelerators, where values cannot be
                read, only the last `max_length` tokens are seen then.
        """
        inputs = ops.cast(inputs, self.compute_dtype)
        query, key, value = self._project(inputs, places.position)
        key, value = (ops.swapaxes(x, 1, 2) for x in (key, value))
        slots = cache[0].shape[2]
        if slots != self.sliding_window:
            check_room(places, slots)
        # Earlier tokens, from the cache as it came: this call may overwrite them.
        held = slot_positions(places.start, slots)
        first = at_least(places.document_start, 0)
        old = (held >= first[:, None])[:, None]
        if self.sliding_window is not None:
            reach = places.position[:, :, None] - held[:, None]
            old = ops.logical_and(old, reach < self.sliding_window)
        if places.document is not None:
            old = ops.logical_and(old, (places.document == 0)[..., None])
        length = ops.shape(inputs)[1]
        index = ops.arange(length, dtype="int32")
        new = self._visible(places.position, places.document, places.mask, index)
        mixed = self._attend(query, (cache[0], key), (cache[1], value), (old, new))
        write = write_token if inputs.shape[1] == 1 else write_piece
        cache = write((key, value), cache, places, slots)
        return self._output(mixed, places.mask), cache

    def _attend(self, query, keys, values, visible):
        """Softmax attention to several lists of keys at once; queries in groups."""
        batch, length, _, _ = ops.shape(query)
        shape = (batch, length, self.num_key_value_heads, -1, self.head_dim)
        query = ops.reshape(query, shape)
        # Scores of 16 bits would be too coarse for the exponential.
        query = ops.cast(query, "float32") * self.head_dim**-0.5
        scores = [
            hide(
                shown[:, None, None],
                ops.einsum("bthgk,bhsk->bhgts", query, ops.cast(key, "float32")),
            )
            for key, shown in zip(keys, visible)
        ]
        highest = ops.maximum(
            *(ops.max(score, axis=-1, keepdims=True) for score in scores)
        )
        weights = [ops.exp(score - highest) for score in scores]
        total = sum(ops.sum(weight, axis=-1, keepdims=True) for weight in weights)
        mixed = sum(
            ops.einsum(
                "bhgts,bhsk->bthgk", ops.cast(weight / total, value.dtype), value
            )
            for weight, value in zip(weights, values)
        )
        shape = (batch, length, self.num_heads, self.head_dim)
        return ops.reshape(mixed, shape)

    # Keras' protocols.

    def compute_mask(self, inputs, mask=None):
        return mask

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def compute_output_spec(self, inputs, mask=None, segment_ids=None, training=None):
        del training
        check_call(inputs, mask, segment_ids)
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self):
        serialize = keras.initializers.serialize
        output_initializer = self.output_initializer
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "num_key_value_heads": self.num_key_value_heads,
            "sliding_window": self.sliding_window,
            "rope_max_wavelength": self.rope_max_wavelength,
            "kernel_initializer": serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "output_initializer": (
                None if output_initializer is None else serialize(output_initializer)
            ),
            **self._projections_config(),
        }


def _rotate(x, turn):
    """Turns the pairs of channels (i, K / 2 + i) of `[B, T, H, K]`."""
    cosine, sine = turn
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return ops.cast(ops.concatenate(rotated, axis=-1), x.dtype)
