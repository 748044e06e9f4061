"""Training and scoring of a language model on token ids."""

import contextlib
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mom.checks import check_names
from keras_mom.models.prompts import are_texts
from keras_mom.ops.linear_cross_entropy import (
    counted_weights,
    token_cross_entropy,
    token_cross_entropy_of_logits,
    weighted_mean,
)
from keras_mom.ops.padding import pad


@keras.saving.register_keras_serializable("keras_mom")
class Perplexity(keras.metrics.Mean):
    """`exp` of the mean cross entropy of the tokens that count.

    It takes cross entropies in nats, and weights, not labels and predictions.
    """

    def __init__(self, name="perplexity", dtype=None):
        super().__init__(name=name, dtype=dtype)

    def result(self):
        return ops.exp(super().result())


class TrainingMixin:
    """`compile`, `fit` and `evaluate` on token ids, `score` and `perplexity`.

    For a functional `keras.Model` with a `backbone` that has a `token_embedding`, a
    `keras.layers.ReversibleEmbedding`.

    What `fit` and `evaluate` take: `x` is int32 token ids `[B, T]`, or a dict of
    `token_ids`, `padding_mask` (by default all ones) and, for a model of packed
    documents, `segment_ids`; in arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset`,
    or anything else that Keras takes.

    - Without `y` each token predicts the next one. Not where either of the two is
      padding, nor across documents. `sample_weight`, `[B]` or `[B, T]`, weighs tokens
      as what is predicted: `sample_weight[:, t]` belongs to `token_ids[:, t]`.
    - With `y`, int32 `[B, T]`, `y[:, t]` is what `token_ids[:, t]` predicts, and
      `sample_weight`, `[B]` or `[B, T]`, weighs these predictions. A negative label,
      and a token that is padding, does not count.
    """

    backbone: Any
    input: Any
    compiled: bool
    losses: list
    optimizer: Any
    built: bool
    trainable_variables: list

    # Neither layers nor metrics here are found by Keras' tracking.
    _language: Any = None

    def compile(
        self,
        optimizer="auto",
        loss="auto",
        *,
        metrics=None,
        weighted_metrics="auto",
        label_smoothing=0.0,
        z_loss=0.0,
        chunk_size=None,
        **kwargs,
    ):
        """Configures training.

        Args:
            optimizer: `"auto"` is AdamW with a learning rate of 3e-4, a weight decay
                of 0.01 and gradients clipped to a global norm of 1.
            loss: `"auto"` is the mean cross entropy of the tokens that count, computed
                a chunk at a time by `keras_mom.ops.linear_cross_entropy`. Another
                loss is called by Keras with targets, logits and weights `[B, T]`.
                The balance losses of the layers are added to either.
            metrics, weighted_metrics: as in `keras.Model.compile`. They are called
                with targets and logits, so that all logits are computed.
                `weighted_metrics="auto"` is perplexity and accuracy with the automatic
                loss, which cost nothing more, and accuracy with another.
            label_smoothing, z_loss, chunk_size: of the automatic loss; see
                `keras_mom.ops.linear_cross_entropy`.
            **kwargs: other arguments of `keras.Model.compile`.

        Raises:
            ValueError: if an argument of the automatic loss is given with another.
        """
        automatic = isinstance(loss, str) and loss == "auto"
        if not automatic and (label_smoothing or z_loss or chunk_size):
            raise ValueError(
                "`label_smoothing`, `z_loss` and `chunk_size` are arguments of "
                f'`loss="auto"`. Received: loss={loss!r}'
            )
        own = isinstance(weighted_metrics, str) and weighted_metrics == "auto"
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = keras.optimizers.AdamW(
                3e-4, weight_decay=0.01, global_clipnorm=1.0
            )
        config = {}
        if automatic:
            config = {
                "loss": "auto",
                "label_smoothing": label_smoothing,
                "z_loss": z_loss,
                "chunk_size": chunk_size,
            }
        elif own:
            weighted_metrics = [
                keras.metrics.SparseCategoricalAccuracy(name="accuracy")
            ]
        if own and automatic:
            config["weighted_metrics"] = "auto"
            weighted_metrics = None
        super().compile(  # pyright: ignore[reportAttributeAccessIssue]
            optimizer=optimizer,
            loss=None if automatic else loss,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )
        tracked = []
        if own and automatic:
            tracked = [Perplexity(), keras.metrics.Mean(name="accuracy")]
        self._language = SimpleNamespace(
            automatic=automatic,
            smoothing=dict(label_smoothing=label_smoothing, z_loss=z_loss),
            chunk_size=chunk_size,
            metrics=tracked,
            # Whether a call returns hidden states in place of logits, and when.
            needs_logits=not automatic or bool(metrics or weighted_metrics),
            in_step=False,
            config=config,
            # What "auto" is, depends on the backend.
            jit_compile=kwargs.get("jit_compile", "auto"),
        )

    def get_compile_config(self):
        config = super().get_compile_config()  # pyright: ignore
        if not config:
            return config
        built = self.optimizer is not None and self.optimizer.built
        config = {**config, **self._language.config, "optimizer_is_built": built}
        config["jit_compile"] = self._language.jit_compile
        return _for_every_backend(config)

    def compile_from_config(self, config):
        config = keras.saving.deserialize_keras_object(_for_every_backend(config))
        # The file holds no more of the optimizer of a model that was never trained.
        was_built = config.pop("optimizer_is_built", True)
        self.compile(**config)
        if self.optimizer is not None and self.built and was_built:
            self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self):
        metrics = super().metrics  # pyright: ignore[reportAttributeAccessIssue]
        return metrics if self._language is None else metrics + self._language.metrics

    # Without targets Keras would drop the weights.

    def fit(self, x=None, y=None, *args, **kwargs):
        """Trains; see `keras.Model.fit`, and above for `x`, `y` and `sample_weight`."""
        # An error within a step would leave the model without variables on JAX.
        check_names(x if isinstance(x, dict) else (), self.input)
        x, y, weights = _with_targets(x, y, kwargs.pop("sample_weight", None))
        given = kwargs.get("validation_data")
        if isinstance(given, tuple) and len(given) == 3:
            kwargs["validation_data"] = _with_targets(*given)
        return super().fit(  # pyright: ignore[reportAttributeAccessIssue]
            x, y, *args, sample_weight=weights, **kwargs
        )

    def evaluate(self, x=None, y=None, *args, **kwargs):
        """Loss and metrics; see `keras.Model.evaluate`, and `fit`."""
        check_names(x if isinstance(x, dict) else (), self.input)
        x, y, weights = _with_targets(x, y, kwargs.pop("sample_weight", None))
        return super().evaluate(  # pyright: ignore[reportAttributeAccessIssue]
            x, y, *args, sample_weight=weights, **kwargs
        )

    # A step of training or evaluation computes no logits: the loss takes hidden states.

    def __call__(self, inputs, *args, **kwargs):
        inputs = _as_inputs(inputs)
        check_names(inputs, self.input)
        return super().__call__(inputs, *args, **kwargs)  # pyright: ignore

    def call(self, inputs, training=None, mask=None, **kwargs):
        inputs = _as_inputs(inputs)  # JAX' trainer calls this without `__call__`.
        check_names(inputs, self.input)
        if self._language is not None and self._language.in_step:
            return self.backbone(inputs, training=training)
        return super().call(  # pyright: ignore[reportAttributeAccessIssue]
            inputs, training=training, mask=mask, **kwargs
        )

    def train_step(self, *args, **kwargs):
        with self._step():
            return super().train_step(*args, **kwargs)  # pyright: ignore

    def test_step(self, *args, **kwargs):
        with self._step():
            return super().test_step(*args, **kwargs)  # pyright: ignore

    @contextlib.contextmanager
    def _step(self):
        settings = self._language
        settings.in_step = not settings.needs_logits
        try:
            yield
        finally:
            settings.in_step = False

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        y, sample_weight = _targets(x, y, sample_weight)
        settings = self._language
        if not settings.automatic:
            return super().compute_loss(  # pyright: ignore
                x, y, y_pred, sample_weight, training
            )
        if settings.in_step:
            losses, correct = self._token_losses(
                y_pred, y, settings.chunk_size, **settings.smoothing
            )
        else:
            losses, correct = token_cross_entropy_of_logits(
                y_pred, y, **settings.smoothing
            )
        counted = counted_weights(y, sample_weight)
        for metric, values in zip(settings.metrics, (losses, correct)):
            # Not 0 times what a token holds that does not count.
            values = ops.where(counted > 0, values, ops.zeros_like(values))
            metric.update_state(ops.stop_gradient(values), counted)
        total = self._aggregate_additional_loss(  # pyright: ignore
            weighted_mean(losses, y, sample_weight)
        )
        for loss in self.losses:
            total = total + self._aggregate_additional_loss(loss)  # pyright: ignore
        return total

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        y, sample_weight = _targets(x, y, sample_weight)
        return super().compute_metrics(x, y, y_pred, sample_weight)  # pyright: ignore

    def _token_losses(self, hidden, labels, chunk_size=None, **options):
        """Losses and hits, as `token_cross_entropy` returns them, of hidden states."""
        embedding = self.backbone.token_embedding
        if embedding.quantization_mode is not None or embedding.logit_soft_cap:
            logits = embedding(hidden, reverse=True)
            return token_cross_entropy_of_logits(logits, labels, **options)
        if embedding.tie_weights:
            kernel = ops.transpose(ops.convert_to_tensor(embedding.embeddings))
        else:
            kernel = ops.convert_to_tensor(embedding.reverse_embeddings)
        return token_cross_entropy(
            hidden, kernel, labels, chunk_size=chunk_size, **options
        )

    # Scoring.

    def score(self, token_ids, padding_mask=None, segment_ids=None, batch_size=32):
        """Log-probability of each token, given those before it.

        Args:
            token_ids: int `[B, T]`.
            padding_mask: `[B, T]`, 0 at tokens that do not count, or None.
            segment_ids: `[B, T]`, for a model of packed documents.
            batch_size: number of rows that are scored at once.

        Returns:
            A NumPy array, float32 `[B, T]`, in nats. It holds 0 where nothing is
            predicted: at padding, and at the first token of a row or a document.
        """
        inputs = {"token_ids": np.asarray(token_ids, "int32")}
        if inputs["token_ids"].ndim != 2:
            raise ValueError(
                "`token_ids` must have shape [B, T]. "
                f"Received: shape {inputs['token_ids'].shape}"
            )
        if not inputs["token_ids"].size:
            return np.zeros(inputs["token_ids"].shape, "float32")
        mask = np.ones_like(inputs["token_ids"])
        if padding_mask is not None:
            mask = np.asarray(padding_mask).astype("int32")
        for name, value in (("padding_mask", mask), ("segment_ids", segment_ids)):
            if value is None:
                continue
            inputs[name] = np.asarray(value, "int32")
            shape = inputs["token_ids"].shape
            if inputs[name].shape != shape:
                raise ValueError(
                    f"`{name}` must have the shape of `token_ids`, {shape}. "
                    f"Received: shape {inputs[name].shape}"
                )
        check_names(inputs, self.input)
        return _Scorer.of(self).predict(inputs, batch_size=batch_size, verbose=0)

    def perplexity(self, token_ids, padding_mask=None, segment_ids=None, batch_size=32):
        """`exp` of the mean of `-score` over the tokens that are predicted.

        Arguments are those of `score`. Returns a number; NaN if nothing is predicted.
        """
        scores = self.score(token_ids, padding_mask, segment_ids, batch_size)
        inputs = {"token_ids": np.asarray(token_ids, "int32")}
        for name, value in (
            ("padding_mask", padding_mask),
            ("segment_ids", segment_ids),
        ):
            if value is not None:
                inputs[name] = np.asarray(value).astype("int32")
        _, weights = _targets(inputs, None, None)
        count = float(np.sum(ops.convert_to_numpy(weights)))
        if not count:
            return float("nan")
        return float(np.exp(-np.sum(scores, dtype="float64") / count))


