"""The cases that implementations of a single token's operations are held to."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """Steps of a layer's memories, and how their inputs are drawn.

    Attributes:
        name: what differs from the other cases.
        steps: tokens, one after the other.
        B, M, H, K, V: sizes.
        decay: `"none"`, `"head"` or `"channel"`.
        write, erase_before_decay, read_before_update: as in the operation.
        beta: whether write strengths are given.
        dtype: of every input but weights, state and window.
        history: W, or None for no convolution.
        normalized: whether query and key are.
        activations: of query, key and value.
        shared_projections: whether all memories but the last share a projection set.
    """

    name: str
    steps: int = 5
    B: int = 2
    M: int = 3
    H: int = 2
    K: int = 16
    V: int = 16
    decay: str = "head"
    write: str = "delta"
    erase_before_decay: bool = False
    read_before_update: bool = False
    beta: bool = True
    dtype: str = "float32"
    history: int | None = 3
    normalized: tuple = (True, True)
    activations: tuple = ("silu", "silu", "silu")
    shared_projections: bool = False

    @property
    def rule(self):
        """The keyword arguments of the operation that are no tensors."""
        return {
            "write": self.write,
            "erase_before_decay": self.erase_before_decay,
            "read_before_update": self.read_before_update,
        }

    @property
    def set_of_memory(self):
        if self.shared_projections:
            return (*[0] * (self.M - 1), 1)
        return tuple(range(self.M))

    @property
    def how(self):
        """The keyword arguments of the convolution."""
        return {
            "activations": self.activations,
            "normalized": self.normalized,
            "heads": self.H,
            "set_of_memory": self.set_of_memory,
        }


STEP_CASES = (
    Case("none-additive", decay="none", write="additive", beta=False),
    Case("head-additive-read-before-update", write="additive", read_before_update=True),
    Case("channel-additive-no-beta", decay="channel", write="additive", beta=False),
    Case("none-delta", decay="none"),
    Case("head-delta", H=3, B=3),
    Case("channel-delta", decay="channel"),
    Case("head-delta-erase-before-decay", erase_before_decay=True),
    Case("channel-delta-erase-before-decay", decay="channel", erase_before_decay=True),
    Case("sizes-40-24", K=40, V=24),
    Case("sizes-5-37", K=5, V=37, decay="channel", M=1),
    Case("bfloat16", dtype="bfloat16", decay="channel"),
    Case("float16", dtype="float16"),
)

CONVOLUTION_CASES = (
    Case("normalized"),
    Case("shared-projections", shared_projections=True, normalized=(False, True)),
    Case("activations", activations=(None, "silu", None), normalized=(False, False)),
    Case("sizes-40-24", K=40, V=24, history=4),
    Case("sizes-5-37", K=5, V=37, history=1, M=1),
    Case("width-1", history=0, B=1),
    Case("no-convolution", history=None, activations=(None, None, None)),
    Case("bfloat16", dtype="bfloat16"),
    Case("float16", dtype="float16", history=2),
)


def make_tokens(case, seed=0):
    """Draws what the tokens of a case bring.

    Returns:
        A list of dicts of NumPy arrays, one a token: `query`, `key` and `value` as
        `memory_step` takes them, keys of length 1, `log_decay` and `beta` where the
        case has them, `weights`, `active`, and `projected`: query, key and value as
        `convolution_step` takes them.
    """
    random = np.random.default_rng(seed)
    rows, tokens = (case.B, case.M, case.H), []
    sets = max(case.set_of_memory) + 1
    for _ in range(case.steps):
        key = random.normal(size=(*rows, case.K))
        token = {
            "query": random.normal(size=(*rows, case.K)),
            "key": key / np.linalg.norm(key, axis=-1, keepdims=True),
            "value": random.normal(size=(*rows, case.V)),
            "weights": random.uniform(0.2, 1, rows[:2]),
            "active": random.uniform(size=rows[:2]) < 0.6,
            "projected": [
                random.normal(size=(case.B, case.H * case.K)),
                random.normal(size=(case.B, sets, case.H * case.K)),
                random.normal(size=(case.B, sets, case.H * case.V)),
            ],
        }
        if case.decay != "none":
            channels = (case.K,) if case.decay == "channel" else ()
            token["log_decay"] = -np.exp(random.uniform(-7, 1, (*rows, *channels)))
        if case.beta:
            token["beta"] = random.uniform(0, 1, rows)
        tokens.append(token)
    return tokens


def make_state(case, seed=1):
    """float64 state, convolution kernels and window; the last two may be None."""
    random = np.random.default_rng(seed)
    state = random.normal(size=(case.B, case.M, case.H, case.K, case.V))
    if case.history is None:
        return state, None, None
    widths = [case.H * width for width in (case.K, case.K, case.V)]
    kernels = [random.normal(size=(case.history + 1, width)) for width in widths]
    shape = (case.B, case.M, case.history, sum(widths))
    return state, kernels, random.normal(size=shape)
