"""Keys and values of a token, projected for the memories that it goes to."""

from keras import ops

from keras_mom.ops.dispatch import dispatch, register


def memory_projection(inputs, layers, packing, sets, *, implementation=None):
    """Projects tokens with kernels of each memory.

    Args:
        inputs: float `[B, T, D]`.
        layers: `keras.layers.Dense` layers without bias from D to `sets * E` channels.
        packing: `Packing`, of the tokens.
        sets: number of projection sets, P, as `Packing.source` takes it.
        implementation: as in `keras_mom.ops.memory_scan`.

    Returns:
        For each layer a tuple (inputs, source, targets), as
        `keras_mom.ops.packed_convolution.packed_convolution` takes them. What stands
        in rows that have no target is not defined.
    """
    return dispatch("memory_projection", implementation, inputs, layers, packing, sets)


@register("memory_projection", "portable")
def project_all(inputs, layers, packing, sets):
    """Projects every token for every memory, of which the packing takes some."""
    moves = packing.source(sets)
    return [(by_set(layer(inputs), sets), *moves) for layer in layers]


def by_set(x, sets):
    """`[B, T, sets * E]` to `[B, T * sets, E]`."""
    batch, length, width = ops.shape(x)
    return ops.reshape(x, (batch, length * sets, width // sets))
