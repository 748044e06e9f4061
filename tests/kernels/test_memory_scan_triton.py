"""The memory scan's Triton kernels against the recurrence, without Keras.

In the interpreter, or on a GPU where there is one.
"""

import numpy as np
import pytest
import torch

from keras_mom_kernels.memory_scan import reference
from keras_mom_kernels.memory_scan.shapes import CASES, Case, make_inputs

pytest.importorskip("triton")

from keras_mom_kernels.memory_scan import torch_splits  # noqa: E402
from keras_mom_kernels.memory_scan.configurations import split_length  # noqa: E402
from keras_mom_kernels.memory_scan.torch import memory_scan  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {
    "float32": (1e-5, 1e-4),
    "bfloat16": (5e-3, 1e-2),
    "float16": (5e-3, 1e-2),
}
DIFFERENTIABLE = ("query", "key", "value", "log_decay", "beta", "initial_state")

# Each recurrence once, and once each what differs in layout, size or dtype.
NAMES = (
    "none-additive-batch",
    "head-delta-packed",
    "channel-delta-erase-before-decay-batch",
    "head-delta-erase-before-decay-decay-mixed",
    "channel-additive-decay-exp-20",
    "head-delta-decay-0-and-1",
    "none-delta-correlation-0.99",
    "head-delta-length-1",
    "head-delta-sizes-40-24",
    "head-delta-bfloat16",
    "head-delta-float16",
)


def _small(case):
    """The case with less work for the interpreter: two chunks, or a few packed ones."""
    sizes = dict(B=1, H=1, K=min(case.K, 20), V=min(case.V, 18))
    if case.cu_seqlens is not None:
        return case._replace(cu_seqlens=(0, 0, 1, 65, 70, 70), T=72, **sizes)
    return case._replace(T=min(case.T, 67), **sizes)


SOME = [_small(case) for case in CASES if case.name in NAMES]
assert len(SOME) == len(NAMES)


def tensors_of(case):
    """The inputs of a case, rounded to its dtype, on the device."""
    tensors = {}
    for name, array in make_inputs(case).items():
        integer = name == "cu_seqlens"
        tensor = torch.tensor(array if integer else array.astype("float32"))
        if not integer and name != "initial_state":
            tensor = tensor.to(getattr(torch, case.dtype))
        tensors[name] = tensor.to(DEVICE)
    return tensors


def with_gradients(function, tensors, cotangents, **options):
    """Output and state, and the gradients by name."""
    leaves = {
        name: x.detach().requires_grad_() if name in DIFFERENTIABLE else x
        for name, x in tensors.items()
    }
    results = function(**leaves, **options)
    torch.autograd.backward(results, [x.to(y) for x, y in zip(cotangents, results)])
    gradients = {name: leaves[name].grad for name in leaves if name in DIFFERENTIABLE}
    return [x.detach() for x in results], gradients


def error(actual, expected):
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm().clamp(1e-300)).item()


def assert_agree(
    tensors, dtype, write, erase_before_decay, function=memory_scan, **how
):
    rule = {"write": write, "erase_before_decay": erase_before_decay}
    shape = [*tensors["value"].shape]
    states = shape[0]
    if "cu_seqlens" in tensors:
        states = len(tensors["cu_seqlens"]) - 1
    random = torch.Generator().manual_seed(0)
    state = (states, shape[2], tensors["key"].shape[-1], shape[3])
    cotangents = [
        torch.randn(x, generator=random).to(tensors["value"].dtype).to(DEVICE)
        for x in (shape, state)
    ]
    actual = with_gradients(function, tensors, cotangents, **rule, **how)
    exact = {
        name: (x if name == "cu_seqlens" else x.double()).cpu()
        for name, x in tensors.items()
    }
    expected = with_gradients(
        lambda **x: reference.memory_scan(**x, xp=torch), exact, cotangents, **rule
    )
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    for name, x, y in zip(("output", "state"), actual[0], expected[0]):
        assert error(x, y) <= value_tolerance, (name, error(x, y))
    for name, y in expected[1].items():
        found = error(actual[1][name], y)
        assert found <= gradient_tolerance, (name, found)


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_the_recurrence(case):
    assert_agree(tensors_of(case), case.dtype, case.write, case.erase_before_decay)


