"""The memory scan's Mosaic GPU kernel against the recurrence.

It runs in Mosaic GPU's interpreter, under its detection of races, and is lowered. Both
need jax 0.11.2: `make test-mosaic`.
"""

import sys

import jax
import jax.numpy as jnp
import mosaic_interpreter
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice

from keras_mom_kernels.memory_scan import jax as scans
from keras_mom_kernels.memory_scan import mosaic_scan, pallas_splits, reference
from keras_mom_kernels.memory_scan.shapes import Case, make_inputs

TOLERANCE = 5e-3
DIFFERENTIABLE = ("query", "key", "value", "log_decay", "beta", "initial_state")
needs_mosaic = pytest.mark.skipif(
    not mosaic_interpreter.available(),
    reason="the Mosaic kernel needs jax 0.11.2: make test-mosaic",
)
# Packed sequences around a chunk, empty ones first, in the middle and last.
PACKED = dict(cu_seqlens=(0, 0, 1, 65, 65, 203, 203), B=1, T=207)


def _case(name, **changes):
    sizes = dict(B=1, T=130, H=1, K=128, V=128, initial_state=False)
    return Case(name, **(sizes | dict(dtype="bfloat16") | changes))


CASES = (
    *(
        _case(f"correlation-{rho}", decay="none", correlation=rho, beta=(1.0, 1.0))
        for rho in (0.0, 0.5, 0.9, 0.99)
    ),
    _case("correlation-0.99-decay", correlation=0.99, lowest_log_decay=-0.05),
    _case("batch-state", B=2, H=2, initial_state=True),
    _case("packed", **PACKED),
    _case("packed-state", H=2, initial_state=True, **PACKED),
    _case("no-decay-state", decay="none", initial_state=True),
    _case("beta-none", beta=None),
    _case("decay-mixed", log_decays=(-20.0, -0.001)),
    _case("decay-0-and-1", log_decays=(-np.inf, 0.0)),
    _case("length-1", T=1, initial_state=True),
    _case("length-300", T=300),
)


@pytest.fixture
def interpreter(monkeypatch):
    """Takes the kernel, and finds no race in it."""
    mosaic_interpreter.complete(monkeypatch)
    scans._function.cache_clear()
    yield
    found = mosaic_interpreter.races_found()
    mosaic_interpreter.reset()
    scans._function.cache_clear()
    assert not found


def run(inputs, kernels="mosaic", **options):
    how = dict(kernels=kernels, interpret=True)
    return jax.jit(lambda x: scans.memory_scan(**x, **options, **how))(inputs)


def draw(case, seed=0):
    return {name: jnp.asarray(x) for name, x in make_inputs(case, seed).items()}


def error(actual, expected):
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-300)


def check(actual, expected):
    assert actual[0].dtype == jnp.bfloat16 and actual[1].dtype == jnp.float32
    for name, x, y in zip(("output", "state"), actual, expected):
        assert error(x, y) <= TOLERANCE, (name, error(x, y))


def exact(inputs):
    """The recurrence in float64."""
    rows = {name: np.asarray(x, "float64") for name, x in inputs.items()}
    return reference.memory_scan(**rows)


@needs_mosaic
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_are_those_of_the_recurrence(interpreter, case):
    inputs = draw(case)
    check(run(inputs), exact(inputs))


def segments(given):
    """Two batch rows of 5 chunks, and what the recurrence makes of each segment."""
    offsets = np.array([[0, 2, 2, 5], [0, 5, 5, 5]], "int32")
    inputs = draw(_case("", B=2, T=320, H=2))
    initial = np.random.default_rng(1).normal(size=(2, 3, 2, 128, 128))
    initial = initial.astype("float32") if given else np.zeros(initial.shape, "float32")
    output, state = np.zeros((2, 320, 2, 128)), initial.astype("float64")
    for row in range(2):
        for segment, (begin, end) in enumerate(zip(offsets[row], offsets[row, 1:])):
            if begin == end:
                continue
            rows = slice(64 * begin, 64 * end)
            own = {name: x[row : row + 1, rows] for name, x in inputs.items()}
            own["initial_state"] = initial[row, segment][None]
            output[row, rows], state[row, segment] = (x[0] for x in exact(own))
    inputs["chunk_offsets"] = jnp.asarray(offsets)
    if given:
        inputs["initial_state"] = jnp.asarray(initial)
    return inputs, (output, state)


@needs_mosaic
@pytest.mark.parametrize("given", (False, True))
def test_aligned_segments(interpreter, given):
    inputs, expected = segments(given)
    actual = run(inputs)
    check(actual, expected)
    # States of empty segments pass through.
    for row, segment in ((0, 1), (1, 1), (1, 2)):
        place = row, segment
        np.testing.assert_array_equal(actual[1][place], expected[1][place])


@needs_mosaic
def test_splits_of_long_segments(interpreter, monkeypatch):
    inputs, expected = segments(True)
    whole = run(inputs)
    scans._function.cache_clear()
    monkeypatch.setattr(pallas_splits, "split_length", lambda *shapes: 2)
    actual = run(inputs)
    check(actual, expected)
    assert error(actual[0], whole[0]) > 0


