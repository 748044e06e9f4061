"""The router: how probable each memory is for a token."""

import keras
from keras import ops


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

    def call(self, inputs):
        """`[B, T, D]` to probabilities, float32 `[B, T, M]`."""
        return ops.softmax(ops.matmul(ops.cast(inputs, "float32"), self.kernel))

    def compute_output_spec(self, inputs):
        shape = (*inputs.shape[:-1], self.num_memories)
        return keras.KerasTensor(shape, dtype="float32")

    def get_config(self):
        return {
            **super().get_config(),
            "num_memories": self.num_memories,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
        }
