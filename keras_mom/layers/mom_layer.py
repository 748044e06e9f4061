"""The Mixture-of-Memories layer."""

from typing import Any

import keras
from keras import ops

from keras_mom import backend, config, rules
from keras_mom.checks import check_positive
from keras_mom.initializers import clone_initializer
from keras_mom.layers.checks import check_call, check_state
from keras_mom.layers.mixing import Sizes, Tokens, mix_sequence
from keras_mom.layers.projections import ProjectionsMixin
from keras_mom.layers.rematerialization import call_on_tensors
from keras_mom.layers.router import Router
from keras_mom.layers.routing_record import RoutingRecordMixin
from keras_mom.layers.state import StateMixin
from keras_mom.layers.token_mixing import mix_token
from keras_mom.ops.constants import select
from keras_mom.ops.memory_mixing import OutputNorm
from keras_mom.ops.projection import project
from keras_mom.ops.routing import routing_statistics
from keras_mom.rules.base import per_memory_dense


@keras.saving.register_keras_serializable("keras_mom")
class MoMLayer(StateMixin, ProjectionsMixin, RoutingRecordMixin, keras.layers.Layer):
    """Mixture-of-Memories: a causal sequence layer with several memory states.

    A router sends each token to its `top_k` of `num_memories` memories. Each memory
    is a matrix a head that its own tokens write in time order by the update rule; a
    shared memory sees every token. What the token's memories answer to its query is
    mixed with the router's weights, normalized, gated and projected. Training time
    and memory grow linearly with T; a step of generation takes constant memory.

    Source: arXiv 2502.13685.

    Args:
        num_heads: number of heads, H.
        key_dim: size of each head's query and key, K.
        value_dim: size of each head's value, V. Defaults to `key_dim`.
        num_memories: number of routed memories, M.
        top_k: number of routed memories a token, k.
        shared_memory: whether one more memory receives every token, with weight 1.
        update_rule: name of a rule (see `keras_mom.rules.names()`), a
            `keras_mom.rules.MemoryUpdateRule`, or a rule's config.
        per_memory_projections: whether keys, values and the rule's gates are
            projected for each memory apart, or once for all routed memories. The
            shared memory has its own either way.
        conv_width: width of the causal convolution over each memory's tokens. None
            turns it off.
        use_output_gate: whether the output is gated by `silu(x W_g)`.
        balance_loss_weight: weight of the loss that evens out the memories' shares.
            It is added to `layer.losses` at each call; 0 turns it off.
        norm_epsilon: epsilon of the RMS norm of each head's output.
        implementation: None for the fastest implementation that works, or one of
            `keras_mom.config.IMPLEMENTATIONS`, which is used or raises.
        return_sequences: whether to return the output of every token, or that of each
            row's last valid token.
        return_state: whether to return the state too.
        go_backwards: whether to process the sequence from its end. Outputs are then
            returned in the order of processing.
        stateful: whether the state behind a batch is the next batch's first. Needs a
            fixed batch size; see `reset_state`.
        kernel_initializer, kernel_regularizer, kernel_constraint: of the kernels of
            all projections, the router's and the update rule's among them.
        output_initializer: of the output projection's kernel. Defaults to
            `kernel_initializer`.
        lora_rank, lora_alpha: if given, the projections are built with LoRA, as after
            `enable_lora`.
        **kwargs: arguments of `keras.layers.Layer`, such as `dtype` and `name`.

    Call arguments:
        inputs: float `[B, T, D]`. T may differ from call to call.
        mask: bool `[B, T]`, False at tokens that do not count, anywhere in the
            sequence. They touch no memory, and their output is 0.
        initial_state: the state to begin with, as `return_state` gives it. It belongs
            to the first document of each row, and is never changed.
        segment_ids: integer `[B, T]`: a new document begins wherever the id changes,
            and sees nothing of those before it.
        training: whether routing statistics are kept.

    Returns:
        `[B, T, D]`, or `[B, D]` without `return_sequences`, of the compute dtype; with
        `return_state`, a tuple of it and the state. The state is a tuple of float32
        tensors: memories `[B, M (+ 1), H, K, V]` (the rule's `state_shape` in place
        of K and V), the shared memory last, and convolution windows
        `[B, M (+ 1), conv_width - 1, H * (2 K + V)]` (left out without a convolution).
        It describes the last document of each row.

    Raises:
        ValueError: if an argument does not fit; the message names it.
        NotImplementedError: if a named implementation cannot serve the call.

    Example:

    >>> layer = keras_mom.MoMLayer(num_heads=4, key_dim=64)
    >>> y = layer(keras.random.normal((2, 100, 256)))
    >>> y.shape
    (2, 100, 256)
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        *,
        num_memories=4,
        top_k=2,
        shared_memory=True,
        update_rule="gated_delta_net",
        per_memory_projections=True,
        conv_width=4,
        use_output_gate=True,
        balance_loss_weight=0.01,
        norm_epsilon=1e-6,
        implementation=None,
        return_sequences=True,
        return_state=False,
        go_backwards=False,
        stateful=False,
        kernel_initializer="glorot_uniform",
        kernel_regularizer=None,
        kernel_constraint=None,
        output_initializer=None,
        lora_rank=None,
        lora_alpha=None,
        **kwargs,
    ):
        # The state, the router and the gates stay float32 under mixed precision.
        kwargs["autocast"] = False
        super().__init__(**kwargs)
        value_dim = key_dim if value_dim is None else value_dim
        sizes = dict(num_heads=num_heads, key_dim=key_dim, value_dim=value_dim)
        sizes |= dict(num_memories=num_memories, top_k=top_k)
        if conv_width is not None:
            sizes["conv_width"] = conv_width
        for name, size in sizes.items():
            check_positive(name, size)
        if top_k > num_memories:
            raise ValueError(
                "`top_k` must not exceed `num_memories`. "
                f"Received: top_k={top_k}, num_memories={num_memories}"
            )
        if not balance_loss_weight >= 0:
            raise ValueError(
                "`balance_loss_weight` must be 0 or more. "
                f"Received: balance_loss_weight={balance_loss_weight}"
            )
        if not norm_epsilon > 0:
            raise ValueError(
                "`norm_epsilon` must be positive. "
                f"Received: norm_epsilon={norm_epsilon}"
            )
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.num_memories = num_memories
        self.top_k = top_k
        self.shared_memory = bool(shared_memory)
        self.per_memory_projections = bool(per_memory_projections)
        self.conv_width = conv_width
        self.use_output_gate = bool(use_output_gate)
        self.balance_loss_weight = float(balance_loss_weight)
        self.norm_epsilon = norm_epsilon
        self.implementation = config.check_implementation(implementation)
        self.return_sequences = bool(return_sequences)
        self.return_state = bool(return_state)
        self.go_backwards = bool(go_backwards)
        self.stateful = bool(stateful)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.states = None
        self.sizes = Sizes(
            num_memories,
            self.shared_memory,
            self.per_memory_projections,
            num_heads,
            key_dim,
            value_dim,
            0 if conv_width is None else conv_width - 1,
        )
        # The layer is rematerialized as a whole, or not.
        with keras.RematScope(mode=None):
            self._create_sublayers(rules.get(update_rule))
        self._set_lora(lora_rank, lora_alpha)

    def _create_sublayers(self, update_rule):
        weights = dict(
            kernel_regularizer=self.kernel_regularizer,
            kernel_constraint=self.kernel_constraint,
        )
        self.router = Router(
            self.num_memories,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            name="router",
            **weights,
        )

        def dense(sets, units, name, initializer=None):
            return per_memory_dense(
                sets,
                units,
                name,
                kernel_initializer=initializer or self.kernel_initializer,
                dtype=self.dtype_policy,
                **weights,
            )

        query, key, value = self.sizes.channels
        sets = self.sizes.projections
        self.query_projection = dense(1, query, "query")
        self.key_projection = dense(sets, key, "key")
        self.value_projection = dense(sets, value, "value")
        self.gate_projection = dense(1, value, "gate") if self.use_output_gate else None
        # Its width is that of the inputs: see `build`.
        self.output_projection: Any = None
        self.update_rule = update_rule
        self.update_rule.bind(
            self.num_heads,
            self.key_dim,
            self.value_dim,
            sets,
            implementation=self.implementation,
            kernel_initializer=self.kernel_initializer,
            dtype=self.dtype_policy,
            **weights,
        )
        self._make_dense = dense

    def build(self, inputs_shape):
        batch, _, width = inputs_shape
        if width is None:
            raise ValueError(
                "The last axis of `inputs` must be known. "
                f"Received: shape {tuple(inputs_shape)}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=3, axes={-1: width})
        with keras.RematScope(mode=None):
            self.output_projection = self._make_dense(
                1, width, "output", self.output_initializer
            )
        self._prepare_sublayer(self.output_projection)
        for layer in self._projections():
            if layer is not self.output_projection:
                layer.build(inputs_shape)
        self.router.build(inputs_shape)
        self.update_rule.build(inputs_shape)
        value = self.sizes.channels[2]
        self.output_projection.build((*inputs_shape[:-1], value))
        self.convolution_kernels = None
        if self.conv_width is not None:
            bound = self.conv_width**-0.5
            self.convolution_kernels = [
                self.add_weight(
                    shape=(self.conv_width, channels),
                    initializer=keras.initializers.RandomUniform(-bound, bound),
                    name=f"{name}_convolution",
                )
                for name, channels in zip(
                    ("query", "key", "value"), self.sizes.channels
                )
            ]
        self.norm_scale = self.add_weight(
            shape=(self.value_dim,), initializer="ones", name="norm_scale"
        )
        self._create_record(self.num_memories)
        if self.stateful:
            self._create_states(batch)
        self.built = True

    def __call__(self, inputs, mask=None, **kwargs):
        # Keras hands on an input's mask only where it is the one tensor argument.
        if mask is None:
            mask = getattr(inputs, "_keras_mask", None)
        return super().__call__(inputs, mask=mask, **kwargs)

    def call(
        self, inputs, mask=None, initial_state=None, segment_ids=None, training=None
    ):
        return self._record(
            training, *self._compute(inputs, mask, initial_state, segment_ids)
        )

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # Only what has no side effects may run twice: losses and variables are
        # written behind it.
        wrap = super().rematerialized_call

        def call(
            inputs, mask=None, initial_state=None, segment_ids=None, training=None
        ):
            results = call_on_tensors(
                lambda function: wrap(function, *args, **kwargs),
                self._compute,
                (inputs, mask, initial_state, segment_ids),
            )
            return self._record(training, *results)

        return call

    def call_with_state(
        self, inputs, state, mask=None, segment_ids=None, in_place=False
    ):
        """A call that takes a state up and returns the next one.

        Whatever `return_state` and `stateful` say. It leaves nothing behind: no loss,
        no routing statistics.

        Args:
            inputs, mask, segment_ids: as in a call.
            state: as `get_initial_state` gives it.
            in_place: whether the tensors of `state` may be overwritten, because
                nobody needs them any more. Only torch does so.

        Returns:
            Output `[B, T, D]` and the new state.
        """
        output, state, _ = self._compute(
            inputs, mask, state, segment_ids, return_state=True, in_place=in_place
        )
        return output, state

    def _compute(
        self,
        inputs,
        mask,
        initial_state,
        segment_ids,
        return_state=False,
        in_place=False,
    ):
        """Returns output, new state (or None) and routing statistics."""
        inputs = ops.cast(ops.convert_to_tensor(inputs), self.compute_dtype)
        batch, length, _ = ops.shape(inputs)
        backend.check_export(length)
        check_call(inputs, mask, segment_ids)
        state = self._first_state(initial_state, inputs)
        if mask is not None:
            mask = ops.cast(mask, "bool")
        if segment_ids is not None:
            segment_ids = ops.cast(segment_ids, "int32")
        if self.go_backwards:
            inputs = ops.flip(inputs, axis=1)
            mask = None if mask is None else ops.flip(mask, axis=1)
            if segment_ids is not None:
                segment_ids = ops.flip(segment_ids, axis=1)
        if mask is not None:
            inputs = select(mask[..., None], inputs, 0)

        probabilities, weights, indices = self._route(inputs)
        statistics = routing_statistics(
            probabilities, indices, mask, implementation=self.implementation
        )
        tokens = Tokens(
            inputs,
            project(self.query_projection, inputs),
            self.key_projection,
            self.value_projection,
            tuple(project(self.update_rule.project, inputs)),
        )
        kernels = None
        if self.convolution_kernels is not None:
            kernels = [
                ops.convert_to_tensor(kernel) for kernel in self.convolution_kernels
            ]
        in_place = in_place and backend.overwrites_variables()
        return_state = return_state or self.return_state or self.stateful
        options = dict(
            implementation=self.implementation,
            return_state=return_state,
            in_place=in_place or self._keeps_state(initial_state),
        )
        layer = (self.sizes, self.update_rule, kernels, self._output_norm(inputs))
        common = (*layer, tokens, weights, indices, mask)
        if inputs.shape[1] == 1:
            state = self.get_initial_state(batch) if state is None else state
            mixed, state = mix_token(*common, state, options)
        else:
            mixed, state = mix_sequence(*common, segment_ids, state, options)
        output = project(self.output_projection, mixed)
        if not self.return_sequences:
            output = _last_valid(output, mask)
        return output, state if return_state else None, statistics

    def _clear_losses(self):
        # `torch.compile` would guard the tensors in the old list, and so compile
        # again at every step.
        self._losses = []
        super()._clear_losses()

    def _route(self, inputs):
        return self.router(inputs, top_k=self.top_k, implementation=self.implementation)

    def _output_norm(self, inputs):
        gate = None
        if self.gate_projection is not None:
            gate = project(self.gate_projection, inputs)
        scale = ops.convert_to_tensor(self.norm_scale)
        return OutputNorm(scale, gate, self.norm_epsilon, self.compute_dtype)

    def _record(self, training, output, state, statistics):
        """Writes what a call leaves behind, and returns its outputs."""
        self._record_routing(training, statistics)
        if self.stateful:
            for variable, value in zip(self.states, state):
                if value is not variable.value:
                    variable.assign(ops.stop_gradient(value))
        return (output, state) if self.return_state else output

    # Routing.

    def route(self, inputs, mask=None):
        """How the layer routes tokens.

        Args:
            inputs: `[B, T, D]`.
            mask: bool `[B, T]`, or None. Masked tokens get weights of 0.

        Returns:
            Weights, float32 `[B, T, k]`, and memory indices, int32 `[B, T, k]`, most
            probable first; ties go to the lowest index.
        """
        inputs = ops.cast(ops.convert_to_tensor(inputs), self.compute_dtype)
        if len(inputs.shape) != 3:
            raise ValueError(
                f"`inputs` must have shape [B, T, D]. Received: {tuple(inputs.shape)}"
            )
        if not self.built:
            self.build(inputs.shape)
        check_call(inputs, mask, None)
        _, weights, indices = self._route(inputs)
        if mask is not None:
            weights = select(ops.cast(mask, "bool")[..., None], weights, 0.0)
        return weights, indices

    # Keras' protocols.

    def compute_mask(self, inputs, mask=None):
        if mask is None or not self.return_sequences:
            mask = None
        elif self.go_backwards:
            mask = ops.flip(ops.convert_to_tensor(mask), axis=1)
        if self.return_state:
            return mask, tuple(None for _ in self._state_shapes())
        return mask

    def compute_output_shape(self, inputs_shape):
        output_shape = tuple(inputs_shape)
        if not self.return_sequences:
            output_shape = (inputs_shape[0], inputs_shape[-1])
        if not self.return_state:
            return output_shape
        return output_shape, tuple(
            (inputs_shape[0], *shape) for shape in self._state_shapes()
        )

    def compute_output_spec(
        self, inputs, mask=None, initial_state=None, segment_ids=None, training=None
    ):
        check_call(inputs, mask, segment_ids)
        if initial_state is not None:
            check_state(initial_state, self._state_shapes(), inputs.shape[0])
        shape = self.compute_output_shape(inputs.shape)
        if not self.return_state:
            return keras.KerasTensor(shape, dtype=self.compute_dtype)
        output_shape, state_shapes = shape
        return keras.KerasTensor(output_shape, dtype=self.compute_dtype), tuple(
            keras.KerasTensor(shape, dtype="float32") for shape in state_shapes
        )

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "num_memories": self.num_memories,
            "top_k": self.top_k,
            "shared_memory": self.shared_memory,
            "update_rule": rules.serialize(self.update_rule),
            "per_memory_projections": self.per_memory_projections,
            "conv_width": self.conv_width,
            "use_output_gate": self.use_output_gate,
            "balance_loss_weight": self.balance_loss_weight,
            "norm_epsilon": self.norm_epsilon,
            "implementation": self.implementation,
            "return_sequences": self.return_sequences,
            "return_state": self.return_state,
            "go_backwards": self.go_backwards,
            "stateful": self.stateful,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
            **self._projections_config(),
        }


def _last_valid(output, mask):
    """Output of each row's last valid token, zeros where there is none: `[B, D]`."""
    if mask is None:
        return output[:, -1]
    length = ops.shape(mask)[1]
    index = select(mask, ops.arange(length, dtype="int32"), -1)
    last = ops.max(index, axis=1)
    # A product would spread NaN; the selection of one row does not.
    chosen = ops.arange(length, dtype="int32") == last[:, None]
    return ops.sum(select(chosen[..., None], output, 0), 1)
