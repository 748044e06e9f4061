"""The state of a MoM layer: its shapes, its checks, and where it is kept."""

from typing import Any

import keras
from keras import ops

from keras_mom import backend
from keras_mom.layers.checks import check_state


class StateMixin:
    """Explicit states, and the states that a `stateful` layer keeps.

    A state is a tuple of float32 tensors: memories `[B, M (+ 1), H, *state_shape]`,
    with the rule's `state_shape`, which is `[K, V]` unless it says otherwise, and
    with a convolution its windows `[B, M (+ 1), conv_width - 1, channels]`.
    """

    sizes: Any
    update_rule: Any
    conv_width: int | None
    stateful: bool
    return_state: bool
    add_weight: Any
    states: Any = None

    def get_initial_state(self, batch_size):
        """The empty state of `batch_size` rows: a tuple of float32 zeros."""
        return tuple(
            ops.zeros((batch_size, *shape), "float32") for shape in self._state_shapes()
        )

    def _state_shapes(self):
        sizes = self.sizes
        memories = (sizes.memories, sizes.num_heads, *self.update_rule.state_shape)
        if self.conv_width is None:
            return (memories,)
        return memories, (sizes.memories, sizes.history, sum(sizes.channels))

    def _first_state(self, initial_state, inputs):
        if initial_state is None:
            if not self.stateful:
                return None
            values = tuple(variable.value for variable in self.states)
            if backend.overwrites_variables():
                return values
            # The variables are written before the backward pass reads these.
            return tuple(ops.copy(value) for value in values)
        return check_state(initial_state, self._state_shapes(), inputs.shape[0])

    def _keeps_state(self, initial_state):
        """Whether a token may be written to the variables where they lie."""
        own = self.stateful and initial_state is None and not self.return_state
        return own and backend.overwrites_variables()

    def _create_states(self, batch):
        if batch is None:
            raise ValueError(
                "`stateful=True` needs inputs of a fixed batch size. "
                "Received: inputs of shape (None, ...)"
            )
        self.input_spec = keras.layers.InputSpec(
            ndim=3, axes={0: batch, **self.input_spec.axes}
        )
        self.states = [
            self.add_weight(
                shape=(batch, *shape),
                initializer="zeros",
                dtype="float32",
                trainable=False,
                name=name,
            )
            for name, shape in zip(("memories", "windows"), self._state_shapes())
        ]

    def reset_state(self):
        """Empties the state of a `stateful` layer."""
        for variable in self.states or ():
            variable.assign(ops.zeros(variable.shape, variable.dtype))

    reset_states = reset_state
