"""The kernels of a single token against the recurrence, without Keras.

In the interpreter, or on a GPU where there is one.
"""

import numpy as np
import pytest
import torch

from keras_mom_kernels.memory_scan.reference import memory_scan
from keras_mom_kernels.memory_step import reference
from keras_mom_kernels.memory_step.shapes import (
    CONVOLUTION_CASES,
    STEP_CASES,
    Case,
    make_state,
    make_tokens,
)

pytest.importorskip("triton")

from keras_mom_kernels.memory_step.torch import (  # noqa: E402
    convolution_step,
    memory_step,
    spread_routing,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}
ROWS = ("query", "key", "value", "log_decay", "beta")


def tensor(x, dtype="float32"):
    if x is None:
        return None
    if x.dtype == bool:
        return torch.tensor(x, device=DEVICE)
    return torch.tensor(x, device=DEVICE, dtype=getattr(torch, dtype))


def step_tensors(case, token):
    """A token's arguments of `memory_step`, rounded to the case's dtype."""
    names = [x for x in token if x != "projected"]
    return {
        name: tensor(token[name], case.dtype if name in ROWS else "float32")
        for name in names
    }


def exact(tensors):
    """As NumPy takes them, in float64."""
    return {
        name: x.cpu().numpy() if x.dtype == torch.bool else x.double().cpu().numpy()
        for name, x in tensors.items()
    }


def error(actual, expected):
    actual, expected = actual.double().cpu().numpy(), np.asarray(expected)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-300)


@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case.name)
def test_steps_are_those_of_the_recurrence(case):
    state = make_state(case)[0]
    actual = tensor(state)
    expected = actual.double().cpu().numpy()
    for token in make_tokens(case):
        tensors = step_tensors(case, token)
        output, actual = memory_step(**tensors, state=actual, **case.rule)
        mixed, expected = reference.memory_step(
            **exact(tensors), state=expected, **case.rule
        )
        assert output.dtype == actual.dtype == torch.float32
        assert error(output, mixed) <= TOLERANCES[case.dtype]
        assert error(actual, expected) <= TOLERANCES[case.dtype]


@pytest.mark.parametrize("case", STEP_CASES[3:8], ids=lambda case: case.name)
def test_steps_of_a_memory_are_a_scan_over_its_tokens(case):
    """Token by token equals the memory scan's own reference over each memory's rows."""
    state = make_state(case)[0]
    tokens, actual, outputs = make_tokens(case), tensor(state), []
    for token in tokens:
        tensors = step_tensors(case, token)
        output, actual = memory_step(**tensors, state=actual, **case.rule)
        outputs.append(output)
    expected = np.zeros((len(tokens), case.B, case.H, case.V))
    state = tensor(state).double().cpu().numpy()
    for b, m in np.ndindex(case.B, case.M):
        taken = [t for t, token in enumerate(tokens) if token["active"][b, m]]
        rows = {
            name: np.stack([exact(step_tensors(case, x))[name][b, m] for x in tokens])
            for name in ROWS
            if name in tokens[0]
        }
        read, state[b, m] = (
            x[0]
            for x in memory_scan(
                **{name: x[taken][None] for name, x in rows.items()},
                write=case.write,
                erase_before_decay=case.erase_before_decay,
                initial_state=state[b, m][None],
            )
        )
        for t, row in zip(taken, read):
            expected[t, b] += tokens[t]["weights"][b, m].astype("float32") * row
    assert error(torch.stack(outputs), expected) <= 1e-5
    assert error(actual, state) <= 1e-5


@pytest.mark.parametrize("case", CONVOLUTION_CASES, ids=lambda case: case.name)
def test_windows_and_rows_are_those_of_the_convolution(case):
    _, kernels, window = make_state(case)
    actual = tensor(window)
    expected = None if window is None else actual.double().cpu().numpy()
    if kernels is not None:
        kernels = [tensor(x, case.dtype) for x in kernels]
    for token in make_tokens(case)[:3]:
        active = tensor(token["active"])
        inputs = [tensor(x, case.dtype) for x in token["projected"]]
        *rows, actual = convolution_step(*inputs, kernels, actual, active, **case.how)
        *exact_rows, expected = reference.convolution_step(
            *(x.double().cpu().numpy() for x in inputs),
            None if kernels is None else [x.double().cpu().numpy() for x in kernels],
            expected,
            token["active"],
            **case.how,
        )
        for x, y in zip(rows, exact_rows):
            assert x.dtype == inputs[0].dtype
            assert error(x, y) <= TOLERANCES[case.dtype]
        if window is None:
            assert actual is None
        else:
            # Nothing is computed on the way into a window.
            np.testing.assert_array_equal(actual.cpu(), expected.astype("float32"))


