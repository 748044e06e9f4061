"""Export of models whose inputs share a number of tokens."""

import itertools
from typing import Any

import keras


class ExportMixin:
    """`keras.Model.export` for models that take sequences.

    The inputs' second axis is time. On JAX, Keras gives each unknown size a name of its
    own, so that a mask of unknown length would not fit its tokens: here they share one.
    On torch, Keras would fix an unknown length at 1: here that is refused.
    """

    input: Any

    def export(
        self,
        filepath,
        format="tf_saved_model",
        verbose=None,
        input_signature=None,
        **kwargs,
    ):
        """Exports the model for inference; see `keras.Model.export`.

        Raises:
            ValueError: on torch, where the number of tokens is not given.
        """
        signature = input_signature
        if signature is None:
            signature = [
                keras.tree.map_structure(
                    lambda x: keras.layers.InputSpec(
                        shape=x.shape, dtype=x.dtype, name=x.name
                    ),
                    self.input,
                )
            ]
        if keras.backend.backend() == "torch":
            for spec in keras.tree.flatten(signature):
                if tuple(spec.shape)[1:2] == (None,):
                    raise ValueError(
                        "An export on torch holds for one number of tokens. Give it in "
                        "`input_signature`, such as [keras.layers.InputSpec(shape=(1, "
                        f"128))]. Received: an input of shape {tuple(spec.shape)}"
                    )
        elif keras.backend.backend() == "jax" and format == "tf_saved_model":
            options = kwargs.setdefault("jax2tf_kwargs", {})
            if "polymorphic_shapes" not in options:
                kwargs["jax2tf_kwargs"] = {
                    **options,
                    "polymorphic_shapes": self._polymorphic_shapes(signature),
                }
        super().export(  # pyright: ignore[reportAttributeAccessIssue]
            filepath,
            format=format,
            verbose=verbose,
            input_signature=input_signature,
            **kwargs,
        )

    def _polymorphic_shapes(self, signature):
        """Text for `jax2tf`: unknown lengths are one length, t, plus what is known."""
        rest = (f"n{index}" for index in itertools.count())

        def text(spec, name=None):
            if isinstance(spec, dict):
                return {name: text(part, name) for name, part in spec.items()}
            if isinstance(spec, (list, tuple)):
                return type(spec)(text(part) for part in spec)
            sizes = []
            for axis, size in enumerate(spec.shape):
                if size is None and axis == 1:
                    longer = self.steps_beyond(name)
                    size = f"t + {longer}" if longer else "t"
                elif size is None:
                    size = "batch" if axis == 0 else next(rest)
                sizes.append(str(size))
            return f"({', '.join(sizes)})"

        return text(signature)

    def steps_beyond(self, name):
        """How many steps the input of this name is longer than the others."""
        del name
        return 0


@keras.saving.register_keras_serializable("keras_mom")
class SequenceModel(ExportMixin, keras.Model):
    """A functional `keras.Model` of sequences."""

    # The arguments of a functional model, as which Keras saves and loads it.
    def __init__(self, inputs, outputs, name=None, **kwargs):
        kwargs.update(inputs=inputs, outputs=outputs, name=name)
        super().__init__(**kwargs)


@keras.saving.register_keras_serializable("keras_mom")
class ForecastModel(SequenceModel):
    """A functional `keras.Model` that takes covariates of the steps to come too."""

    def steps_beyond(self, name):
        """How many steps the input of this name is longer than the others."""
        return self.output_shape[1] if name == "known_covariates" else 0
