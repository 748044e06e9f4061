"""A feed-forward network of several experts, of which each token uses a few."""

from typing import Any

import keras
from keras import ops

from keras_mom import config
from keras_mom.checks import check_positive
from keras_mom.initializers import Blocks, clone_initializer
from keras_mom.layers.projections import ProjectionsMixin
from keras_mom.layers.rematerialization import call_on_tensors
from keras_mom.layers.router import Router
from keras_mom.layers.routing_record import RoutingRecordMixin
from keras_mom.models.gated_mlp import GatedMLP
from keras_mom.ops.constants import select
from keras_mom.ops.routing import routing_statistics


@keras.saving.register_keras_serializable("keras_mom")
class MixtureOfExperts(ProjectionsMixin, RoutingRecordMixin, keras.layers.Layer):
    """Gated feed-forward experts, a few of which a router picks for each token.

    `sum over chosen e of w_e (activation(x W_gate^e) * (x W_up^e)) W_down^e`, plus the
    shared expert. Every expert is computed for every token, and counts with weight 0
    where it was not chosen: shapes are static, no token is dropped, nothing is read
    back to the host. The cost is that of one network of the width of all experts.

    Source: arXiv 2101.03961 (balance loss), 2401.06066 (shared expert), 2503.05447
    (with linear attention).

    Args:
        num_experts: number of experts, E.
        experts_per_token: number of experts that a token uses, k.
        intermediate_dim: width F of each expert.
        shared_expert: whether one more expert serves every token, with weight 1.
        shared_intermediate_dim: its width. Defaults to `intermediate_dim`.
        normalize_weights: whether a token's k weights are made to sum to 1. Otherwise
            they are the router's probabilities; with one expert a token only those
            let the router learn from what the expert returns.
        activation: of the gates; a name, a function or None.
        balance_loss_weight: weight of the loss that evens out the experts' shares. It
            is added to `layer.losses` at each call; 0 turns it off.
        kernel_initializer, kernel_regularizer, kernel_constraint: of all kernels. Each
            expert's kernel is drawn as that of a network of its own.
        output_initializer: of the experts' `W_down`. Defaults to `kernel_initializer`.
        implementation: of the routing, as in `keras_mom.MoMLayer`.
        lora_rank, lora_alpha: if given, the projections are built with LoRA, as after
            `enable_lora`.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: float `[B, T, D]`.
        mask: bool `[B, T]`, False at tokens that do not count. Their output is 0.
        training: whether routing statistics are kept.

    Returns:
        `[B, T, D]`, of the compute dtype.

    Attributes:
        router: `softmax(x W_r)`, float32.
        gate_projection, up_projection: `keras.layers.Dense` without bias whose kernels
            `[D, E * F]` hold those of the experts side by side.
        down_projection: the same with a kernel `[E * F, D]`; there once the layer is
            built.
        shared_expert: `GatedMLP` or None.
    """

    gate_projection: Any
    up_projection: Any
    down_projection: Any
    shared_expert: Any

    def __init__(
        self,
        num_experts,
        experts_per_token,
        intermediate_dim,
        *,
        shared_expert=False,
        shared_intermediate_dim=None,
        normalize_weights=True,
        activation="silu",
        balance_loss_weight=0.01,
        kernel_initializer="glorot_uniform",
        output_initializer=None,
        kernel_regularizer=None,
        kernel_constraint=None,
        implementation=None,
        lora_rank=None,
        lora_alpha=None,
        **kwargs,
    ):
        # The router stays float32 under mixed precision.
        kwargs["autocast"] = False
        super().__init__(**kwargs)
        check_positive("num_experts", num_experts)
        check_positive("experts_per_token", experts_per_token)
        check_positive("intermediate_dim", intermediate_dim)
        if shared_intermediate_dim is not None:
            check_positive("shared_intermediate_dim", shared_intermediate_dim)
        if experts_per_token > num_experts:
            raise ValueError(
                "`experts_per_token` must not exceed `num_experts`. Received: "
                f"experts_per_token={experts_per_token}, num_experts={num_experts}"
            )
        if not balance_loss_weight >= 0:
            raise ValueError(
                "`balance_loss_weight` must be 0 or more. "
                f"Received: balance_loss_weight={balance_loss_weight}"
            )
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.intermediate_dim = intermediate_dim
        self.shared_intermediate_dim = shared_intermediate_dim
        self.normalize_weights = bool(normalize_weights)
        self.activation = keras.activations.get(activation)
        self.balance_loss_weight = float(balance_loss_weight)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.implementation = config.check_implementation(implementation)
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.down_projection = None
        # The layer is rematerialized as a whole, or not.
        with keras.RematScope(mode=None):
            self._create_sublayers(bool(shared_expert))
        self._set_lora(lora_rank, lora_alpha)

    def _create_sublayers(self, shared_expert):
        weights = dict(
            kernel_regularizer=self.kernel_regularizer,
            kernel_constraint=self.kernel_constraint,
        )
        self.router = Router(
            self.num_experts,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            name="router",
            **weights,
        )
        units = self.num_experts * self.intermediate_dim
        self.gate_projection = self._dense("experts_gate", units, axis=-1)
        self.up_projection = self._dense("experts_up", units, axis=-1)
        self.shared_expert = None
        if shared_expert:
            width = self.shared_intermediate_dim
            self.shared_expert = GatedMLP(
                self.intermediate_dim if width is None else width,
                activation=self.activation,
                kernel_initializer=clone_initializer(self.kernel_initializer),
                output_initializer=clone_initializer(self.output_initializer),
                dtype=self.dtype_policy,
                name="shared_expert",
                **weights,
            )

    def _dense(self, name, units, axis, initializer=None):
        initializer = self.kernel_initializer if initializer is None else initializer
        return keras.layers.Dense(
            units,
            use_bias=False,
            kernel_initializer=Blocks(
                clone_initializer(initializer), self.num_experts, axis
            ),
            kernel_regularizer=self.kernel_regularizer,
            kernel_constraint=self.kernel_constraint,
            dtype=self.dtype_policy,
            name=name,
        )

    def _projections(self):
        layers = [self.gate_projection, self.up_projection, self.down_projection]
        if self.shared_expert is not None:
            layers += self.shared_expert._projections()
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
        self.input_spec = keras.layers.InputSpec(ndim=3, axes={-1: width})
        with keras.RematScope(mode=None):
            self.down_projection = self._dense(
                "experts_down", width, 0, self.output_initializer
            )
        self._prepare_sublayer(self.down_projection)
        self.router.build(inputs_shape)
        self.gate_projection.build(inputs_shape)
        self.up_projection.build(inputs_shape)
        inner = self.num_experts * self.intermediate_dim
        self.down_projection.build((*inputs_shape[:-1], inner))
        if self.shared_expert is not None:
            self.shared_expert._loaded_projections = self._loaded_projections
            self.shared_expert.build(inputs_shape)
        self._create_record(self.num_experts)
        self.built = True

    def _set_lora(self, rank, alpha):
        super()._set_lora(rank, alpha)
        if self.shared_expert is not None:
            self.shared_expert._set_lora(rank, alpha)

    def call(self, inputs, mask=None, training=None):
        return self._record(training, *self._compute(inputs, mask))

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # Only what has no side effects may run twice: losses and variables are
        # written behind it.
        wrap = super().rematerialized_call

        def call(inputs, mask=None, training=None):
            results = call_on_tensors(
                lambda function: wrap(function, *args, **kwargs),
                self._compute,
                (inputs, mask),
            )
            return self._record(training, *results)

        return call

    def _compute(self, inputs, mask):
        """Returns output and routing statistics."""
        inputs = ops.cast(ops.convert_to_tensor(inputs), self.compute_dtype)
        if mask is not None:
            mask = ops.cast(mask, "bool")
            # Not a product with the output: a masked token may hold anything.
            inputs = select(mask[..., None], inputs, 0)
        probabilities, weights, indices = self._route(inputs)
        statistics = routing_statistics(
            probabilities, indices, mask, implementation=self.implementation
        )
        weights = _of_experts(weights, indices, self.num_experts)
        gate = self.activation(self.gate_projection(inputs))
        hidden = ops.multiply(gate, self.up_projection(inputs))
        batch, length, _ = ops.shape(inputs)
        experts = (batch, length, self.num_experts, self.intermediate_dim)
        hidden = ops.reshape(hidden, experts)
        hidden = hidden * ops.cast(weights, hidden.dtype)[..., None]
        hidden = ops.reshape(hidden, (batch, length, experts[2] * experts[3]))
        output = self.down_projection(hidden)
        if self.shared_expert is not None:
            output = output + self.shared_expert(inputs)
        return output, statistics

    def _route(self, inputs):
        probabilities, weights, indices = self.router(
            inputs, top_k=self.experts_per_token, implementation=self.implementation
        )
        if not self.normalize_weights:
            weights = ops.take_along_axis(probabilities, indices, axis=-1)
        return probabilities, weights, indices

    def _clear_losses(self):
        # `torch.compile` would guard the tensors in the old list, and so compile
        # again at every step.
        self._losses = []
        super()._clear_losses()

    def _record(self, training, output, statistics):
        """Writes what a call leaves behind, and returns its output."""
        self._record_routing(training, statistics)
        return output

    def route(self, inputs):
        """How the layer routes tokens.

        Args:
            inputs: `[B, T, D]`.

        Returns:
            Weights, float32 `[B, T, k]`, and experts' indices, int32 `[B, T, k]`, most
            probable first; ties go to the lowest index.
        """
        inputs = ops.cast(ops.convert_to_tensor(inputs), self.compute_dtype)
        if len(inputs.shape) != 3:
            raise ValueError(
                f"`inputs` must have shape [B, T, D]. Received: {tuple(inputs.shape)}"
            )
        if not self.built:
            self.build(inputs.shape)
        _, weights, indices = self._route(inputs)
        return weights, indices

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def compute_output_spec(self, inputs, mask=None, training=None):
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            "intermediate_dim": self.intermediate_dim,
            "shared_expert": self.shared_expert is not None,
            "shared_intermediate_dim": self.shared_intermediate_dim,
            "normalize_weights": self.normalize_weights,
            "activation": keras.activations.serialize(self.activation),
            "balance_loss_weight": self.balance_loss_weight,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "implementation": self.implementation,
            **self._projections_config(),
        }


def _of_experts(weights, indices, num_experts):
    """Weights of all experts, 0 where not chosen: `[B, T, k]` to `[B, T, E]`."""
    index = ops.arange(num_experts, dtype="int32")
    chosen = indices[..., None] == index
    return ops.sum(select(chosen, weights[..., None], 0.0), axis=-2)
