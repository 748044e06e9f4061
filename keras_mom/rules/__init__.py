"""Memory update rules."""

import keras

from keras_mom.rules.base import MemoryUpdateRule
from keras_mom.rules.delta_net import DeltaNet
from keras_mom.rules.fixed_decay import Lightning, RetNet
from keras_mom.rules.gated_delta_net import GatedDeltaNet
from keras_mom.rules.gla import GLA
from keras_mom.rules.gsa import GSA
from keras_mom.rules.hgrn2 import HGRN2
from keras_mom.rules.kda import KDA
from keras_mom.rules.linear_attention import LinearAttention
from keras_mom.rules.mamba2 import Mamba2
from keras_mom.rules.rwkv6 import RWKV6
from keras_mom.rules.rwkv7 import RWKV7
from keras_mom.rules.titans import Titans
from keras_mom.rules.ttt import TTT

_BY_NAME = {
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "gla": GLA,
    "gsa": GSA,
    "hgrn2": HGRN2,
    "kda": KDA,
    "lightning": Lightning,
    "linear_attention": LinearAttention,
    "mamba2": Mamba2,
    "retention": RetNet,
    "rwkv6": RWKV6,
    "rwkv7": RWKV7,
    "titans": Titans,
    "ttt": TTT,
}

__all__ = [
    "GLA",
    "GSA",
    "HGRN2",
    "KDA",
    "RWKV6",
    "RWKV7",
    "TTT",
    "DeltaNet",
    "GatedDeltaNet",
    "Lightning",
    "LinearAttention",
    "Mamba2",
    "MemoryUpdateRule",
    "RetNet",
    "Titans",
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