@needs_mosaic
def test_gradients_are_those_of_the_other_kernels(interpreter):
    """The backward pass computes all that it takes from the inputs."""
    inputs = draw(_case("", initial_state=True))
    random = np.random.default_rng(3)
    cotangents = (
        jnp.asarray(random.normal(size=(1, 130, 1, 128)), "bfloat16"),
        jnp.asarray(random.normal(size=(1, 1, 128, 128)), "float32"),
    )

    def both(kernels):
        results, pull = jax.vjp(lambda x: run(x, kernels), inputs)
        return results, pull(cotangents)[0]

    actual, expected = both("mosaic"), both("gpu")
    check(actual[0], exact(inputs))
    assert error(actual[0][0], expected[0][0]) > 0
    assert set(actual[1]) == set(DIFFERENTIABLE)
    for name, x in actual[1].items():
        np.testing.assert_array_equal(x, expected[1][name], name)


@needs_mosaic
def test_vmap_and_checkpoint(interpreter):
    inputs = draw(_case("", B=2, T=70, initial_state=True))
    row = jax.checkpoint(lambda x: run({name: y[None] for name, y in x.items()}))
    output, state = jax.jit(jax.vmap(row))(inputs)
    check((output[:, 0], state[:, 0]), exact(inputs))


def _shapes(**changes):
    inputs = make_inputs(_case("", T=130, **changes))
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in inputs.items()}


def lowered(function, inputs):
    """The program for an H100, of which none is needed."""
    chip = dict(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    device = AbstractDevice(**chip)
    mesh = jax.sharding.AbstractMesh((), (), axis_types=(), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.jit(function).trace(inputs)
        return program.lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """The calls of kernels of each lowering."""
    lines = [line for line in text.split("\n") if "stablehlo.custom_call" in line]
    names = ("@mosaic_gpu_v2", "@__gpu$xla.gpu.triton")
    return [[line for line in lines if f" {name}(" in line] for name in names]


@needs_mosaic
@pytest.mark.parametrize("initial_state", (False, True))
def test_it_is_lowered(initial_state):
    inputs = _shapes(initial_state=initial_state)
    text = lowered(lambda x: scans.memory_scan(**x, kernels="mosaic"), inputs)
    own, others = calls(text)
    assert len(own) == 1 and len(others) == 2
    # Of those before it, one takes keys alone, the other solves.
    assert [line.count("xbf16>") for line in others] == [1, 1]
    assert ", tensor<128x128xf32>) ->" in own[0] or not initial_state


@pytest.mark.parametrize(
    "changes, serves",
    ((dict(), True), (dict(K=64), False), (dict(decay="channel"), False)),
)
def test_it_is_taken_where_it_serves(monkeypatch, changes, serves):
    monkeypatch.setattr(scans, "platform", lambda: "gpu")

    def calls_with(**options):
        scan = lowered(lambda x: scans.memory_scan(**x, **options), _shapes(**changes))
        return calls(scan)

    own, others = calls_with()
    assert len(own) == (serves and mosaic_interpreter.available())
    assert others
    assert not calls_with(kernels="gpu")[0]
    # Nor by a JAX that it has not been tried with.
    monkeypatch.setattr(scans, "_UNTRIED", jax.__version_info__)
    assert not calls_with()[0]


@needs_mosaic
def test_gradients_are_lowered():
    def both(inputs):
        scan = jax.vmap(lambda x: scans.memory_scan(**x, kernels="mosaic"))
        results, pull = jax.vjp(scan, inputs)
        return results, pull(results)

    inputs = {
        name: jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
        for name, x in _shapes().items()
    }
    own, others = calls(lowered(both, inputs))
    assert len(own) == 1 and len(others) == 2 + 6


def refused(reason, changes=(), **options):
    inputs = draw(_case("", T=64, **dict(changes)))
    with pytest.raises(NotImplementedError, match=f"^the Mosaic kernel {reason}$"):
        scans.memory_scan(**inputs, **options, kernels="mosaic")


OFFSETS = np.array([[0, 2]], "int32")
CALLS = {
    "takes bfloat16, not float32": dict(dtype="float32"),
    "takes 128 key and 128 value channels, not 64 and 128": dict(K=64),
    "takes 128 key and 128 value channels, not 128 and 256": dict(V=256),
    "has no additive writes": dict(write="additive"),
    "does not erase before the decay": dict(erase_before_decay=True),
    "has no decay of key channels": dict(decay="channel"),
    "takes no resets": dict(resets=np.zeros((1, 64), "int32")),
    "takes chunks of 64 rows, not 32": dict(chunk_offsets=OFFSETS, chunk_size=32),
}


@pytest.mark.parametrize("reason", CALLS)
def test_calls_that_it_does_not_serve(reason):
    changes = dict(CALLS[reason])
    names = ("write", "erase_before_decay", "resets", "chunk_offsets", "chunk_size")
    options = {name: changes.pop(name) for name in names if name in changes}
    refused(reason, changes, **options)


def test_mixed_dtypes():
    inputs = draw(_case("", T=64))
    inputs["value"] = inputs["value"].astype("float32")
    with pytest.raises(NotImplementedError, match="not bfloat16, float32$"):
        scans.memory_scan(**inputs, kernels="mosaic")


def test_releases_of_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    refused(f"needs jax 0.11.2 or later, not {jax.__version__}")


@pytest.mark.parametrize("gpu, name", ((("cuda", 100), "sm_100"), (("hip", 0), "hip")))
def test_other_gpus(monkeypatch, gpu, name):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(mosaic_scan, "target", lambda: gpu)
    refused(f"needs a GPU of sm_90, not {name}")


def test_a_jax_without_mosaic_gpu(monkeypatch):
    name = mosaic_scan.__name__
    monkeypatch.delattr(sys.modules[name.rpartition(".")[0]], "mosaic_scan")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotImplementedError, match="this JAX has no Mosaic GPU"):
        scans.memory_scan(**draw(_case("", T=64)), kernels="mosaic")
