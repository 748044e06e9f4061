"""The base of the memory update rules."""

from typing import Any

import keras

from keras_mom.initializers import Blocks, clone_initializer
from keras_mom.rules.low_rank import PerMemoryLowRank


class MemoryUpdateRule(keras.layers.Layer):
    """How a memory is written, and what is projected from a token to do so.

    A rule is whatever turns a token into the arguments of `keras_mom.ops.memory_scan`.
    A subclass sets the class attributes `write` and `erase_before_decay`, creates its
    projections in `create_projections`, its other weights in `build`, and returns the
    scan's arguments from `prepare`:

    ```python
    @keras.saving.register_keras_serializable("my_package")
    class Fading(keras_mom.rules.MemoryUpdateRule):
        write = "additive"

        def create_projections(self):
            self.decay_projection = self.per_memory_dense(self.num_heads, "decay")

        def project(self, inputs):
            return (self.split_memories(self.decay_projection(inputs)),)

        def prepare(self, query, key, value, decay):
            log_decay = -keras.ops.softplus(keras.ops.cast(decay, "float32"))
            return query, key, value, log_decay, None
    ```

    Names: P projection sets: one a memory (the shared one last) with per-memory
    projections, else one for all routed memories and one for the shared memory.

    Attributes:
        write: `"delta"` or `"additive"`.
        erase_before_decay: whether a delta rule erases what its key reads before the
            decay.
        read_before_update: whether a token reads what the tokens before it left,
            before its own decay and write.
        convolution_activations: `"silu"` or None for query, key and value, behind the
            short convolution.
        normalized: whether the layer L2-normalizes each head's query and key, behind
            the convolution.
        num_heads, key_dim, value_dim: H, K and V of the layer, known in
            `create_projections` and after.
        num_projections: P.
        implementation: that of the layer, for operations of `keras_mom.ops`.
    """

    write = "delta"
    erase_before_decay = False
    read_before_update = False
    convolution_activations = ("silu", "silu", "silu")
    normalized = (False, False)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Known once the rule is bound to a layer.
        self.num_heads: Any = None
        self.key_dim: Any = None
        self.value_dim: Any = None
        self.num_projections: Any = None
        self.implementation: Any = None
        self._dense_options = {}

    def bind(
        self,
        num_heads,
        key_dim,
        value_dim,
        num_projections,
        *,
        implementation=None,
        **dense_options,
    ):
        """Tells the rule the sizes of its layer. `MoMLayer` calls this once.

        Args:
            num_heads, key_dim, value_dim: H, K, V.
            num_projections: P.
            implementation: that of the layer.
            **dense_options: options of the `keras.layers.Dense` layers that
                `per_memory_dense` makes: initializer, regularizer, constraint, dtype.
        """
        if self.num_heads is not None:
            raise ValueError(
                f"{self.__class__.__name__} serves a layer already. Give each layer "
                "a rule of its own, or the rule's name or config."
            )
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.num_projections = num_projections
        self.implementation = implementation
        self._dense_options = dense_options
        self.create_projections()

    def create_projections(self):
        """Creates the rule's projections, as attributes, with `per_memory_dense`."""

    def per_memory_dense(self, units, name):
        """A Dense layer from `[B, T, D]` to `[B, T, P * units]`, one kernel a set."""
        return per_memory_dense(
            self.num_projections, units, name, **self._dense_options
        )

    def per_memory_low_rank(self, rank, units, name, **options):
        """A projection `[B, T, D]` to `[B, T, P, units]` through `rank` columns."""
        return PerMemoryLowRank(
            self.num_projections,
            rank,
            units,
            name=name,
            **self._dense_options,
            **options,
        )

    def add_float32_weight(self, name, initializer, shape=None):
        """A weight that stays float32, shared by the memories: `[H]`, or `shape`."""
        return self.add_weight(
            shape=(self.num_heads,) if shape is None else shape,
            initializer=initializer,
            dtype="float32",
            autocast=False,
            name=name,
        )

    def split_memories(self, projected):
        """`[B, T, P * units]` to `[B, T, P, units]`."""
        batch, length, width = keras.ops.shape(projected)
        sets = self.num_projections
        return keras.ops.reshape(projected, (batch, length, sets, width // sets))

    def build(self, inputs_shape):
        """Creates the rule's weights. Call `super().build(inputs_shape)`."""
        for layer in self._layers:
            if not layer.built:
                layer.build(inputs_shape)
        self.built = True

    def project(self, inputs):
        """Projects tokens, before they are packed.

        Args:
            inputs: `[B, T, D]`, of the compute dtype.

        Returns:
            Tuple of tensors `[B, T, P, ...]`.
        """
        return ()

    def prepare(self, query, key, value, *projected):
        """Arguments of the scan, from packed rows of one memory each.

        Args:
            query, key: `[B, R, H, K]`, behind the short convolution, and L2-normalized
                where `normalized` says so, then float32 or of the compute dtype.
            value: `[B, R, H, V]`.
            *projected: rows of what `project` returned, `[B, R, ...]`.

        Returns:
            Tuple (query, key, value, log_decay, beta) in the sense of
            `keras_mom.ops.memory_scan`; log_decay and beta may be None.
        """
        raise NotImplementedError

    def scan(self, scan, query, key, value, log_decay, beta, initial_state):
        """Writes rows to their memories and reads them.

        Override it where that is more than one memory scan. Rows that hold no token
        have a log decay and a beta of 0.

        Args:
            scan: `RowScan` or `TokenScan`, which run a memory scan over these rows.
            query, key, value, log_decay, beta: what `prepare` returned, beta float32
                `[B, R, H]`.
            initial_state: float32 `[B, M, H, *state_shape]`, or None for an empty one.

        Returns:
            Outputs `[B, R, H, V]` and the state behind the rows.
        """
        return scan(
            query,
            key,
            value,
            log_decay=log_decay,
            beta=beta,
            initial_state=initial_state,
            write=self.write,
            erase_before_decay=self.erase_before_decay,
            read_before_update=self.read_before_update,
        )

    @property
    def state_shape(self):
        """Rows and columns of the matrix that a head keeps in a memory: (K, V)."""
        return self.key_dim, self.value_dim

    def call(self, inputs):
        """A rule is not called: its layer uses `project` and `prepare`."""
        raise NotImplementedError(
            f"{self.__class__.__name__} is used through `MoMLayer(update_rule=...)`."
        )


def per_memory_dense(sets, units, name, *, kernel_initializer, **options):
    """A Dense layer that holds `sets` kernels of `units` columns side by side."""
    return keras.layers.Dense(
        sets * units,
        use_bias=False,
        kernel_initializer=Blocks(clone_initializer(kernel_initializer), sets),
        name=name,
        **options,
    )
