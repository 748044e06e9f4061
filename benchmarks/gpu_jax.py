"""Checks the Pallas kernels against float64 on a GPU, then times them.

    PYTHONPATH=.:kernels python benchmarks/gpu_jax.py check   every configuration
    PYTHONPATH=.:kernels python benchmarks/gpu_jax.py time    the scan
    PYTHONPATH=.:kernels python benchmarks/gpu_jax.py profile where it spends it
    PYTHONPATH=.:kernels python benchmarks/gpu_jax.py layer   MoMLayer
    PYTHONPATH=.:kernels python benchmarks/gpu_jax.py model   24 layers
    PYTHONPATH=.:kernels python benchmarks/gpu_jax.py         all of these

On Hopper GPUs a Mosaic kernel serves the forward pass of some calls. With `--mosaic`,
`check` checks it alone, which it otherwise does at the end, and `time` and `layer` time
the same without it beside:

    PYTHONPATH=.:kernels python benchmarks/gpu_jax.py check time layer --mosaic

The counterpart of `gpu.py`, with torch beside it: it draws the inputs and computes the
recurrence, and the Triton kernels are timed in the same process. `time` needs Keras for
the portable form, `layer` and `model` for the layer.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
# The GPU is shared with torch, and with other processes.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import torch  # noqa: E402
from gpu_checks import mosaic_jobs, run_checks  # noqa: E402
from gpu_peers import rwkv_scan  # noqa: E402
from gpu_scan import (  # noqa: E402
    Times,
    aligned,
    compare,
    kernel_time,
    measure,
    packed_scan,
    print_kernels,
    report,
    shapes,
    timing_inputs,
)
from jax_triton_pool import Pool  # noqa: E402

from keras_mom_kernels.memory_scan.jax import memory_scan  # noqa: E402


def array(x):
    """A torch tensor as JAX' own."""
    return jnp.asarray(jax.dlpack.from_dlpack(x.detach().contiguous()))


def tensor(x):
    return torch.from_dlpack(x)


def run_pallas(inputs, cotangents, borders, options):
    """Output, state and gradients by name, of the Pallas kernels."""
    options = dict(kernels="gpu") | options
    torch.cuda.synchronize()
    floats = {name: array(x) for name, x in inputs.items()}
    output, state, grads = _with_gradients(tuple(options.items()))(
        floats, tuple(array(x) for x in cotangents), array(borders)
    )
    jax.block_until_ready((output, state, grads))
    return (
        tensor(output),
        tensor(state),
        {name: tensor(x) for name, x in grads.items()},
    )


def run_mosaic(inputs, cotangents, borders, options):
    """The same with the Mosaic kernel, twice, which has to make no difference."""
    options = options | dict(kernels="mosaic")
    found = run_pallas(inputs, cotangents, borders, options)
    again = run_pallas(inputs, cotangents, borders, options)
    if not all(map(torch.equal, found[:2], again[:2])):
        raise RuntimeError("two runs of the same call differ")
    return found


@functools.cache
def _with_gradients(options):
    """The scan and its gradients as one program, compiled once for all draws."""

    @jax.jit
    def both(inputs, cotangents, borders):
        results, pull = jax.vjp(
            lambda x: memory_scan(**x, cu_seqlens=borders, **dict(options)), inputs
        )
        return *results, pull(cotangents)[0]

    return both


def milliseconds(function, repeats=20, rounds=7):
    """Median over rounds of a call's time, as the host launches calls in a row."""
    jax.block_until_ready(function())
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(repeats):
            result = function()
        jax.block_until_ready(result)
        found.append((time.perf_counter() - started) / repeats * 1e3)
    return statistics.median(found)


def compiled(function, *arguments):
    """A compiled function, the seconds it took, and the MiB that it needs."""
    started = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - started
    analysis: Any = program.memory_analysis()
    memory = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return program, seconds, memory / 2**20


def programs(function, inputs):
    """The forward pass of a scan, and that with gradients, with their arguments."""
    cotangent = jnp.ones_like(inputs["value"])

    def both(inputs, cotangent):
        output, pull = jax.vjp(lambda x: function(**x), inputs)
        return output, pull(cotangent.astype(output.dtype))[0]

    return (lambda x: function(**x), inputs), (both, inputs, cotangent)


def measure_jax(function, inputs):
    """`Times` of a scan, and the seconds that forward and both take to compile."""
    forward, both = programs(function, inputs)
    cotangent = both[-1]
    ahead, ahead_seconds, _ = compiled(*forward)
    total, total_seconds, memory = compiled(*both)
    calls = (lambda: ahead(inputs)), (lambda: total(inputs, cotangent))
    waited = [lambda call=call: jax.block_until_ready(call()) for call in calls]
    (first, second), kernels = map(milliseconds, calls), map(kernel_time, waited)
    print(f"{'':24} compiled in {ahead_seconds:.1f} and {total_seconds:.1f} s")
    return Times(first, second, *kernels, memory=memory)


