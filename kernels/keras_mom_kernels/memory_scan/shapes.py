"""The cases that every implementation of the memory scan is held to."""

from typing import NamedTuple

import ml_dtypes
import numpy as np

# Packed sequences around a chunk of 64 rows, empty ones first, in the middle and
# last, and 9 rows behind them all.
PACKED = (0, 0, 1, 64, 128, 128, 193, 198, 198)
PACKED_ROWS = 207


class Case(NamedTuple):
    """One call of the memory scan, and how its inputs are drawn.

    Attributes:
        name: what differs from the other cases.
        B, T, H, K, V: sizes.
        decay: `"none"`, `"head"`, `"channel"` (of the key) or `"value"` (channel).
        write: `"delta"` or `"additive"`.
        erase_before_decay: as in the operation.
        cu_seqlens: borders of packed sequences, or None.
        initial_state: whether one is given.
        correlation: mean inner product of two keys of a sequence, 0 to 1.
        key_norm: length of every key.
        lowest_log_decay: log decays lie between it and 0, evenly in their logarithm.
        log_decays: what log decays are drawn from instead.
        beta: range of the write strength, or None for an argument of None.
        betas: what write strengths are drawn from instead.
        dtype: of every input but the state.
    """

    name: str
    B: int = 2
    T: int = 130
    H: int = 2
    K: int = 24
    V: int = 40
    decay: str = "head"
    write: str = "delta"
    erase_before_decay: bool = False
    cu_seqlens: tuple | None = None
    initial_state: bool = True
    correlation: float = 0.0
    key_norm: float = 1.0
    lowest_log_decay: float = -3.0
    log_decays: tuple = ()
    beta: tuple | None = (0.0, 1.0)
    betas: tuple = ()
    dtype: str = "float32"

    @property
    def rule(self):
        """The recurrence: decay, write, erase_before_decay."""
        return self.decay, self.write, self.erase_before_decay

    @property
    def sequences(self):
        return self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1


def make_inputs(case, seed=0):
    """Draws the tensor arguments of a case.

    Returns:
        A dict of NumPy arrays, by the names of the operation's arguments. Arguments
        that are None are left out.
    """
    random = np.random.default_rng(seed)
    rows = (case.B, case.T, case.H)
    inputs = {
        "query": _unit(random.normal(size=(*rows, case.K))) * case.K**0.5,
        "key": _keys(random, case),
        "value": random.normal(size=(*rows, case.V)),
    }
    if case.decay != "none":
        channels = {"head": (), "channel": (case.K,), "value": (case.V,)}
        shape = (*rows, *channels[case.decay])
        if case.log_decays:
            inputs["log_decay"] = random.choice(case.log_decays, size=shape)
        else:
            low, high = np.log(1e-3), np.log(-case.lowest_log_decay)
            inputs["log_decay"] = -np.exp(random.uniform(low, high, shape))
    if case.betas:
        inputs["beta"] = random.choice(case.betas, size=rows)
    elif case.beta is not None:
        inputs["beta"] = random.uniform(*case.beta, size=rows)
    dtype = ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype
    inputs = {name: array.astype(dtype) for name, array in inputs.items()}
    if case.initial_state:
        state = random.normal(size=(case.sequences, case.H, case.K, case.V))
        inputs["initial_state"] = state.astype("float32")
    if case.cu_seqlens is not None:
        inputs["cu_seqlens"] = np.asarray(case.cu_seqlens, "int32")
    return inputs


def _keys(random, case):
    """Keys that share a direction: two of them have `correlation` in the mean."""
    shared = _unit(random.normal(size=(case.B, 1, case.H, case.K)))
    own = _unit(random.normal(size=(case.B, case.T, case.H, case.K)))
    mixed = case.correlation**0.5 * shared + (1 - case.correlation) ** 0.5 * own
    return case.key_norm * _unit(mixed)


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


RULES = tuple(
    (decay, *write)
    for decay in ("none", "head", "channel")
    for write in (("additive", False), ("delta", False), ("delta", True))
) + (("value", "additive", False),)


def rule_name(rule):
    decay, write, erase_before_decay = rule
    return f"{decay}-{write}" + ("-erase-before-decay" if erase_before_decay else "")


