"""The router: how probable each memory is for a token."""

import keras
from keras import ops

from keras_mom.ops.routing import logits_of, project_and_route


@keras.saving.register_keras_serializable("keras_mom")
class Router(keras.layers.Layer):
    """`softmax(x W_r)` over the memories, in float32 whatever the dtype policy.

    Source: arXiv 2502.13685, section 3.1.

    Args:
        num_memories: M.
        kernel_initializer, kernel_regularizer, kernel_constraint: of `W_r`, `[D, M]`.
    """

    def __init__(
        self,
        num_memories,
        kernel_initializer="glorot_uniform",
        kernel_regularizer=None,
        kernel_constraint=None,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self.num_memories = num_memories
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)

    def build(self, inputs_shape):
        self.kernel = self.add_weight(
            shape=(inputs_shape[-1], self.num_memories),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
            dtype="float32",
            name="kernel",
        )
        self.built = True

    def call(self, inputs, top_k=None, implementation=None):
        """Probabilities, float32 `[B, T, M]`, of `[B, T, D]`.

        With `top_k` also weights, float32, and indices, int32, both `[B, T, top_k]`;
        `implementation` is that of `keras_mom.ops.routing.project_and_route`.
        """
        kernel = ops.convert_to_tensor(self.kernel)
        if top_k is None:
            return ops.softmax(logits_of(inputs, kernel))
        return project_and_route(inputs, kernel, top_k, implementation=implementation)

    def compute_output_spec(self, inputs, top_k=None, implementation=None):
        shape = tuple(inputs.shape[:-1])
        probabilities = keras.KerasTensor((*shape, self.num_memories), "float32")
        if top_k is None:
            return probabilities
        shape = (*shape, top_k)
        weights, indices = (keras.KerasTensor(shape, x) for x in ("float32", "int32"))
        return probabilities, weights, indices

    def get_config(self):
        return {
            **super().get_config(),
            "num_memories": self.num_memories,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
        }
