"""Memory update rules."""

import keras

from keras_mom.rules.base import MemoryUpdateRule
from keras_mom.rules.gated_delta_net import GatedDeltaNet
from keras_mom.rules.linear_attention import LinearAttention

_BY_NAME = {
    "gated_delta_net": GatedDeltaNet,
    "linear_attention": LinearAttention,
}

__all__ = [
    "GatedDeltaNet",
    "LinearAttention",
    "MemoryUpdateRule",
    "get",
    "names",
    "serialize",
]


def names():
    """Names that `get` knows."""
    return tuple(sorted(_BY_NAME))


def get(identifier):
    """Makes an update rule.

    Args:
        identifier: a name, a `MemoryUpdateRule`, or a rule's serialized config.

    Returns:
        A new rule, not bound to a layer. A rule that is given serves as a pattern.

    Raises:
        ValueError: if `identifier` is none of these.
    """
    if isinstance(identifier, str) and identifier in _BY_NAME:
        return _BY_NAME[identifier]()
    if isinstance(identifier, MemoryUpdateRule):
        return _deserialize(serialize(identifier), type(identifier))
    if isinstance(identifier, dict):
        return _deserialize(identifier)
    raise ValueError(
        f"`update_rule` must be one of {names()}, a MemoryUpdateRule or its config. "
        f"Received: update_rule={identifier!r}"
    )


def serialize(rule):
    """The config of a rule, for `get`: without weights, and as yet unbuilt."""
    config = keras.saving.serialize_keras_object(rule)
    # Whether it is built is up to its layer.
    return {name: x for name, x in config.items() if name != "build_config"}


def _deserialize(config, cls=None):
    config = {name: x for name, x in config.items() if name != "build_config"}
    custom_objects = {} if cls is None else {cls.__name__: cls}
    rule = keras.saving.deserialize_keras_object(config, custom_objects=custom_objects)
    if not isinstance(rule, MemoryUpdateRule):
        raise ValueError(
            "`update_rule` must be the config of a MemoryUpdateRule. "
            f"Received: {config!r}"
        )
    return rule
