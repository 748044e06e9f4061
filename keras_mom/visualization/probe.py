"""Reading how a model routes."""

import contextlib
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_mom import backend
from keras_mom.layers.mom_layer import MoMLayer


class LayerRouting(NamedTuple):
    """How one call of a layer routed its tokens.

    Attributes:
        name: path of the layer.
        probabilities: float32 `[B, T, M]`, the router's.
        indices: int32 `[B, T, k]`, the memories that a token goes to, most probable
            first.
        weights: float32 `[B, T, k]`, of what they answer.
        mask: bool `[B, T]`, the tokens that count.
    """

    name: str
    probabilities: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    mask: np.ndarray


def mom_layers(model):
    """The MoM layers of a model or layer, in its order.

    Raises:
        ValueError: if there are none.
    """
    layers = [layer for layer in _walk(model, set()) if isinstance(layer, MoMLayer)]
    if not layers:
        raise ValueError(
            f"`model` must have a `keras_mom.MoMLayer`. Received: {model!r}"
        )
    return layers


def _walk(layer, seen):
    """A layer and those in it, first to last; Keras' own walk goes backwards."""
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield layer
    for inner in layer._layers:
        yield from _walk(inner, seen)


class RoutingProbe:
    """Reads the routing of a model's MoM layers, as it is at each call.

    The model is called in inference, compiled on JAX and TensorFlow. What it is left
    with does not change.

    Args:
        model: model, or layer, with MoM layers anywhere in it.

    Call arguments:
        inputs: what the model takes: an array, or a dict or list of arrays.

    Returns:
        A list of `LayerRouting`, in the order of the layers; a layer that is called
        twice comes twice.

    Raises:
        ValueError: if the model has no MoM layer.
    """

    def __init__(self, model):
        self.model = model
        self.layers = mom_layers(model)
        self._names = []
        self._variables = []
        self._program: Any = None

    def __call__(self, inputs):
        inputs = _tensors(inputs)
        _, calls = self._compiled(inputs)((), inputs)
        return [
            _as_arrays(name, call)
            for name, call in zip(self._names, calls, strict=True)
        ]

    def _compiled(self, inputs):
        """The program, made anew where the model has other variables than before."""
        if not self.model.built:
            self.model(inputs, training=False)
        variables = self.model.variables
        if self._program is None or [*map(id, variables)] != self._variables:
            self._variables = [*map(id, variables)]
            self._program = backend.decoding_program(self._read, variables, [])
        return self._program

    def _read(self, carry, inputs):
        with _recorded(self.model, self.layers) as calls:
            self.model(inputs, training=False)
        places = {id(layer): place for place, layer in enumerate(self.layers)}
        calls.sort(key=lambda call: places[id(call[0])])
        self._names = [layer.path for layer, _ in calls]
        return carry, [call for _, call in calls]


def collect_routing(model, inputs):
    """The routing of all MoM layers in one call; see `RoutingProbe`."""
    return RoutingProbe(model)(inputs)


def _tensors(inputs):
    if isinstance(inputs, dict):
        return {name: ops.convert_to_tensor(x) for name, x in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return [ops.convert_to_tensor(x) for x in inputs]
    return ops.convert_to_tensor(inputs)


def _as_arrays(name, call):
    arrays = {key: ops.convert_to_numpy(x) for key, x in call.items()}
    if "mask" not in arrays:
        arrays["mask"] = np.ones(arrays["indices"].shape[:2], bool)
    return LayerRouting(name, **arrays)


@contextlib.contextmanager
def _recorded(model, layers):
    """Yields a list to which each call adds its layer and its routing."""
    calls = []
    every = list(_walk(model, set()))
    modes = [layer._remat_mode for layer in every]
    # What is computed in a rematerialized call cannot be handed out of it.
    for layer in every:
        object.__setattr__(layer, "_remat_mode", None)
    for layer in layers:
        object.__setattr__(layer, "_compute", _recording(layer, calls))
    try:
        yield calls
    finally:
        for layer in layers:
            object.__delattr__(layer, "_compute")
        for layer, mode in zip(every, modes):
            object.__setattr__(layer, "_remat_mode", mode)


def _recording(layer, calls):
    compute, route = layer._compute, layer._route

    def recording_compute(inputs, mask, *args, **kwargs):
        def recording_route(x):
            probabilities, weights, indices = routing = route(x)
            found = {
                "probabilities": ops.cast(probabilities, "float32"),
                "indices": indices,
                "weights": ops.cast(weights, "float32"),
            }
            if layer.go_backwards:
                found = {key: ops.flip(x, axis=1) for key, x in found.items()}
            if mask is not None:
                found["mask"] = ops.cast(mask, "bool")
            calls.append((layer, found))
            return routing

        object.__setattr__(layer, "_route", recording_route)
        try:
            return compute(inputs, mask, *args, **kwargs)
        finally:
            object.__delattr__(layer, "_route")

    return recording_compute
