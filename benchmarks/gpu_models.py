"""What both halves of the GPU benchmark time: a layer and a language model of such."""

import keras

import keras_mom

BATCH, LENGTH, WIDTH, HEADS, HEAD_DIM = 8, 2048, 1024, 8, 128
DEPTH, INNER_WIDTH, VOCABULARY = 24, 2048, 32_000


KERNELS = {"torch": "triton", "jax": "pallas"}[keras.backend.backend()]


def mom_layer(dtype="bfloat16", **options):
    """`MoMLayer` through its kernels."""
    return keras_mom.MoMLayer(
        HEADS, HEAD_DIM, dtype=dtype, **{"implementation": KERNELS, **options}
    )


def language_model(depth=DEPTH, dtype="bfloat16", batch=None, **options):
    """Tied embeddings, and pre-norm blocks of MoM and SwiGLU.

    Args:
        depth: number of blocks.
        dtype: of weights and activations.
        batch: if given, the batch size of a model that keeps its state.
        options: of the layers.
    """
    layers = keras.layers
    dense = dict(use_bias=False, dtype=dtype)
    embedding = layers.ReversibleEmbedding(VOCABULARY, WIDTH, dtype=dtype)
    tokens = keras.Input(batch_shape=(batch, None), dtype="int32")
    x = embedding(tokens)
    for _ in range(depth):
        inner = layers.RMSNormalization(dtype=dtype)(x)
        x = x + mom_layer(dtype, stateful=batch is not None, **options)(inner)
        inner = layers.RMSNormalization(dtype=dtype)(x)
        gate = layers.Dense(INNER_WIDTH, activation="silu", **dense)(inner)
        inner = gate * layers.Dense(INNER_WIDTH, **dense)(inner)
        x = x + layers.Dense(WIDTH, **dense)(inner)
    x = layers.RMSNormalization(dtype=dtype)(x)
    return keras.Model(tokens, embedding(x, reverse=True))
