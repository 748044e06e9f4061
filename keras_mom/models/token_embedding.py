"""The embedding of tokens, which serves in reverse too."""

from typing import Any

import keras
from keras import ops

from keras_mom.ops.embedding import embed


@keras.saving.register_keras_serializable("keras_mom")
class TokenEmbedding(keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding` for training in 16 bits.

    Keras reads the table in the compute dtype, and so the gradient of a token's row is
    summed over the batch in that dtype: with 65,536 bytes a batch and
    `mixed_bfloat16`, it is off by a half. Here it is summed in float32. Weights, files
    and everything else are the same.

    Args:
        input_dim, output_dim, **kwargs: as of `keras.layers.ReversibleEmbedding`, but
            for `mask_zero`.

    Call arguments:
        inputs: int32 `[...]`, from 0 to `input_dim - 1`; with `reverse` float
            `[..., output_dim]`.
        reverse: whether to return the scores of all tokens.

    Returns:
        `[..., output_dim]`, of the compute dtype; with `reverse` `[..., input_dim]`.

    Raises:
        ValueError: with `mask_zero`: models here take a mask, no reserved token.
    """

    embeddings: Any

    def __init__(self, input_dim, output_dim, **kwargs):
        if kwargs.get("mask_zero"):
            raise ValueError(
                "`mask_zero` must be False, since a mask is given beside the tokens. "
                f"Received: mask_zero={kwargs['mask_zero']}"
            )
        super().__init__(input_dim, output_dim, **kwargs)

    def call(self, inputs, reverse=False):
        if reverse:
            return super().call(inputs, reverse=True)
        table = ops.convert_to_tensor(self.embeddings)
        ids = ops.cast(ops.convert_to_tensor(inputs), "int32")
        return ops.cast(embed(table, ids), self.compute_dtype)

    def quantize(self, mode=None, type_check=True, config=None):
        # Keras refuses subclasses, which may compute something else.
        del type_check
        return super().quantize(mode, type_check=False, config=config)
