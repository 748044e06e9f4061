"""A classifier of sequences."""

import keras

from keras_mom.checks import check_positive
from keras_mom.models.exporting import SequenceModel
from keras_mom.models.masking import MaskedPooling, check_pooling
from keras_mom.models.sequence_blocks import Blocks, sequence_source


def mom_classifier(
    num_classes,
    num_layers,
    hidden_dim,
    num_heads,
    key_dim,
    value_dim=None,
    *,
    vocabulary_size=None,
    feature_dim=None,
    sequence_length=None,
    bidirectional=True,
    pooling=None,
    activation=None,
    intermediate_dim=None,
    dropout=0.0,
    padding_id=None,
    padding_mask=False,
    remat=False,
    seed=None,
    dtype=None,
    name="mom_classifier",
    **mom_arguments,
):
    """Builds a model that gives each sequence a class.

    The blocks are those of `keras_mom.models.mom_encoder`, in both directions or, with
    `bidirectional=False`, causal ones. The valid tokens are pooled, and a Dense layer
    follows.

    Args:
        num_classes: number of classes.
        num_layers: number of blocks.
        hidden_dim: width, D.
        num_heads, key_dim, value_dim: of `keras_mom.MoMLayer`.
        vocabulary_size: number of token ids, if token ids come in.
        feature_dim: width of the features F, if features come in.
        sequence_length: T, or None for any length.
        bidirectional: whether each block reads the sequence in both directions.
        pooling: `"mean"` or `"max"` over the valid tokens, or the `"last"` of them.
            Defaults to the mean of a bidirectional model, and to the last of a causal
            one.
        activation: of the last layer. None gives logits.
        intermediate_dim, dropout, padding_id, padding_mask, remat, seed, dtype, name,
        **mom_arguments: as in `keras_mom.models.mom_encoder`.

    Returns:
        A functional `keras.Model`, not compiled. It takes token ids, int32 `[B, T]`, or
        features, float `[B, T, F]`; with `padding_mask` a dict of `token_ids` or
        `features` and of `padding_mask`, int32 or bool `[B, T]`, 0 at tokens that do
        not count, anywhere in a row. It returns `[B, num_classes]`, which those tokens
        do not change.

    Raises:
        ValueError: if an argument does not fit; the message names it.

    Example:

    >>> model = keras_mom.models.mom_classifier(
    ...     10, num_layers=2, hidden_dim=64, num_heads=2, key_dim=32, feature_dim=8
    ... )
    >>> model(np.ones((3, 20, 8))).shape
    (3, 10)
    """
    check_positive("num_classes", num_classes)
    if pooling is None:
        pooling = "mean" if bidirectional else "last"
    check_pooling("pooling", pooling)
    blocks = Blocks(
        num_layers,
        hidden_dim,
        num_heads,
        key_dim,
        value_dim,
        bidirectional=bidirectional,
        intermediate_dim=intermediate_dim,
        dropout=dropout,
        remat=remat,
        seed=seed,
        dtype=dtype,
        mom_arguments=mom_arguments,
    )
    source = sequence_source(
        blocks, vocabulary_size, feature_dim, sequence_length, padding_id, padding_mask
    )
    hidden = blocks(source.hidden, source.mask)
    pool = MaskedPooling(pooling, dtype=blocks.dtype, name="pooling")
    classes = keras.layers.Dense(
        num_classes, activation, dtype=blocks.output_dtype, name="classes"
    )
    outputs = classes(pool(hidden, mask=source.mask))
    return SequenceModel(source.inputs, outputs, name=name)
