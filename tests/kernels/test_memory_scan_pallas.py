"""The memory scan's Pallas kernels against the recurrence, without Keras.

Those of GPUs and of TPUs run in Pallas' interpreters, those of TPUs under its detection
of races, and are lowered for each platform.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax._src.mesh import AbstractDevice
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from keras_mom_kernels.memory_scan import jax as scans
from keras_mom_kernels.memory_scan import pallas_splits, reference
from keras_mom_kernels.memory_scan.jax import memory_scan
from keras_mom_kernels.memory_scan.shapes import CASES, Case, make_inputs

TOLERANCES = {
    "float32": (1e-5, 1e-4),
    "bfloat16": (5e-3, 1e-2),
    "float16": (5e-3, 1e-2),
}
DIFFERENTIABLE = ("query", "key", "value", "log_decay", "beta", "initial_state")
KERNELS = ("gpu", "tpu")

# Each recurrence once, and once each what differs in layout, size or dtype.
NAMES = (
    "none-additive-batch",
    "none-delta-packed",
    "head-delta-packed",
    "head-additive-packed",
    "channel-delta-batch",
    "channel-delta-erase-before-decay-batch",
    "head-delta-erase-before-decay-decay-mixed",
    "channel-additive-decay-exp-20",
    "head-delta-decay-0-and-1",
    "none-delta-correlation-0.99",
    "head-delta-beta-none",
    "head-delta-length-1",
    "head-delta-sizes-40-24",
    "head-delta-bfloat16",
    "head-delta-float16",
)


def _small(case):
    """Less work: rows of three chunks in a batch, or one of two, or a few packed."""
    sizes = dict(H=min(case.H, 2), K=min(case.K, 40), V=min(case.V, 24))
    if case.cu_seqlens is not None:
        return case._replace(cu_seqlens=(0, 0, 1, 65, 70, 70), T=72, **sizes)
    if case.name.endswith("batch"):
        return case._replace(**sizes)
    return case._replace(B=1, T=min(case.T, 67), **sizes)


SOME = [_small(case) for case in CASES if case.name in NAMES]
assert len(SOME) == len(NAMES)


@pytest.fixture(autouse=True)
def no_races():
    """No two steps of a TPU kernel touch the same memory unordered."""
    yield
    races = interpret_pallas_call.races
    assert races is None or not races.races_found


def with_gradients(kernels, inputs, cotangents, **options):
    """Output and state, and the gradients by name, of the kernels of a platform."""

    def function(floats, others):
        return memory_scan(
            **floats, **others, **options, kernels=kernels, interpret=True
        )

    @jax.jit
    def both(floats, others, cotangents):
        results, pull = jax.vjp(lambda x: function(x, others), floats)
        cotangents = [x.astype(y.dtype) for x, y in zip(cotangents, results)]
        return results, pull(tuple(cotangents))[0]

    floats = {name: x for name, x in inputs.items() if name in DIFFERENTIABLE}
    others = {name: x for name, x in inputs.items() if name not in DIFFERENTIABLE}
    return both(floats, others, cotangents)


def exact_with_gradients(inputs, cotangents, dtype, **options):
    """The same of the recurrence in float64."""
    leaves = {
        name: torch.tensor(np.asarray(x, "float64"), requires_grad=True)
        if name in DIFFERENTIABLE
        else np.asarray(x)
        for name, x in inputs.items()
    }
    results = reference.memory_scan(**leaves, **options, xp=torch)
    output_gradient = np.asarray(jnp.asarray(cotangents[0], dtype), "float64")
    gradients = [torch.tensor(output_gradient), torch.tensor(cotangents[1])]
    torch.autograd.backward(results, gradients)
    grads = {name: leaves[name].grad for name in leaves if name in DIFFERENTIABLE}
    return [x.detach() for x in results], grads


def error(actual, expected):
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape
    size = max(np.linalg.norm(expected), 1e-300)
    return np.linalg.norm(actual - expected) / size


def draw_cotangents(case):
    random = np.random.default_rng(3)
    return (
        random.normal(size=(case.B, case.T, case.H, case.V)),
        random.normal(size=(case.sequences, case.H, case.K, case.V)),
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("decay", ("none", "head", "channel"))
def test_correlated_keys_in_bfloat16(kernels, decay):
    """Without a state what is summed nearly cancels; decayed keys are rounded again."""
    case = Case("", B=1, T=128, H=1, K=64, V=16, decay=decay, dtype="bfloat16")
    case = case._replace(lowest_log_decay=-0.05)
    check(case._replace(correlation=0.99, initial_state=False), kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_the_recurrence(case, kernels):
    check(case, kernels)


def check(case, kernels):
    rule = dict(write=case.write, erase_before_decay=case.erase_before_decay)
    inputs = {name: jnp.asarray(x) for name, x in make_inputs(case).items()}
    cotangents = draw_cotangents(case)
    actual = with_gradients(kernels, inputs, cotangents, **rule)
    expected = exact_with_gradients(inputs, cotangents, case.dtype, **rule)
    value_tolerance, gradient_tolerance = TOLERANCES[case.dtype]
    assert actual[0][0].dtype == case.dtype and actual[0][1].dtype == jnp.float32
    for name, x, y in zip(("output", "state"), actual[0], expected[0]):
        assert error(x, y) <= value_tolerance, (name, error(x, y))
    for name, y in expected[1].items():
        found = error(actual[1][name], y)
        assert found <= gradient_tolerance, (name, found)


@pytest.mark.parametrize("kernels", KERNELS)
def test_aligned_segments_and_resets(kernels):
    # 2 batch rows of 3 chunks of 16 rows: segments of 1, 0 and 2, and of 3, 0 and 0.
    offsets = np.array([[0, 1, 1, 3], [0, 3, 3, 3]], "int32")
    resets = np.zeros((2, 48), "int32")
    resets[0, [0, 9, 30]] = resets[1, [16, 19]] = 1
    case = Case("", T=48, H=1, K=16, V=16, initial_state=False)
    inputs = {name: jnp.asarray(x) for name, x in make_inputs(case).items()}
    initial = np.random.default_rng(1).normal(size=(2, 3, 1, 16, 16))
    inputs["initial_state"] = jnp.asarray(initial, "float32")
    weights = np.random.default_rng(2).normal(size=(2, 48, 1, 16))
    zeros = np.zeros(initial.shape)
    output, state = with_gradients(
        kernels,
        dict(inputs, chunk_offsets=jnp.asarray(offsets), resets=jnp.asarray(resets)),
        (weights, zeros + 1),
        chunk_size=16,
    )[0]
    # Segment by segment, and begun anew, from nothing, at each reset.
    for row in range(2):
        for segment in range(3):
            begin, end = 16 * offsets[row, segment : segment + 2]
            last = inputs["initial_state"][row, segment]
            borders = [t for t in range(begin, end) if resets[row, t]]
            borders = sorted({begin, *borders, end})
            for start, stop in zip(borders, borders[1:]):
                if resets[row, start]:
                    last = jnp.zeros_like(last)
                rows = {
                    name: np.asarray(x[row : row + 1, start:stop], "float64")
                    for name, x in inputs.items()
                    if name != "initial_state"
                }
                last = np.asarray(last, "float64")
                read, last = reference.memory_scan(**rows, initial_state=last[None])
                last = last[0]
                assert error(output[row, start:stop], read[0]) <= 1e-5
            assert error(state[row, segment], last) <= 1e-5


@pytest.mark.parametrize("kernels", KERNELS)
def test_states_of_empty_segments_pass_through(kernels):
    offsets = jnp.array([[0, 1, 1, 3]], "int32")
    case = Case("", B=1, T=192, H=1, K=16, V=16, initial_state=False)
    inputs = {name: jnp.asarray(x) for name, x in make_inputs(case).items()}
    initial = np.random.default_rng(1).normal(size=(1, 3, 1, 16, 16)).astype("float32")
    cotangent = np.zeros(initial.shape, "float32")
    cotangent[:, 1] = 1
    (_, states), gradients = with_gradients(
        kernels,
        dict(inputs, chunk_offsets=offsets, initial_state=jnp.asarray(initial)),
        (np.zeros((1, 192, 1, 16)), cotangent),
    )
    np.testing.assert_array_equal(states[:, 1], initial[:, 1])
    np.testing.assert_array_equal(gradients["initial_state"], cotangent)


@pytest.mark.parametrize("exclusive", (False, True))
def test_splits_of_long_segments(monkeypatch, exclusive):
    """On the kernels of GPUs, which cut a few long segments into splits."""
    # 2 batch rows of 7 chunks of 16 rows: segments of 5, 0 and 2, and of 1, 6 and 0.
    offsets = jnp.array([[0, 5, 5, 7], [0, 1, 7, 7]], "int32")
    resets = np.zeros((2, 112), "int32")
    resets[0, 40] = resets[1, 20] = 1
    case = Case("", T=112, H=1, K=16, V=16, initial_state=False)
    inputs = {name: jnp.asarray(x) for name, x in make_inputs(case).items()}
    random = np.random.default_rng(1)
    initial = random.normal(size=(2, 3, 1, 16, 16))
    inputs |= dict(
        initial_state=jnp.asarray(initial, "float32"),
        chunk_offsets=offsets,
        resets=jnp.asarray(resets),
    )
    cotangents = random.normal(size=(2, 112, 1, 16)), random.normal(size=initial.shape)
    options = dict(chunk_size=16, erase_before_decay=exclusive)
    whole = with_gradients("gpu", inputs, cotangents, **options)
    monkeypatch.setattr(pallas_splits, "split_length", lambda *shapes: 2)
    # What is traced already knows of no splits.
    fresh = functools.cache(scans._function.__wrapped__)
    monkeypatch.setattr(scans, "_function", fresh)
    cut = with_gradients("gpu", inputs, cotangents, **options)
    for x, y in zip(cut[0], whole[0]):
        assert 0 < error(x, y) <= 1e-6
    for name, y in whole[1].items():
        assert error(cut[1][name], y) <= 1e-5, name


def test_vmap_and_checkpoint():
    """On the kernels of GPUs: the interpreter of those of TPUs maps nothing."""
    case = Case("", B=3, T=70, H=1, K=16, V=16, initial_state=False)
    inputs = {name: jnp.asarray(x) for name, x in make_inputs(case).items()}

    def loss(inputs):
        output, state = memory_scan(**inputs, kernels="gpu", interpret=True)
        return jnp.sum(output**2) + jnp.sum(state)

    def of_row(row):
        return loss({name: x[None] for name, x in row.items()})

    expected = jax.jit(jax.grad(loss))(inputs)
    mapped = jax.jit(jax.vmap(jax.grad(jax.checkpoint(of_row))))
    for name, x in mapped(inputs).items():
        assert error(x, expected[name]) <= 1e-5, name


PLATFORMS = (
    ("cuda", "gpu", "NVIDIA H100"),
    ("rocm", "gpu", "AMD MI300X"),
    ("tpu", "tpu", "TPU v5e"),
)


@pytest.mark.parametrize("platform, kernels, chip", PLATFORMS)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize(
    "decay, key_dim, value_dim", (("head", 128, 128), ("channel", 48, 256))
)
def test_kernels_are_lowered(platform, kernels, chip, dtype, decay, key_dim, value_dim):
    case = Case("", T=130, K=key_dim, V=value_dim, decay=decay, dtype=dtype)
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in make_inputs(case).items()
    }

    def loss(inputs):
        output, first = memory_scan(**inputs, kernels=kernels)
        output, state = memory_scan(**inputs | {"value": output}, kernels=kernels)
        return jnp.sum(output.astype("float32")) + jnp.sum(first + state)

    device = AbstractDevice(device_kind=chip, num_cores=None, platform=kernels)
    mesh = jax.sharding.AbstractMesh((), (), axis_types=(), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(jax.value_and_grad(loss)).trace(shapes)
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
    name = "__gpu$xla.gpu.triton" if kernels == "gpu" else "tpu_custom_call"
    # Forward and backward, once for both calls; the recurrence between chunks alone, or
    # every pass.
    fused = kernels == "gpu" and decay == "head"
    assert text.count(name) == (3 + 6 if fused else 2)


def test_a_cpu_has_no_kernels():
    inputs = make_inputs(Case("", T=3, H=1, K=16, V=16))
    with pytest.raises(NotImplementedError, match="need a GPU or a TPU.*'cpu'"):
        memory_scan(**inputs)
    offsets = np.array([[0, 1], [0, 1]], "int32")
    with pytest.raises(NotImplementedError, match="16 to 64 rows, not 8"):
        memory_scan(**inputs, kernels="gpu", chunk_offsets=offsets, chunk_size=8)