@pytest.mark.parametrize(
    "correlation, decay, lowest, initial_state",
    # Without a state gradients are sums that nearly cancel, and with a decay a channel
    # keys are rounded once more.
    (
        (0.5, "head", -0.3, True),
        (0.99, "head", -0.3, True),
        (0.99, "none", 0.0, False),
        (0.99, "channel", -0.05, False),
    ),
)
def test_correlated_keys_in_bfloat16(correlation, decay, lowest, initial_state):
    case = Case("", B=1, T=128, H=1, K=64, V=16, correlation=correlation, decay=decay)
    case = case._replace(dtype="bfloat16", lowest_log_decay=lowest)
    case = case._replace(initial_state=initial_state)
    assert_agree(tensors_of(case), case.dtype, case.write, case.erase_before_decay)


@pytest.mark.parametrize("decay", ("head", "channel"))
def test_aligned_segments_and_resets(decay):
    # 2 batch rows of 2 chunks of 16 rows: segments of 1, 0 and 1, and of 2, 0 and 0.
    offsets = torch.tensor([[0, 1, 1, 2], [0, 2, 2, 2]], dtype=torch.int32)
    starts = {0: (0, 9, 30), 1: (16, 19)}
    case = Case("", T=32, H=1, K=16, V=16, decay=decay, initial_state=False)
    tensors = tensors_of(case)
    resets = torch.zeros((2, 32), dtype=torch.int32)
    for row, places in starts.items():
        resets[row, list(places)] = 1
    # The same rows one after the other; a reset begins a sequence of its own.
    borders = {0, 64}
    for row in range(2):
        borders |= {32 * row + 16 * int(chunk) for chunk in offsets[row]}
        borders |= {32 * row + place for place in starts[row]}
    sequences = torch.tensor(sorted(borders), dtype=torch.int32, device=DEVICE)

    def results(**how):
        leaf = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        inputs = leaf
        if "cu_seqlens" in how:
            inputs = {n: x.reshape(1, 64, *x.shape[2:]) for n, x in leaf.items()}
        result, _ = memory_scan(**inputs, **how)
        (
            result.reshape(2, 32, 1, 16) * torch.arange(16.0, device=DEVICE)
        ).sum().backward()
        return result.detach(), {name: x.grad for name, x in leaf.items()}

    output, aligned = results(
        chunk_offsets=offsets.to(DEVICE), chunk_size=16, resets=resets.to(DEVICE)
    )
    expected, gradients = results(cu_seqlens=sequences)
    assert error(output.reshape(expected.shape), expected) <= 1e-6
    for name, y in gradients.items():
        assert error(aligned[name], y) <= 1e-5, name


def test_states_of_aligned_segments():
    offsets = torch.tensor([[0, 1, 1, 3]], dtype=torch.int32, device=DEVICE)
    case = Case("", B=1, T=192, H=1, K=16, V=16, initial_state=False)
    tensors = tensors_of(case)
    initial = torch.randn(1, 3, 1, 16, 16, device=DEVICE, requires_grad=True)
    _, states = memory_scan(**tensors, initial_state=initial, chunk_offsets=offsets)
    assert states.shape == initial.shape
    assert torch.equal(states[:, 1], initial[:, 1])
    states[:, 1].sum().backward()
    expected = torch.zeros_like(initial)
    expected[:, 1] = 1
    assert torch.equal(initial.grad, expected)


@pytest.mark.parametrize(
    "decay, erase_before_decay", (("head", False), ("channel", True))
)
def test_splits_of_packed_sequences(monkeypatch, decay, erase_before_decay):
    case = Case("", B=1, T=204, H=1, K=20, V=18, cu_seqlens=(0, 0, 1, 195, 200))
    case = case._replace(decay=decay, erase_before_decay=erase_before_decay)
    monkeypatch.setattr(torch_splits, "split_length", lambda *shapes: 2)
    assert_agree(tensors_of(case), case.dtype, case.write, case.erase_before_decay)


