"""Calls through a wrapper that takes functions of tensors alone."""

import keras
from keras import ops


def call_on_tensors(wrap, function, arguments):
    """`function(*arguments)`, computed by `wrap` of a function of tensors.

    Keras' rematerialization takes and returns neither None nor keywords on TensorFlow.

    Args:
        wrap: takes a function from tensors to a tuple of tensors, and returns one.
        function: returns a tree of tensors and None.
        arguments: a tree of tensors and None.
    """
    structure = None

    def on_tensors(*tensors):
        nonlocal structure
        tensors = [
            ops.cast(x, "bool") if is_bool else x for x, is_bool in zip(tensors, bools)
        ]
        results = function(*_with_nones(arguments, tensors))
        # Without the tensors, which would otherwise stay in memory.
        structure = keras.tree.map_structure(
            lambda x: None if x is None else 0, results
        )
        return _without_nones(results)

    given = _without_nones(arguments)
    # In a graph, TensorFlow adds to every argument, which no bool can take.
    bools = [keras.backend.standardize_dtype(x.dtype) == "bool" for x in given]
    given = [ops.cast(x, "int32") if is_bool else x for x, is_bool in zip(given, bools)]
    tensors = wrap(on_tensors)(*given)
    return _with_nones(structure, tensors)


def _without_nones(tree):
    return tuple(x for x in keras.tree.flatten(tree) if x is not None)


def _with_nones(tree, tensors):
    """`tree` with its tensors replaced, in the order of `_without_nones`."""
    tensors = iter(tensors)
    return keras.tree.map_structure(
        lambda x: None if x is None else next(tensors), tree
    )
