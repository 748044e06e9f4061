"""A bidirectional encoder of sequences."""

import keras

from keras_mom.checks import check_positive
from keras_mom.models.exporting import SequenceModel
from keras_mom.models.masking import MaskedOutput
from keras_mom.models.sequence_blocks import Blocks, sequence_source


def mom_encoder(
    num_layers,
    hidden_dim,
    num_heads,
    key_dim,
    value_dim=None,
    *,
    vocabulary_size=None,
    feature_dim=None,
    sequence_length=None,
    num_classes=None,
    activation=None,
    intermediate_dim=None,
    dropout=0.0,
    padding_id=None,
    padding_mask=False,
    remat=False,
    seed=None,
    dtype=None,
    name="mom_encoder",
    **mom_arguments,
):
    """Builds a model that reads sequences in both directions.

    Each block is a pre-norm `keras.layers.Bidirectional(keras_mom.MoMLayer(...))`,
    whose two outputs are added, and a pre-norm `keras_mom.models.GatedMLP`, with a
    residual connection around each. A last RMS norm follows.

    Args:
        num_layers: number of blocks.
        hidden_dim: width, D.
        num_heads, key_dim, value_dim: of `keras_mom.MoMLayer`.
        vocabulary_size: number of token ids, if token ids come in.
        feature_dim: width of the features F, if features come in.
        sequence_length: T, or None for any length.
        num_classes: if given, a last Dense layer returns so many values a token.
        activation: of that layer. None gives logits.
        intermediate_dim: width of the feed-forward networks; `2 * hidden_dim` if None.
        dropout: rate of the dropout of what each layer adds to the residual stream.
        padding_id: token id of padding. Such tokens do not count.
        padding_mask: whether the model takes a mask too.
        remat: whether layers are computed anew in the backward pass, so that only
            their inputs are kept. As with `keras.RematScope`, no file keeps this: a
            model for further training is built anew and loads the weights.
        seed: seed of the dropout.
        dtype: dtype policy of all layers. The last Dense layer is float32 or wider.
        name: name of the model.
        **mom_arguments: further arguments of `keras_mom.MoMLayer`, such as
            `num_memories` or `update_rule`. `norm_epsilon` and those of kernels hold
            for the norms and the feed-forward networks too.

    Returns:
        A functional `keras.Model`, not compiled. It takes token ids, int32 `[B, T]`, or
        features, float `[B, T, F]`; with `padding_mask` a dict of `token_ids` or
        `features` and of `padding_mask`, int32 or bool `[B, T]`, 0 at tokens that do
        not count, anywhere in a row. It returns `[B, T, D]`, or
        `[B, T, num_classes]`. At tokens that do not count it returns zeros, and the
        output carries a mask, so that losses leave them out.

    Raises:
        ValueError: if an argument does not fit; the message names it.

    Example:

    >>> tagger = keras_mom.models.mom_encoder(
    ...     2, 64, num_heads=2, key_dim=32, vocabulary_size=256, num_classes=5
    ... )
    >>> tagger(np.ones((3, 20), "int32")).shape
    (3, 20, 5)
    """
    blocks = Blocks(
        num_layers,
        hidden_dim,
        num_heads,
        key_dim,
        value_dim,
        bidirectional=True,
        intermediate_dim=intermediate_dim,
        dropout=dropout,
        remat=remat,
        seed=seed,
        dtype=dtype,
        mom_arguments=mom_arguments,
    )
    if num_classes is not None:
        check_positive("num_classes", num_classes)
    elif activation is not None:
        raise ValueError(
            "`activation` belongs to the last layer, which needs `num_classes`. "
            f"Received: activation={activation!r}, num_classes=None"
        )
    source = sequence_source(
        blocks, vocabulary_size, feature_dim, sequence_length, padding_id, padding_mask
    )
    outputs = blocks(source.hidden, source.mask)
    if num_classes is not None:
        outputs = keras.layers.Dense(
            num_classes, activation, dtype=blocks.output_dtype, name="classes"
        )(outputs)
    if source.mask is not None:
        policy = blocks.dtype if num_classes is None else blocks.output_dtype
        masked = MaskedOutput(dtype=policy, name="masked")
        outputs = masked((outputs, source.mask))
    return SequenceModel(source.inputs, outputs, name=name)
