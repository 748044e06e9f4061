"""The models that are compared: the same but for what mixes tokens."""

import math
from dataclasses import dataclass

import keras
from keras import ops

import keras_mom

# What mixes tokens, and how it is named in tables.
KINDS = {
    "single": "one memory",
    "expanded": "one memory, values expanded",
    "expanded_keys": "one memory, keys expanded",
    "mom": "MoM",
    "mom_unshared": "MoM without the shared memory",
    "hybrid": "MoM and softmax attention in turn",
    "attention": "softmax attention",
    "lstm": "LSTM",
}
# Those that have no update rule.
WITHOUT_RULE = ("attention", "lstm")
_STDDEV = 0.02


@dataclass(frozen=True)
class ModelSettings:
    """What a model is built of.

    Attributes:
        kind: a key of `KINDS`. The expanded ones have as many numbers in their one
            memory as a MoM layer uses for a token: k + 1 times as large values or keys.
        rule: update rule, or "" where there is none.
        layers: number of layers.
        width: D.
        heads, key_dim, value_dim: H, and K and V a head, of one memory. Attention has
            the heads too.
        memories, top_k: M and k.
        feed_forward: whether a `keras_mom.models.GatedMLP` follows each layer.
        convolution: whether a causal convolution of width 3 comes before each layer.
        tied: whether the embedding serves in reverse too.
    """

    kind: str
    rule: str
    layers: int
    width: int
    heads: int
    key_dim: int
    value_dim: int
    memories: int
    top_k: int
    feed_forward: bool
    convolution: bool
    tied: bool

    def memory_arguments(self):
        """Arguments of `keras_mom.MoMLayer`."""
        key_dim, value_dim = self.key_dim, self.value_dim
        active = self.top_k + 1
        memories, top_k, shared = 1, 1, False
        if self.kind in ("mom", "mom_unshared", "hybrid"):
            memories, top_k = self.memories, self.top_k
            shared = self.kind != "mom_unshared"
        elif self.kind == "expanded":
            value_dim *= active
        elif self.kind == "expanded_keys":
            key_dim *= active
        return dict(
            num_heads=self.heads,
            key_dim=key_dim,
            value_dim=value_dim,
            num_memories=memories,
            top_k=top_k,
            shared_memory=shared,
        )

    def uses_attention(self, layer):
        return self.kind == "attention" or (self.kind == "hybrid" and layer % 2 == 1)

    def state_size(self, length):
        """Numbers kept for a sequence, convolution windows left out: all, and active.

        Active are those of the memories that one token writes to.
        """
        total = active = 0
        for layer in range(self.layers):
            if self.uses_attention(layer):
                size = used = 2 * self.width * length
            elif self.kind == "lstm":
                size = used = 2 * self.width
            else:
                numbers = self.memory_arguments()
                one = self.heads * numbers["key_dim"] * numbers["value_dim"]
                size = one * (numbers["num_memories"] + numbers["shared_memory"])
                used = one * (numbers["top_k"] + numbers["shared_memory"])
            total, active = total + size, active + used
        return total, active


def build_model(settings, vocabulary_size, length=None, encoder=False):
    """Tokens `[B, T]` and places `[B, P]` to logits `[B, P, vocabulary_size]`.

    They are of the tokens asked for at these places: logits of all places would take
    more time than all layers together. With `encoder` they are told, place by place,
    from the output at the last token alone (MAD's auto-encoder).
    """
    tokens = keras.Input((length,), dtype="int32", name="tokens")
    places = keras.Input((None,), dtype="int32", name="places")
    inputs = {"tokens": tokens, "places": places}
    embedding = keras_mom.models.TokenEmbedding(
        vocabulary_size,
        settings.width,
        tie_weights=settings.tied,
        embeddings_initializer=keras.initializers.RandomNormal(
            stddev=_STDDEV if settings.tied else 1.0
        ),
        name="embedding",
    )
    x = embedding(tokens)
    for layer in range(settings.layers):
        if settings.convolution:
            convolution = keras.layers.Conv1D(
                settings.width, 3, padding="causal", name=f"convolution_{layer}"
            )
            x = x + convolution(_norm(f"convolution_norm_{layer}")(x))
        mixed = _mixer(settings, layer)(_norm(f"norm_{layer}")(x))
        x = x + mixed
        if settings.feed_forward:
            network = keras_mom.models.GatedMLP(2 * settings.width, name=f"mlp_{layer}")
            x = x + network(_norm(f"mlp_norm_{layer}")(x))
    if encoder:
        x = _decode(x[:, -1], settings, vocabulary_size, length)
        return keras.Model(inputs, _at(x, places))
    x = _norm("final_norm")(_at(x, places))
    return keras.Model(inputs, embedding(x, reverse=True))


def _at(x, places):
    """Rows of x `[B, T, D]` at places `[B, P]`."""
    return ops.take_along_axis(x, places[:, :, None], axis=1)


def _norm(name):
    return keras.layers.RMSNormalization(epsilon=1e-6, name=name)


def _mixer(settings, layer):
    if settings.uses_attention(layer):
        return keras_mom.models.CausalAttention(
            settings.heads, settings.width // settings.heads, name=f"attention_{layer}"
        )
    if settings.kind == "lstm":
        return keras.layers.LSTM(
            settings.width, return_sequences=True, name=f"lstm_{layer}"
        )
    rule = settings.rule
    if rule == "gsa":  # as many slots as the other rules have key channels
        rule = keras_mom.rules.GSA(num_slots=settings.key_dim)
    return keras_mom.MoMLayer(
        update_rule=rule, name=f"mom_{layer}", **settings.memory_arguments()
    )


def _decode(x, settings, vocabulary_size, length):
    """Logits `[B, T, vocabulary_size]` of one vector a sequence."""
    half = settings.width // 2
    frequencies = [math.exp(-math.log(10000.0) * i / half) for i in range(half)]
    angles = ops.arange(length, dtype="float32")[:, None] * ops.array(frequencies)
    places = ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)
    x = x[:, None] + ops.cast(places, x.dtype)
    for name in ("decoder_0", "decoder_1"):
        x = keras.layers.Dense(settings.width, "gelu", name=name)(_norm(f"{name}_n")(x))
    return keras.layers.Dense(vocabulary_size, name="logits")(_norm("final_norm")(x))