@pytest.mark.parametrize(
    "memories, shared, masked", ((4, True, True), (9, False, False), (17, True, False))
)
def test_routing_by_memory(memories, shared, masked):
    random = np.random.default_rng(0)
    scores = random.uniform(size=(3, memories)).astype("float32")
    indices = np.argsort(scores)[:, :2].astype("int32")
    weights, mask = np.take_along_axis(scores, indices, 1), None
    if masked:
        mask = np.array([True, False, True])
    how = {"num_memories": memories, "shared": shared}
    expected = reference.spread_routing(weights, indices, mask, **how)
    actual = spread_routing(
        tensor(weights), torch.tensor(indices, device=DEVICE), tensor(mask), **how
    )
    for x, y in zip(actual, expected):
        np.testing.assert_array_equal(x.cpu().numpy(), y)


@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("decay", ("none", "head", "channel"))
def test_inactive_memories_are_neither_read_nor_changed(decay, in_place):
    case = Case("", K=20, V=18, decay=decay)
    token = make_tokens(case)[0]
    token["active"] = np.array([[True, False, True], [False, False, False]])
    state = make_state(case)[0]
    clean, _ = memory_step(**step_tensors(case, token), state=tensor(state))
    for x in (token[name] for name in (*ROWS, "weights") if name in token):
        x[~token["active"]] = np.nan
    state[~token["active"]] = np.nan
    # What arithmetic would turn into 0.
    state[1, 0] = -0.0
    before = tensor(state)
    output, after = memory_step(
        **step_tensors(case, token), state=before.clone(), in_place=in_place
    )
    assert torch.equal(output, clean)
    assert (output[1] == 0).all()
    idle = ~token["active"]
    bits = [x.view(torch.int32).cpu().numpy() for x in (before, after)]
    assert np.array_equal(bits[0][idle], bits[1][idle])
    assert np.isfinite(after.cpu().numpy()[~idle]).all()


def test_inactive_windows_and_rows():
    case = Case("", K=20, V=18)
    _, kernels, window = make_state(case)
    token = make_tokens(case)[0]
    token["active"] = np.array([[True, False, True], [False, False, False]])
    idle = ~token["active"]
    for x in token["projected"][1:]:
        x[idle] = np.nan
    window[idle] = np.nan
    before = tensor(window)
    before.view(torch.int32)[1] += 3  # Other NaNs.
    *rows, after = convolution_step(
        *map(tensor, token["projected"]),
        [tensor(x) for x in kernels],
        before,
        tensor(token["active"]),
        **case.how,
    )
    for x in rows:
        x = x.cpu().numpy()
        assert np.isfinite(x).all() and (x[idle] == 0).all() and x[~idle].any()
    bits = [x.view(torch.int32).cpu().numpy() for x in (before, after)]
    assert np.array_equal(bits[0][idle], bits[1][idle])
    assert np.isfinite(after.cpu().numpy()[~idle]).all()


@pytest.mark.parametrize("case", STEP_CASES[1:8:3], ids=lambda case: case.name)
def test_in_place_equals_functional(case):
    token = make_tokens(case)[0]
    tensors = step_tensors(case, token)
    state = tensor(make_state(case)[0])
    before = state.clone()
    output, after = memory_step(**tensors, state=state, **case.rule)
    assert torch.equal(state, before)
    tensors["active"] = tensors["active"].to(torch.int32)
    same, given = memory_step(**tensors, state=state, **case.rule, in_place=True)
    assert given is state
    assert torch.equal(same, output) and torch.equal(state, after)


