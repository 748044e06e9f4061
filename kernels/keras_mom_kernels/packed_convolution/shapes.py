"""Cases of the packed convolution, which every implementation is held to."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """Sizes and options of a call.

    Attributes:
        name: of the case.
        B, T, M, k: batch rows, tokens, memories, memories of each token.
        E: channels.
        shared_projection: whether all memories take a token's one row of the inputs,
            as a query's, or each its own.
        taps: W + 1, or 0 for no convolution.
        activation: `"silu"` or None.
        heads: heads to normalize, or None.
        documents: documents of each batch row; 1 gives None.
        windows: whether a window of W rows stands before each memory's first token.
        chunk: rows that each memory's region is a multiple of.
        dtype: of inputs and kernel.
    """

    name: str
    B: int = 2
    T: int = 21
    M: int = 3
    k: int = 2
    E: int = 24
    shared_projection: bool = False
    taps: int = 4
    activation: str | None = "silu"
    heads: int | None = None
    documents: int = 1
    windows: bool = False
    chunk: int = 8
    dtype: str = "float32"


def make_inputs(case, seed=0):
    """Draws the arguments of a case.

    Tokens fill each memory's region in time order, behind W rows of history. Rows of
    the inputs that no packed row takes are not a number.

    Returns:
        A dict of NumPy arrays, float64 and int32; arguments of None are left out.
    """
    random = np.random.default_rng(seed)
    history = max(case.taps - 1, 0)
    sets = 1 if case.shared_projection else case.M
    tokens = case.T * sets
    length = tokens + case.windows * case.M * history
    most = history + case.chunk - 1
    rows = (case.T * case.k + case.M * most) // case.chunk * case.chunk
    slots = case.k if case.shared_projection else 1
    source = np.full((case.B, rows), -1, "int32")
    targets = np.full((case.B, length, slots), -1, "int32")
    documents = np.zeros((case.B, rows), "int32")
    number = np.sort(random.integers(0, case.documents, (case.B, case.T)), axis=1)
    for b in range(case.B):
        chosen = np.argsort(random.random((case.T, case.M)), axis=1)[:, : case.k]
        first = 0
        for m in range(case.M):
            row = first + history
            if case.windows:
                window = tokens + m * history + np.arange(history)
                source[b, first:row] = window
                targets[b, window, 0] = np.arange(first, row)
            for t in range(case.T):
                if m in chosen[t]:
                    taken = t * sets + (0 if case.shared_projection else m)
                    source[b, row] = taken
                    free = list(targets[b, taken]).index(-1)
                    targets[b, taken, free] = row
                    documents[b, row] = number[b, t]
                    row += 1
            first = -(-row // case.chunk) * case.chunk
    inputs = random.normal(size=(case.B, length, case.E))
    inputs[(targets < 0).all(axis=-1)] = np.nan
    arguments = {"inputs": inputs, "source": source, "targets": targets}
    if case.taps:
        arguments["kernel"] = random.normal(size=(case.taps, case.E)) * 0.5
    if case.documents > 1:
        arguments["documents"] = documents
    return arguments


CASES = (
    Case("keys", windows=True, heads=2),
    Case("queries", shared_projection=True, heads=2),
    Case("values", E=40, windows=True),
    Case("documents", documents=4, windows=True, heads=3),
    Case("documents-of-queries", documents=3, shared_projection=True),
    Case("no-convolution", taps=0, activation=None, heads=2),
    Case("rows-alone", taps=0, activation=None, shared_projection=True),
    Case("no-activation", activation=None, taps=2),
    Case("one-tap", taps=1, heads=1),
    Case("one-token", T=1, B=1),
    Case("many-rows", B=1, T=150, E=16, heads=2),
    Case("wide", B=1, T=9, E=160),
    Case("bfloat16", T=60, E=32, heads=2, dtype="bfloat16"),
    Case("bfloat16-values", T=60, E=20, documents=3, dtype="bfloat16"),
    Case("bfloat16-queries", T=60, shared_projection=True, dtype="bfloat16"),
    Case("float16", T=60, E=32, heads=2, dtype="float16"),
)