class _Scorer(keras.Model):
    """What `score` computes, as a model, so that Keras compiles and batches it."""

    def __init__(self, lm):
        super().__init__(name="scorer")
        self.lm = lm
        # It has no weights of its own; Keras would run it once, op by op.
        self.built = True

    @classmethod
    def of(cls, lm):
        """The scorer of a model, which is compiled once for the same variables."""
        kept = getattr(lm, "_scorer", None)
        variables = lm.backbone.variables  # others after LoRA or quantization
        if kept is None or [*map(id, kept.variables)] != [*map(id, variables)]:
            kept = SimpleNamespace(model=cls(lm), variables=variables)
            lm._scorer = kept
        return kept.model

    def call(self, inputs):
        hidden = self.lm.backbone(inputs, training=False)
        labels, weights = _targets(inputs, None, None)
        losses, _ = self.lm._token_losses(hidden, labels)
        scores = ops.where(weights > 0, -losses, ops.zeros_like(losses))
        return pad(scores[:, :-1], 1, before=1)


def _for_every_backend(config):
    """A config that names Keras' optimizers by their public names.

    On torch, Keras (3.15) writes the module of its own subclass of an optimizer, which
    the other backends cannot, or must not, import.
    """
    if not isinstance(config, dict):
        return config
    config = {name: _for_every_backend(value) for name, value in config.items()}
    if str(config.get("module")).startswith("keras.src.backend.torch.optimizers"):
        config |= {"module": "keras.optimizers", "registered_name": None}
    return config


