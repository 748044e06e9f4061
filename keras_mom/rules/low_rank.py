"""A projection of low rank for each memory."""

import keras
from keras import ops

from keras_mom.initializers import Blocks, clone_initializer


@keras.saving.register_keras_serializable("keras_mom")
class PerMemoryLowRank(keras.layers.Layer):
    """`activation(x W_1) W_2 + b`, with `W_1` and `W_2` for each projection set.

    `[B, T, D]` to `[B, T, P, units]`.

    Args:
        sets: P, number of projection sets.
        rank: columns of `W_1`.
        units: columns of `W_2`.
        activation: of `x W_1`.
        use_bias: whether there is a `b`, zero at first.
        kernel_initializer, kernel_regularizer, kernel_constraint: of both kernels.
    """

    def __init__(
        self,
        sets,
        rank,
        units,
        activation=None,
        use_bias=False,
        kernel_initializer="glorot_uniform",
        kernel_regularizer=None,
        kernel_constraint=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.sets, self.rank, self.units = sets, rank, units
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)

    def build(self, inputs_shape):
        settings = dict(
            regularizer=self.kernel_regularizer, constraint=self.kernel_constraint
        )
        down, up = (
            Blocks(clone_initializer(self.kernel_initializer), self.sets)
            for _ in range(2)
        )
        self.down_kernel = self.add_weight(
            shape=(inputs_shape[-1], self.sets * self.rank),
            initializer=down,
            name="down_kernel",
            **settings,
        )
        self.up_kernel = self.add_weight(
            shape=(self.rank, self.sets * self.units),
            initializer=up,
            name="up_kernel",
            **settings,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                shape=(self.sets, self.units), initializer="zeros", name="bias"
            )
        self.built = True

    def call(self, inputs):
        low = self.activation(ops.matmul(inputs, self.down_kernel))
        batch, length, _ = ops.shape(low)
        low = ops.reshape(low, (batch, length, self.sets, self.rank))
        up = ops.reshape(self.up_kernel, (self.rank, self.sets, self.units))
        output = ops.einsum("btpr,rpu->btpu", low, up)
        return output if self.bias is None else output + self.bias

    def compute_output_spec(self, inputs):
        shape = (*inputs.shape[:-1], self.sets, self.units)
        return keras.KerasTensor(shape, dtype=self.compute_dtype)
