"""The cases that implementations of the memory mixing are held to."""

from typing import NamedTuple

import ml_dtypes
import numpy as np


class Case(NamedTuple):
    """One call of the memory mixing, and how its inputs are drawn.

    Attributes:
        name: what differs from the other cases.
        B, T, R, H, V: sizes; R is the number of packed rows a batch row.
        k: routed memories a token.
        shared: whether each token has a row in a shared memory too.
        masked: share of the tokens that have no rows.
        gated: whether a gate is given.
        dtype: of outputs, gate and result.
    """

    name: str
    B: int = 2
    T: int = 19
    R: int = 70
    H: int = 2
    V: int = 16
    k: int = 2
    shared: bool = True
    masked: float = 0.0
    gated: bool = True
    dtype: str = "float32"

    @property
    def slots(self):
        """J, the rows of a token."""
        return self.k + self.shared


def make_inputs(case, seed=0):
    """Draws the tensor arguments of a case.

    Rows without a token hold NaN, as do the weights and the gate of masked tokens.

    Returns:
        A dict of NumPy arrays, by the names of the operation's arguments. A gate of
        None is left out.
    """
    random = np.random.default_rng(seed)
    dtype = ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype
    places = case.T * case.slots
    targets = np.stack([random.permutation(case.R)[:places] for _ in range(case.B)])
    targets = targets.reshape(case.B, case.T, case.slots).astype("int32")
    masked = random.uniform(size=(case.B, case.T)) < case.masked
    targets[masked] = -1
    outputs = random.normal(size=(case.B, case.R, case.H, case.V))
    for b in range(case.B):
        outputs[b, np.setdiff1d(np.arange(case.R), targets[b])] = np.nan
    weights = random.uniform(0.1, 1.0, size=(case.B, case.T, case.k))
    weights[masked] = np.nan
    inputs = {
        "outputs": outputs.astype(dtype),
        "weights": weights.astype("float32"),
        "targets": targets,
        "scale": random.uniform(0.5, 1.5, size=case.V).astype("float32"),
    }
    if case.gated:
        gate = random.normal(size=(case.B, case.T, case.H * case.V))
        gate[masked] = np.nan
        inputs["gate"] = gate.astype(dtype)
    return inputs


CASES = (
    Case("plain"),
    Case("no-shared-memory", shared=False, masked=0.3),
    Case("no-gate", gated=False, masked=0.3),
    Case("masked", masked=0.5),
    Case("all-masked-but-few", masked=0.95),
    Case("odd-sizes", B=3, T=7, R=40, H=3, V=20, masked=0.2),
    # Without a shared memory, the norm would leave nothing of the weight's gradient.
    Case("one-memory", T=33, k=1, H=1, V=7),
    Case("many-memories", T=5, k=6, H=5, V=24),
    # More heads than a program takes at a time.
    Case("many-heads", B=1, T=3, R=12, H=20, V=130),
    Case("wide-heads", B=1, T=3, R=12, H=3, V=500),
    Case("bfloat16", masked=0.2, dtype="bfloat16"),
    Case("bfloat16-no-gate", gated=False, V=40, dtype="bfloat16"),
    Case("float16", masked=0.2, dtype="float16"),
)

# What is timed.
BENCHMARK = Case("mom", B=8, T=2048, R=6656, H=8, V=128, dtype="bfloat16")