def _as_inputs(x):
    """A model's dict of inputs, from token ids or from a dict without a mask."""
    if not isinstance(x, dict):
        x = {"token_ids": np.asarray(x) if isinstance(x, (list, tuple)) else x}
    if "padding_mask" in x:
        return x
    # Keras takes no mixture of arrays and tensors.
    ones = np.ones_like if isinstance(x["token_ids"], np.ndarray) else ops.ones_like
    return {**x, "padding_mask": ones(x["token_ids"], dtype="int32")}


def _with_targets(x, y, sample_weight):
    """`x`, targets and weights in arrays, where there are weights without targets."""
    is_array = isinstance(x, dict | list | tuple) or hasattr(x, "shape")
    if y is not None or sample_weight is None or not is_array or are_texts(x):
        return x, y, sample_weight
    x = {name: _to_numpy(value) for name, value in _as_inputs(x).items()}
    sample_weight = _to_numpy(sample_weight).astype("float32")
    shape = x["token_ids"].shape
    if sample_weight.shape not in (shape, shape[:1]):
        raise ValueError(
            f"`sample_weight` must have shape [B] or [B, T], here {shape}. "
            f"Received: shape {sample_weight.shape}"
        )
    following = {
        name: np.pad(value[:, 1:], ((0, 0), (0, 1))) for name, value in x.items()
    }
    predicted = (x["padding_mask"] != 0) & (following["padding_mask"] != 0)
    if "segment_ids" in x:
        predicted &= x["segment_ids"] == following["segment_ids"]
    y = np.where(predicted, following["token_ids"], -1).astype("int32")
    if sample_weight.ndim == 2:
        return x, y, np.pad(sample_weight[:, 1:], ((0, 0), (0, 1)))
    return x, y, np.repeat(sample_weight[:, None], shape[1], axis=1)


