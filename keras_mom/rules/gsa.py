"""Gated slot attention: softmax attention over slots that forget."""

import keras
from keras import ops

from keras_mom.checks import check_positive
from keras_mom.rules.base import MemoryUpdateRule


@keras.saving.register_keras_serializable("keras_mom")
class GSA(MemoryUpdateRule):
    """Gated slot attention: a key and a value for each of a fixed number of slots.

    The slots' keys `C_t` (`[slots, K]`) and values `D_t` (`[slots, V]`) forget alike,
    and take of a token what they forget. A token attends to the slots:

        C_t = diag(a_t) C_{t-1} + (1 - a_t) k_t^T
        D_t = diag(a_t) D_{t-1} + (1 - a_t) v_t^T
        o_t = D_t^T softmax(C_t q_t)

    `a_t = sigmoid(x_t W_a)^(1 / temperature)`, one a slot. The SiLU of query, key and
    value is that of the layer's convolution. A head's state holds both matrices side by
    side: `[slots, K + V]`.

    Source: arXiv 2409.07146, section 3 (the recurrence and its gate); the number of
    slots and the temperature are those of its experiments. It is not a row of Table 1
    of arXiv 2502.13685.

    Args:
        num_slots: slots of a head in a memory.
        temperature: root that is taken of the gate, positive.
    """

    write = "additive"

    def __init__(self, num_slots=64, temperature=8.0, **kwargs):
        super().__init__(**kwargs)
        check_positive("num_slots", num_slots)
        if not temperature > 0:
            raise ValueError(
                f"`temperature` must be positive. Received: temperature={temperature}"
            )
        self.num_slots = num_slots
        self.temperature = float(temperature)

    @property
    def state_shape(self):
        return self.num_slots, self.key_dim + self.value_dim

    def create_projections(self):
        self.decay_projection = self.per_memory_dense(
            self.num_heads * self.num_slots, "decay"
        )

    def project(self, inputs):
        return (self.split_memories(self.decay_projection(inputs)),)

    def prepare(self, query, key, value, decay):
        shape = (*ops.shape(query)[:3], self.num_slots)
        decay = ops.reshape(ops.cast(decay, "float32"), shape)
        return query, key, value, ops.log_sigmoid(decay) / self.temperature, None

    def scan(self, scan, query, key, value, log_decay, beta, initial_state):
        written = -ops.expm1(log_decay)
        keys = values = None
        if initial_state is not None:
            keys = ops.swapaxes(initial_state[..., : self.key_dim], -1, -2)
            values = initial_state[..., self.key_dim :]
        logits, keys = scan(
            query,
            key,
            written,
            log_decay=log_decay,
            beta=beta,
            initial_state=keys,
            decay_axis="value",
            scale=1.0,
        )
        outputs, values = scan(
            ops.softmax(logits, axis=-1),
            written,
            value,
            log_decay=log_decay,
            beta=beta,
            initial_state=values,
            scale=1.0,
        )
        keys = ops.swapaxes(keys, -1, -2)
        return outputs, ops.concatenate([keys, values], axis=-1)

    def get_config(self):
        return {
            **super().get_config(),
            "num_slots": self.num_slots,
            "temperature": self.temperature,
        }