def test_splits_of_aligned_segments_and_resets(monkeypatch):
    # 2 batch rows of 7 chunks of 16 rows: segments of 5, 0 and 2, and of 1, 6 and 0.
    offsets = torch.tensor([[0, 5, 5, 7], [0, 1, 7, 7]], dtype=torch.int32)
    case = Case("", T=112, H=1, K=16, V=16, initial_state=False)
    tensors = tensors_of(case)
    tensors["initial_state"] = torch.randn(2, 3, 1, 16, 16, device=DEVICE)
    resets = torch.zeros((2, 112), dtype=torch.int32, device=DEVICE)
    resets[0, 40] = resets[1, 20] = 1
    how = dict(chunk_offsets=offsets.to(DEVICE), chunk_size=16, resets=resets)
    shapes = tensors["value"], tensors["initial_state"]
    cotangents = [torch.randn_like(x) for x in shapes]
    whole = with_gradients(memory_scan, tensors, cotangents, **how)
    monkeypatch.setattr(torch_splits, "split_length", lambda *shapes: 2)
    cut = with_gradients(memory_scan, tensors, cotangents, **how)
    for x, y in zip(cut[0], whole[0]):
        assert 0 < error(x, y) <= 1e-6
    for name, y in whole[1].items():
        assert error(cut[1][name], y) <= 1e-5, name


def test_what_is_split_is_long_and_few():
    assert split_length(chunks=512, segments=1, programs=16) == 32
    assert split_length(chunks=512, segments=32, programs=16) is None
    assert split_length(chunks=15, segments=1, programs=16) is None


def test_batch_rows_and_runs_do_not_matter():
    case = Case("", T=70, H=1, K=16, V=16)
    tensors = tensors_of(case)
    output, state = memory_scan(**tensors)
    again, _ = memory_scan(**tensors)
    alone, alone_state = memory_scan(**{name: x[1:] for name, x in tensors.items()})
    assert torch.equal(output, again)
    assert torch.equal(output[1:], alone) and torch.equal(state[1:], alone_state)


@pytest.mark.parametrize("packed", (False, True))
def test_the_operators_keep_their_promises_to_torch(packed):
    sizes = {"T": 5, "H": 1, "K": 16, "V": 16}
    case = Case("", B=1, cu_seqlens=(0, 2, 5) if packed else None, **sizes)
    tensors = tensors_of(case)
    arguments = [tensors[x] for x in ("query", "key", "value", "log_decay", "beta")]
    arguments += [tensors.get("cu_seqlens"), None, None, tensors["initial_state"]]
    for x in arguments:
        if x is not None and x.is_floating_point():
            x.requires_grad_()
    options = ("delta", False, 0.25, 64)
    operator = torch.ops.keras_mom_kernels.memory_scan.default
    torch.library.opcheck(operator, (*arguments, *options))


def test_what_no_kernel_serves_is_named():
    tensors = tensors_of(Case("", T=2, H=1, K=16, V=16, initial_state=False))
    decay = torch.zeros(2, 2, 1, 16, device=DEVICE)
    tensors.pop("log_decay")
    with pytest.raises(NotImplementedError, match="value channels"):
        memory_scan(**tensors, log_decay=decay, write="additive", decay_axis="value")
    wide = {name: x for name, x in tensors.items() if name != "value"}
    with pytest.raises(NotImplementedError, match="up to 256"):
        memory_scan(**wide, value=torch.zeros(2, 2, 1, 257, device=DEVICE))


def test_no_rows_at_all():
    tensors = tensors_of(Case("", T=1, H=1, K=16, V=16))
    rows = {n: x[:, :0] for n, x in tensors.items() if n != "initial_state"}
    output, state = memory_scan(**rows, initial_state=tensors["initial_state"])
    assert output.shape == (2, 0, 1, 16)
    assert np.array_equal(state.cpu(), tensors["initial_state"].cpu())
