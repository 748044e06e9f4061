"""Run by `test_jax_partitioning.py`: the Pallas kernels on eight devices of a CPU.

Each device computes its batch rows and heads, and nothing is gathered.
"""

import os

# What is compiled needs not be fast.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keras_mom_kernels.memory_scan.jax import memory_scan
from keras_mom_kernels.memory_scan.shapes import Case, make_inputs
from keras_mom_kernels.memory_step import shapes as step_shapes
from keras_mom_kernels.memory_step.jax import convolution_step, memory_step

BATCH, HEADS = 4, 2
MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
GATHERS = ("all-gather", "all-to-all", "all-reduce", "collective-permute")


def shard(x, heads_axis):
    axes: list = [None] * x.ndim
    axes[0] = "data"
    if heads_axis is not None:
        axes[heads_axis] = "model"
    return jax.device_put(x, NamedSharding(MESH, PartitionSpec(*axes)))


def check(name, function, inputs, heads_axes, parts=8):
    """The sharded call gives what one device gives, and moves nothing.

    Args:
        heads_axes: of inputs by name, where it is not the third; None for heads that
            are not sharded.
        parts: of each result.
    """
    program = jax.jit(function)
    expected = program(inputs)
    sharded = {name: shard(x, heads_axes.get(name, 2)) for name, x in inputs.items()}
    text = program.lower(sharded).compile().as_text()
    moved = [what for what in GATHERS if what in text]
    assert not moved, (name, moved)
    results = program(sharded)
    for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert len(x.sharding.device_set) == 8
        assert x.addressable_shards[0].data.size == x.size // parts, name
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)
    print(name, "ok", flush=True)


def scan_and_gradients(inputs):
    def scan(inputs):
        return memory_scan(**inputs, kernels="gpu", interpret=True)

    results, pull = jax.vjp(scan, inputs)
    return results, pull(jax.tree.map(jnp.cos, results))[0]


def check_scans():
    for decay in ("head", "channel"):
        case = Case("", B=BATCH, T=70, H=HEADS, K=16, V=16, decay=decay)
        inputs = {name: jnp.asarray(x) for name, x in make_inputs(case).items()}
        check(decay, scan_and_gradients, inputs, {"initial_state": 1})


def check_vmap():
    case = Case("", B=2 * BATCH, T=20, H=HEADS, K=16, V=16, initial_state=False)
    inputs = {
        name: jnp.asarray(x).reshape(BATCH, 2, *x.shape[1:])
        for name, x in make_inputs(case).items()
    }
    mapped = jax.vmap(scan_and_gradients)
    results, expected = (
        jax.jit(f)(inputs)
        for f in (mapped, lambda x: jax.lax.map(scan_and_gradients, x))
    )
    for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    print("vmap ok", flush=True)


def check_step():
    case = step_shapes.Case("", B=BATCH, H=HEADS, decay="head")
    token = step_shapes.make_tokens(case)[0]
    active = jnp.asarray(token.pop("active"))
    token.pop("projected")
    inputs = {name: jnp.asarray(x, "float32") for name, x in token.items()}
    weights = inputs.pop("weights")
    inputs["state"] = jnp.asarray(step_shapes.make_state(case)[0], "float32")

    def step(inputs):
        return memory_step(
            **inputs, weights=weights, active=active, kernels="gpu", interpret=True
        )

    check("step", step, inputs, {})

    case = step_shapes.Case("", B=BATCH, H=HEADS)
    _, kernels, window = step_shapes.make_state(case)
    query, key, value = step_shapes.make_tokens(case)[0]["projected"]
    inputs = dict(query=query, key=key, value=value, window=window)
    inputs = {name: jnp.asarray(x, "float32") for name, x in inputs.items()}
    kernels = [jnp.asarray(x, "float32") for x in kernels]

    def convolution(inputs):
        return convolution_step(
            **inputs,
            kernels=kernels,
            active=active,
            **case.how,
            platform="gpu",
            interpret=True,
        )

    # A window has the heads of query, key and value side by side.
    check("convolution step", convolution, inputs, dict.fromkeys(inputs), parts=4)


if __name__ == "__main__":
    check_scans()
    check_step()
    check_vmap()