def portable(**packing):
    """The portable form, as a function of the scan's float tensors."""
    from keras_mom import ops
    from keras_mom.ops.dispatch import dispatch
    from keras_mom.ops.memory_scan import AlignedSegments

    if "cu_seqlens" in packing:
        return lambda **x: ops.memory_scan(**x, **packing, implementation="portable")
    segments = AlignedSegments(packing["chunk_offsets"], 64, 1, None)

    def scan(query, key, value, **options):
        rest = dict(cu_seqlens=None, aligned=segments, initial_state=None)
        rest |= dict(write="delta", erase_before_decay=False, decay_axis="key")
        rest |= dict(scale=query.shape[-1] ** -0.5)
        rows = query, key, value
        return dispatch("memory_scan", "portable", *rows, **options, **rest)[0]

    return scan


def why_no_mosaic():
    """Why the Mosaic kernel serves nothing here, or None."""
    rows = jax.ShapeDtypeStruct((1, 64, 1, 128), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(memory_scan, kernels="mosaic"), *[rows] * 3)
    except NotImplementedError as error:
        return str(error)
    return None


def run_timings(names, with_portable, with_mosaic):
    print(torch.cuda.get_device_name(), "jax", jax.__version__, torch.__version__)
    known = shapes()
    for name in names or known:
        shape = known[name]
        inputs, borders = timing_inputs(shape)
        forms = {name: (inputs, dict(cu_seqlens=borders))}
        if len(shape.lengths) > 1:
            padded, offsets = aligned(shape, inputs)
            forms[f"{name}, aligned"] = padded, dict(chunk_offsets=offsets)
        for form, (tensors, packing) in forms.items():
            torch.cuda.synchronize()
            arrays = {name: array(x) for name, x in tensors.items()}
            places = {name: array(x) for name, x in packing.items()}

            def scan(places=places, **x):
                return memory_scan(**x, **places)[0]

            ours = measure_jax(scan, arrays)
            report(f"{form}, Pallas", shape, ours)
            theirs = measure(packed_scan(**packing), tensors)
            report(f"{form}, Triton", shape, theirs)
            compare("Pallas", ours, "Triton", theirs)
            if with_mosaic:
                time_without_mosaic(form, shape, arrays, places, ours)
            if with_portable:
                theirs = measure_jax(portable(**places), arrays)
                report(f"{form}, portable", shape, theirs)
                compare("Pallas", ours, "the portable form", theirs)
            peer = rwkv_scan(shape) if form == name else None
            if peer is not None:
                time_peer(name, shape, peer, arrays, ours)


def time_without_mosaic(form, shape, arrays, places, ours):
    def scan(**x):
        return memory_scan(**x, **places, kernels="gpu")[0]

    theirs = measure_jax(scan, arrays)
    report(f"{form}, no Mosaic", shape, theirs)
    compare("Pallas", ours, "the same without Mosaic", theirs)


def time_peer(name, shape, peer, arrays, ours):
    def lower():
        for function, *arguments in programs(peer, arrays):
            jax.jit(function).lower(*arguments)

    try:
        started = time.perf_counter()
        count = Pool().compile(lower)
        seconds = time.perf_counter() - started
        print(f"{'':24} {count} kernels compiled before, in {seconds:.0f} s")
        theirs = measure_jax(peer, arrays)
    except Exception as error:
        print(f"{name}, rwkv_ops: {type(error).__name__}: {str(error)[:300]}")
        return
    report(f"{name}, rwkv_ops", shape, theirs)
    compare("Pallas", ours, "rwkv_ops", theirs)


def run_profile():
    """Prints the time of each kernel, forward and backward, at MoM's shape."""
    shape = shapes()["packed"]
    tensors, offsets = aligned(shape, timing_inputs(shape)[0])
    offsets = array(offsets)
    inputs = {name: array(x) for name, x in tensors.items()}

    @jax.jit
    def both(inputs):
        output, pull = jax.vjp(
            lambda x: memory_scan(**x, chunk_offsets=offsets)[0], inputs
        )
        return output, pull(jnp.ones_like(output))[0]

    print_kernels(lambda: jax.block_until_ready(both(inputs)))


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    steps = ("check", "time", "profile", "layer", "model")
    parser.add_argument("what", choices=steps, nargs="*", default=steps)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="job to check first")
    parts = ("train", "decode")
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--shapes", nargs="*", choices=tuple(shapes()), default=())
    parser.add_argument("--portable", action="store_true", help="time it beside")
    parser.add_argument("--mosaic", action="store_true", help="check and time it")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit("This needs a GPU.")
    failed = 0
    if "check" in arguments.what:
        if not arguments.mosaic:
            failed = run_checks(arguments.workers, arguments.first, run_pallas)
        reason = why_no_mosaic()
        if reason is None:
            print("The Mosaic kernel:")
            failed += run_checks(arguments.workers, 0, run_mosaic, mosaic_jobs())
        else:
            print(f"Not checked: {reason}")
            failed += arguments.mosaic
    if "time" in arguments.what:
        run_timings(arguments.shapes, arguments.portable, arguments.mosaic)
    if "profile" in arguments.what:
        run_profile()
    if "layer" in arguments.what:
        from gpu_jax_layer import run_layer

        run_layer(arguments.portable, arguments.mosaic)
    if "model" in arguments.what:
        from gpu_jax_layer import run_model

        run_model(arguments.parts)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
