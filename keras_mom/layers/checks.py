"""Checks of a layer's arguments. Each error names what came and what was expected."""

import keras
from keras import ops


def check_call(inputs, mask, segment_ids):
    """Checks `mask` and `segment_ids` against `inputs` `[B, T, D]`."""
    expected = tuple(inputs.shape[:2])
    for name, tensor in (("mask", mask), ("segment_ids", segment_ids)):
        if tensor is None:
            continue
        shape = _shape(tensor)
        if not _fits(shape, expected):
            raise ValueError(
                f"`{name}` must have shape [B, T] = {_text(expected)} to fit `inputs`. "
                f"Received: shape {_text(shape)}"
            )
    if segment_ids is not None and "int" not in str(_dtype(segment_ids)):
        raise ValueError(
            "`segment_ids` must be of an integer dtype. "
            f"Received: dtype {_dtype(segment_ids)}"
        )


def check_state(state, shapes, batch):
    """Returns the state as a tuple of tensors, or raises.

    A list of one state counts as that state: wrappers such as `Bidirectional` pass
    slices of a list.

    Args:
        state: what the caller gave.
        shapes: shape of each of the state's tensors, without the batch axis.
        batch: batch size of the inputs, or None.
    """
    if isinstance(state, (list, tuple)) and len(state) == 1:
        if isinstance(state[0], (list, tuple)):
            state = state[0]
    if not isinstance(state, (list, tuple)) or len(state) != len(shapes):
        received = f"{len(state)}" if isinstance(state, (list, tuple)) else type(state)
        raise ValueError(
            f"`initial_state` must be a tuple of {len(shapes)} tensors, as "
            f"`get_initial_state` makes it. Received: {received}"
        )
    names = ("memories", "windows")
    checked = []
    for name, tensor, shape in zip(names, state, shapes):
        expected = (batch, *shape)
        if not _fits(_shape(tensor), expected):
            raise ValueError(
                f"The {name} of `initial_state` must have shape {_text(expected)}. "
                f"Received: shape {_text(_shape(tensor))}"
            )
        if "float32" not in str(_dtype(tensor)):
            raise ValueError(
                f"The {name} of `initial_state` must be float32. "
                f"Received: dtype {_dtype(tensor)}"
            )
        if not isinstance(tensor, keras.KerasTensor):
            tensor = ops.convert_to_tensor(tensor)
        checked.append(tensor)
    return tuple(checked)


def _shape(tensor):
    shape = getattr(tensor, "shape", None)
    return tuple(ops.convert_to_tensor(tensor).shape if shape is None else shape)


def _dtype(tensor):
    dtype = getattr(tensor, "dtype", None)
    return ops.convert_to_tensor(tensor).dtype if dtype is None else dtype


def _fits(shape, expected):
    return len(shape) == len(expected) and all(
        a is None or b is None or a == b for a, b in zip(shape, expected)
    )


def _text(shape):
    return f"[{', '.join(str(size) for size in shape)}]"
