"""The base of the memory update rules."""

import keras

from keras_mom.initializers import Blocks


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
        erase_before_decay: whether a delta rule reads the state before its decay.
        num_heads, key_dim, value_dim: H, K and V of the layer, known in
            `create_projections` and after.
        num_projections: P.
    """

    write = "delta"
    erase_before_decay = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = self.key_dim = self.value_dim = None
        self.num_projections = None
        self._dense_options = {}

    def bind(self, num_heads, key_dim, value_dim, num_projections, **dense_options):
        """Tells the rule the sizes of its layer. `MoMLayer` calls this once.

        Args:
            num_heads, key_dim, value_dim: H, K, V.
            num_projections: P.
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
        self._dense_options = dense_options
        self.create_projections()

    def create_projections(self):
        """Creates the rule's projections, as attributes, with `per_memory_dense`."""

    def per_memory_dense(self, units, name):
        """A Dense layer from `[B, T, D]` to `[B, T, P * units]`, one kernel a set."""
        return per_memory_dense(
            self.num_projections, units, name, **self._dense_options
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
            query, key: `[B, R, H, K]`, behind the short convolution.
            value: `[B, R, H, V]`.
            *projected: rows of what `project` returned, `[B, R, ...]`.

        Returns:
            Tuple (query, key, value, log_decay, beta) in the sense of
            `keras_mom.ops.memory_scan`; log_decay and beta may be None.
        """
        raise NotImplementedError

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


def clone_initializer(initializer):
    """A copy with a seed of its own where the original has none."""
    initializer = keras.initializers.get(initializer)
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    return initializer.clone()