def _to_numpy(x):
    return x if isinstance(x, np.ndarray) else ops.convert_to_numpy(x)


def _targets(x, y, sample_weight):
    """Labels int32 and weights float32, `[B, T]`; see `TrainingMixin`."""
    x = _as_inputs(x)
    weights = ops.cast(x["padding_mask"], "float32")
    if sample_weight is not None:
        sample_weight = ops.cast(sample_weight, "float32")
        if len(sample_weight.shape) not in (1, 2):
            raise ValueError(
                "`sample_weight` must have shape [B] or [B, T]. "
                f"Received: shape {tuple(sample_weight.shape)}"
            )
        if len(sample_weight.shape) == 1:
            sample_weight = sample_weight[:, None]
    if y is not None:
        if sample_weight is not None:
            weights = weights * sample_weight
        return ops.cast(y, "int32"), weights
    labels = _following(ops.cast(x["token_ids"], "int32"))
    weights = weights * _following(weights)
    if "segment_ids" in x:
        segment_ids = ops.cast(x["segment_ids"], "int32")
        same = segment_ids == _following(segment_ids)
        weights = weights * ops.cast(same, "float32")
    if sample_weight is not None:
        if sample_weight.shape[1] != 1:
            sample_weight = _following(sample_weight)
        weights = weights * sample_weight
    return labels, weights


def _following(x):
    """What stands one place later in each row; 0 at the end."""
    return pad(x[:, 1:], 1, after=1)