def _of(rule, name, **changes):
    decay, write, erase_before_decay = rule
    return Case(
        name=f"{rule_name(rule)}-{name}",
        decay=decay,
        write=write,
        erase_before_decay=erase_before_decay,
        **changes,
    )


_PACKING = {"cu_seqlens": PACKED, "B": 1, "T": PACKED_ROWS}

# Neighbours share shapes, and so what a compiler makes of them.

# Every recurrence, as rows of a batch and packed, with a state and without one.
RULE_CASES = tuple(
    _of(rule, "packed" if packing else "batch", **packing, initial_state=bool(packing))
    for rule in RULES
    for packing in ({}, _PACKING)
) + tuple(
    _of(
        rule,
        "batch-state" if not packing else "packed-no-state",
        **packing,
        initial_state=not packing,
    )
    for rule in (("none", "additive", False), ("head", "delta", False))
    for packing in ({}, _PACKING)
)

# Keys that say almost the same at each step: what a chunk's solve has to bear.
_SOLVE = {"beta": (1.0, 1.0), "initial_state": False}
KEY_CASES = tuple(
    _of(("none", "delta", False), f"correlation-{rho}", correlation=rho, **_SOLVE)
    for rho in (0.0, 0.5, 0.9, 0.99)
) + tuple(
    _of((decay, "additive", False), "key-norm-10", key_norm=10.0, initial_state=False)
    for decay in ("none", "head", "channel")
)

# Decays from 0 to 1. The state of some cases fades, that of others stays for good.
DECAY_CASES = tuple(
    _of(rule, name, initial_state=False, log_decays=values)
    for rule in RULES
    if rule[0] != "none"
    for name, values in (
        ("decay-1", (0.0,)),
        ("decay-exp-20", (-20.0,)),
        ("decay-mixed", (-20.0, -0.001)),
        ("decay-0-and-1", (-np.inf, 0.0)),
    )
)

# Write strengths: nothing, a replacement, a reflection.
BETA_CASES = (
    *(
        _of(rule, name, initial_state=False, betas=values)
        for rule in (("head", "additive", False), ("head", "delta", False))
        for name, values in (
            ("beta-0-1-2", (0.0, 1.0, 2.0)),
            ("beta-0", (0.0,)),
            ("beta-2", (2.0,)),
        )
    ),
    _of(("head", "delta", False), "beta-none", initial_state=False, beta=None),
    _of(("none", "additive", False), "beta-none", initial_state=False, beta=None),
)

# Lengths around a chunk and of many; sizes that are no powers of two, and that are.
SIZE_CASES = (
    *(
        _of(rule, "length-1100", B=1, T=1100, H=1, K=8, V=8)
        for rule in (
            ("none", "additive", False),
            ("head", "delta", False),
            ("channel", "delta", True),
        )
    ),
    *(
        _of(("head", "delta", False), f"length-{length}", T=length)
        for length in (1, 2, 7, 64, 65)
    ),
    _of(("channel", "delta", True), "length-1", T=1),
    _of(("channel", "delta", True), "length-7", T=7),
    _of(("channel", "additive", False), "length-2", T=2),
    _of(("head", "delta", False), "sizes-40-24", T=7, H=3, K=40, V=24),
    _of(("head", "delta", False), "sizes-16-16", T=7, B=1, H=1, K=16, V=16),
    _of(("head", "delta", False), "sizes-1-1", T=7, B=1, H=1, K=1, V=1),
)

LOW_PRECISION_CASES = tuple(
    _of(rule, dtype, dtype=dtype)
    for dtype in ("bfloat16", "float16")
    for rule in (("head", "delta", False), ("none", "additive", False))
) + (
    _of(("channel", "delta", True), "bfloat16", T=7, dtype="bfloat16"),
    _of(("head", "delta", False), "bfloat16-packed", dtype="bfloat16", **_PACKING),
)

CASES = (
    *RULE_CASES,
    *KEY_CASES,
    *DECAY_CASES,
    *BETA_CASES,
    *SIZE_CASES,
    *LOW_PRECISION_CASES,
)