@pytest.mark.parametrize("history", (1, 3, 6))
def test_a_window_in_place_equals_a_new_one(history):
    case = Case("", K=20, V=150, history=history)
    token, (_, kernels, window) = make_tokens(case)[0], make_state(case)
    token["active"] = np.array([[True, False, True], [False, False, False]])
    rows = [tensor(x) for x in token["projected"]]
    kernels, window = [tensor(x) for x in kernels], tensor(window)
    before, active = window.clone(), tensor(token["active"])
    new = convolution_step(*rows, kernels, window, active, **case.how)
    assert torch.equal(window, before)
    same = convolution_step(*rows, kernels, window, active, **case.how, in_place=True)
    assert same[3] is window
    assert all(map(torch.equal, same, new))


def test_batch_rows_and_runs_do_not_matter():
    case = Case("", B=3)
    token, (state, kernels, window) = make_tokens(case)[0], make_state(case)
    token["active"] |= True
    tensors = {**step_tensors(case, token), "state": tensor(state)}
    first, again = memory_step(**tensors), memory_step(**tensors)
    alone = memory_step(**{name: x[1:2] for name, x in tensors.items()})
    rows = [tensor(x) for x in token["projected"]]
    others = [tensor(window), tensors["active"]]
    kernels = [tensor(x) for x in kernels]
    convolved = convolution_step(*rows, kernels, *others, **case.how)
    one = convolution_step(
        *(x[1:2] for x in rows), kernels, *(x[1:2] for x in others), **case.how
    )
    for x, y in zip((*first, *convolved), (*alone, *one)):
        assert torch.equal(x[1:2], y)
    assert all(map(torch.equal, first, again))


def test_the_operators_keep_their_promises_to_torch():
    case = Case("", B=1, H=1, M=2)
    token, (state, kernels, window) = make_tokens(case)[0], make_state(case)
    x = step_tensors(case, token)
    active = x["active"].to(torch.int32)
    arguments = [*(x[name] for name in ROWS), x["weights"], active, tensor(state)]
    options = ("delta", False, False, 0.25)
    operators = torch.ops.keras_mom_kernels
    for operator in (operators.memory_step, operators.memory_step_in_place):
        torch.library.opcheck(operator.default, (*arguments, *options))
    inputs = [tensor(x) for x in (*token["projected"], *kernels, window)]
    how = ([True, True, False], [True, False], 1, [0, 1], 1e-6)
    for operator in (operators.convolution_step, operators.convolution_step_in_place):
        torch.library.opcheck(operator.default, (*inputs, active, *how))
    routing = (torch.ones(1, 1, device=DEVICE), active[:, :1], None, 2, True)
    torch.library.opcheck(operators.spread_routing.default, routing)


def test_what_no_kernel_serves_is_named():
    case = Case("", B=1)
    token, (state, kernels, window) = make_tokens(case)[0], make_state(case)
    tensors, state = step_tensors(case, token), tensor(state)
    with pytest.raises(NotImplementedError, match="float32 state"):
        memory_step(**tensors, state=state.double())
    with pytest.raises(NotImplementedError, match="contiguous"):
        swapped = state.swapaxes(-1, -2)
        memory_step(**tensors, state=swapped, in_place=True)
    with pytest.raises(NotImplementedError, match="window .* contiguous"):
        rows, swapped = map(tensor, token["projected"]), tensor(window).swapaxes(-1, -2)
        others = (swapped.contiguous().swapaxes(-1, -2), tensors["active"])
        weights = [tensor(x) for x in kernels]
        convolution_step(*rows, weights, *others, **case.how, in_place=True)
    needed = state.requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient"):
        memory_step(**tensors, state=needed)
    with torch.no_grad():
        memory_step(**tensors, state=needed)
    inputs = [tensor(x) for x in token["projected"]]
    kernels = [tensor(x).requires_grad_() for x in kernels]
    others = (tensor(window), tensors["active"])
    with pytest.raises(NotImplementedError, match="no gradient"):
        convolution_step(*inputs, kernels, *others, **case.how)
    with pytest.raises(ValueError, match="together"):
        convolution_step(*inputs, None, *others, **case.how)
