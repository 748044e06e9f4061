"""Compiles the memory scan for TPUs, forward and backward, without having one.

    make compile-tpu

Prints a line a chip and case; ends with a non-zero status if one does not compile. It
needs libtpu, and is not among the tests: it takes minutes.
"""

import os
import sys
import time

# libtpu asks nobody for the machine that it is not on.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from keras_mom_kernels.memory_scan.jax import memory_scan

CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
LENGTH, HEADS = 512, 4
INTEGERS = ("cu_seqlens", "chunk_offsets", "resets")
# Dtype, K, V, decay, write, and how sequences lie in the rows.
CASES = (
    ("bfloat16", 128, 128, "head", "delta", "packed"),
    ("bfloat16", 128, 128, "head", "delta", "aligned"),
    ("bfloat16", 64, 64, "head", "delta", "batch"),
    ("bfloat16", 256, 256, "head", "delta", "batch"),
    ("bfloat16", 48, 80, "channel", "delta", "batch"),
    ("bfloat16", 128, 128, "none", "additive", "batch"),
    ("float32", 128, 128, "head", "delta", "packed"),
    ("float16", 128, 128, "head", "delta", "batch"),
)


def make_shapes(dtype, key_dim, value_dim, decay, layout):
    rows = (1 if layout == "packed" else 2, LENGTH, HEADS)
    shapes = dict(
        query=((*rows, key_dim), dtype),
        key=((*rows, key_dim), dtype),
        value=((*rows, value_dim), dtype),
        beta=(rows, "float32"),
    )
    if decay != "none":
        channels = (key_dim,) if decay == "channel" else ()
        shapes["log_decay"] = ((*rows, *channels), "float32")
    if layout == "packed":
        shapes["cu_seqlens"] = ((5,), "int32")
    if layout == "aligned":
        shapes["chunk_offsets"] = ((rows[0], 4), "int32")
        shapes["resets"] = (rows[:2], "int32")
    return {name: jax.ShapeDtypeStruct(*x) for name, x in shapes.items()}


def compile_for(device, dtype, key_dim, value_dim, decay, write, layout):
    def gradients(inputs):
        integers = {name: x for name, x in inputs.items() if name in INTEGERS}
        floats = {name: x for name, x in inputs.items() if name not in INTEGERS}

        def loss(floats):
            output, state = memory_scan(
                **floats, **integers, write=write, kernels="tpu"
            )
            return jnp.sum(output.astype("float32")) + jnp.sum(state)

        return jax.value_and_grad(loss)(floats)

    shapes = make_shapes(dtype, key_dim, value_dim, decay, layout)
    program = jax.jit(gradients, in_shardings=SingleDeviceSharding(device))
    text = program.lower(shapes).compile().as_text()
    count = text.count("tpu_custom_call")
    if count != 2:
        raise RuntimeError(f"{count} kernels in the program, not 2")


def main():
    failed = 0
    for chip in CHIPS:
        device = topologies.get_topology_desc(chip, platform="tpu").devices[0]
        for case in CASES:
            name, started = " ".join(map(str, case)), time.time()
            try:
                compile_for(device, *case)
                found = "ok"
            except Exception as error:
                failed += 1
                found = f"FAILED: {type(error).__name__}: {str(error)[:500]}"
            seconds = time.time() - started
            print(f"{chip:10} {name:42} {seconds:4.0f} s  {found}", flush=True)
    print(f"{len(CHIPS) * len(CASES) - failed} of {len(CHIPS) * len(CASES)} compiled")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
