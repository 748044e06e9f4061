"""The gated feed-forward network of a block."""

from typing import Any

import keras
from keras import ops

from keras_mom.checks import check_positive
from keras_mom.initializers import clone_initializer
from keras_mom.layers.projections import ProjectionsMixin
from keras_mom.ops.projection import project


@keras.saving.register_keras_serializable("keras_mom")
class GatedMLP(ProjectionsMixin, keras.layers.Layer):
    """`(activation(x W_gate) * (x W_up)) W_down`: SwiGLU with the default activation.

    Source: arXiv 2002.05202.

    Args:
        intermediate_dim: width between the projections.
        activation: of the gate; a name, a function or None.
        kernel_initializer, kernel_regularizer, kernel_constraint: of the three kernels.
        output_initializer: of `W_down`. Defaults to `kernel_initializer`.
        lora_rank, lora_alpha: if given, the projections are built with LoRA, as after
            `enable_lora`.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: float `[..., D]`.

    Returns:
        `[..., D]`, of the compute dtype.

    Attributes:
        gate_projection, up_projection, down_projection: `keras.layers.Dense` without
            bias; the last one is there once the layer is built.
    """

    gate_projection: Any
    up_projection: Any
    down_projection: Any

    def __init__(
        self,
        intermediate_dim,
        activation="silu",
        *,
        kernel_initializer="glorot_uniform",
        output_initializer=None,
        kernel_regularizer=None,
        kernel_constraint=None,
        lora_rank=None,
        lora_alpha=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_positive("intermediate_dim", intermediate_dim)
        self.intermediate_dim = intermediate_dim
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.down_projection = None
        # The layer is rematerialized as a whole, or not.
        with keras.RematScope(mode=None):
            self.gate_projection = self._dense("gate", intermediate_dim)
            self.up_projection = self._dense("up", intermediate_dim)
        self._set_lora(lora_rank, lora_alpha)

    def _dense(self, name, units, initializer=None):
        initializer = self.kernel_initializer if initializer is None else initializer
        return keras.layers.Dense(
            units,
            use_bias=False,
            kernel_initializer=clone_initializer(initializer),
            kernel_regularizer=self.kernel_regularizer,
            kernel_constraint=self.kernel_constraint,
            dtype=self.dtype_policy,
            name=name,
        )

    def _projections(self):
        layers = self.gate_projection, self.up_projection, self.down_projection
        return [layer for layer in layers if layer is not None]

    def _all_projections(self):
        return self._projections()

    def build(self, inputs_shape):
        width = inputs_shape[-1]
        if width is None:
            raise ValueError(
                "The last axis of `inputs` must be known. "
                f"Received: shape {tuple(inputs_shape)}"
            )
        with keras.RematScope(mode=None):
            self.down_projection = self._dense("down", width, self.output_initializer)
        self._prepare_sublayer(self.down_projection)
        self.gate_projection.build(inputs_shape)
        self.up_projection.build(inputs_shape)
        self.down_projection.build((*inputs_shape[:-1], self.intermediate_dim))
        self.built = True

    def call(self, inputs):
        gate = self.activation(project(self.gate_projection, inputs))
        product = ops.multiply(gate, project(self.up_projection, inputs))
        return project(self.down_projection, product)

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            **self._projections_config(),
        }
