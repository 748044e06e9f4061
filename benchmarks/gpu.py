"""Checks the memory scan's Triton kernels against float64 on a GPU, then times them.

    PYTHONPATH=kernels python benchmarks/gpu.py check    every shipped configuration
    PYTHONPATH=kernels python benchmarks/gpu.py time     MoM's shape and its peers'
    PYTHONPATH=kernels python benchmarks/gpu.py profile  where MoM's shape spends it
    PYTHONPATH=kernels python benchmarks/gpu.py sweep    other launches at MoM's shape

Plain torch, no Keras. `check` spreads over worker processes, since compilation takes
most of its time; it ends with a non-zero status if an error is above its limit. With
flash-linear-attention installed, `time` has its gated delta rule beside.
"""

import argparse
import itertools
import multiprocessing
import sys
import time
from typing import NamedTuple

import torch
import triton

from keras_mom_kernels.memory_scan import torch_launches
from keras_mom_kernels.memory_scan.configurations import Launch, configuration
from keras_mom_kernels.memory_scan.torch import memory_scan

# Relative root-mean-square errors of output and state, and of gradients.
LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 1e-2), "float16": (5e-3, 1e-2)}
LENGTHS = (0, 1, 63, 64, 65, 130)
LONG = (0, 1, 63, 64, 65, 5000)
SIZES = ((16, 16), (48, 96), (64, 64), (96, 48), (128, 128), (256, 256))
RULES = (("additive", False), ("delta", False), ("delta", True))
# What inputs are drawn from: correlation of keys, and lowest and highest log decay.
DRAWS = (
    (0.0, -3.0, -1e-3),
    (0.5, -0.3, -1e-3),
    (0.9, -0.1, -1e-3),
    (0.99, -0.05, -1e-4),
    (0.0, -20.0, 0.0),
)


class Job(NamedTuple):
    """One configuration to check."""

    dtype: str
    decay: str
    write: str
    erase_before_decay: bool
    key_dim: int
    value_dim: int
    lengths: tuple
    heads: int = 2


def jobs():
    """Every recurrence in every dtype at one size, and every size at some."""
    rules = [
        (decay, *rule)
        for decay in ("none", "head", "channel")
        for rule in RULES
        if not (decay == "none" and rule[1])
    ]
    for dtype, rule in itertools.product(LIMITS, rules):
        yield Job(dtype, *rule, 64, 64, LENGTHS)
    some = [("head", "delta", False), ("channel", "delta", True)]
    for dtype, size, rule in itertools.product(LIMITS, SIZES, some):
        if size != (64, 64):
            yield Job(dtype, *rule, *size, LENGTHS)
    for size in ((48, 96), (128, 128), (256, 256)):
        yield Job("bfloat16", "none", "additive", False, *size, LENGTHS)
        yield Job("bfloat16", "none", "delta", False, *size, LENGTHS)
    for dtype in ("bfloat16", "float32"):
        yield Job(dtype, "head", "delta", False, 128, 128, LONG, heads=1)


def draw(job, correlation, lowest, highest, seed=0):
    """Inputs on the GPU, by the names of the arguments, with a state."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=generator)

    def unit(x):
        return torch.nn.functional.normalize(x, dim=-1)

    rows = (1, sum(job.lengths) + 9, job.heads)
    shared = unit(normal(1, 1, job.heads, job.key_dim))
    own = unit(normal(*rows, job.key_dim))
    key = unit(correlation**0.5 * shared + (1 - correlation) ** 0.5 * own)
    query = unit(normal(*rows, job.key_dim)) * job.key_dim**0.5
    uniform = torch.rand(rows, device="cuda", generator=generator)
    inputs = dict(query=query, key=key, value=normal(*rows, job.value_dim))
    inputs["beta"] = uniform
    if job.decay != "none":
        shape = rows if job.decay == "head" else (*rows, job.key_dim)
        share = torch.rand(shape, device="cuda", generator=generator) ** 3
        inputs["log_decay"] = highest + (lowest - highest) * share
    inputs = {name: x.to(getattr(torch, job.dtype)) for name, x in inputs.items()}
    states = (len(job.lengths), job.heads, job.key_dim, job.value_dim)
    return inputs | {"initial_state": normal(*states)}


def recurrence(job, inputs):
    """Output and states token by token, in float64, all sequences at once."""
    lengths = torch.tensor(job.lengths, device="cuda")
    starts = torch.cumsum(lengths, 0) - lengths
    state = inputs["initial_state"]
    outputs = []
    for t in range(max(job.lengths)):
        index = (starts + t).clamp(max=inputs["query"].shape[1] - 1)
        alive = (t < lengths)[:, None, None, None]
        row = {
            name: x[0].index_select(0, index)
            for name, x in inputs.items()
            if name != "initial_state"
        }
        decayed = state
        if "log_decay" in row:
            decay = row["log_decay"].exp()
            decay = decay[..., None] if decay.ndim == 3 else decay[..., None, None]
            decayed = decay * state
        value = row["value"]
        if job.write == "delta":
            read_from = state if job.erase_before_decay else decayed
            value = value - torch.einsum("shk,shkv->shv", row["key"], read_from)
        value = row["beta"][..., None] * value
        new = decayed + row["key"][..., None] * value[..., None, :]
        state = torch.where(alive, new, state)
        outputs.append(torch.einsum("shk,shkv->shv", row["query"], state))
    stacked = torch.stack(outputs, 1) * job.key_dim**-0.5
    pieces = [stacked[s, :length] for s, length in enumerate(job.lengths)]
    return torch.cat(pieces)[None], state


def relative_error(actual, expected):
    actual = actual.double()
    size = expected.norm().clamp(1e-300)
    error = ((actual - expected).norm() / size).item()
    return error if error == error else float("inf")


def check(job):
    """The largest errors of a job: those of values and of gradients, each by draw."""
    borders = torch.tensor((0, *job.lengths), dtype=torch.int32, device="cuda")
    borders = borders.cumsum(0, dtype=torch.int32)
    rows = sum(job.lengths)
    options = dict(write=job.write, erase_before_decay=job.erase_before_decay)
    draws = DRAWS if job.lengths is not LONG else DRAWS[:1]
    started, found = time.time(), []
    for seed, chosen in enumerate(draws):
        inputs = draw(job, *chosen, seed=seed)
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        output, state = memory_scan(**leaves, cu_seqlens=borders, **options)
        exact = {
            name: x.detach().double().requires_grad_() for name, x in inputs.items()
        }
        expected, expected_state = recurrence(job, exact)
        torch.manual_seed(seed)
        cotangents = torch.randn_like(output), torch.randn_like(state)
        torch.autograd.backward((output, state), cotangents)
        wanted = cotangents[0][:, :rows].double(), cotangents[1].double()
        torch.autograd.backward((expected, expected_state), wanted)
        errors = dict(
            output=relative_error(output[:, :rows], expected),
            state=relative_error(state, expected_state),
            rest=output.detach()[:, rows:].abs().max().item(),
        )
        gradients = {
            name: relative_error(leaves[name].grad, exact[name].grad) for name in leaves
        }
        found.append((chosen, errors, gradients))
    return job, found, time.time() - started


def run_checks(workers):
    """Prints a line a job; returns how many are above a limit."""
    todo = list(jobs())
    failed = 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, maxtasksperchild=8) as pool:
        for job, found, seconds in pool.imap_unordered(check, todo):
            values, gradients = LIMITS[job.dtype]
            worst = {"values": (0.0, ""), "gradients": (0.0, "")}
            for chosen, errors, grads in found:
                for kind, entries in (("values", errors), ("gradients", grads)):
                    for name, error in entries.items():
                        what = f"{name} at {chosen}"
                        worst[kind] = max(worst[kind], (error, what))
            bad = worst["values"][0] > values or worst["gradients"][0] > gradients
            failed += bad
            rule = f"{job.decay} {job.write}" + " before" * job.erase_before_decay
            print(
                f"{'FAIL' if bad else 'ok':4} {job.dtype:8} {rule:21} "
                f"K {job.key_dim:3} V {job.value_dim:3} longest {max(job.lengths):4} "
                f"values {worst['values'][0]:.1e} ({worst['values'][1]}) "
                f"gradients {worst['gradients'][0]:.1e} ({worst['gradients'][1]}) "
                f"{seconds:.0f} s",
                flush=True,
            )
    print(f"{len(todo) - failed} of {len(todo)} within the limits")
    return failed


class Shape(NamedTuple):
    """One shape to time."""

    name: str
    lengths: tuple
    heads: int = 8
    key_dim: int = 128
    value_dim: int = 128
    decay: str = "head"


def mom_lengths(batch=8, length=2048, memories=4, top_k=2):
    """Tokens of each memory of each batch row, routed at random."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand((batch, length, memories), generator=generator)
    chosen = torch.nn.functional.one_hot(scores.topk(top_k).indices, memories)
    return tuple(chosen.sum((1, 2)).flatten().tolist())


def shapes():
    packed = mom_lengths()
    return (
        Shape("MoM packed", packed),
        Shape("one of 32k", (32768,)),
        Shape("K V 64", packed, 16, 64, 64),
        Shape("K V 256", packed, 4, 256, 256),
        Shape("channel decay", packed, decay="channel"),
    )


def timing_inputs(shape):
    rows = (1, sum(shape.lengths), shape.heads)
    normalize = torch.nn.functional.normalize

    def normal(channels):
        return torch.randn(*rows, channels, device="cuda", dtype=torch.bfloat16)

    inputs = dict(
        query=normalize(normal(shape.key_dim), dim=-1),
        key=normalize(normal(shape.key_dim), dim=-1),
        value=normal(shape.value_dim),
        beta=torch.rand(rows, device="cuda"),
    )
    decays = rows if shape.decay == "head" else (*rows, shape.key_dim)
    inputs["log_decay"] = -0.1 * torch.rand(decays, device="cuda")
    borders = torch.tensor((0, *shape.lengths), device="cuda").cumsum(0)
    return inputs, borders.to(torch.int32)


def aligned(shape, inputs, batch=8):
    """The rows as the layer packs them: whole chunks a segment."""
    count = torch.tensor(shape.lengths, device="cuda").view(batch, -1)
    chunks = (sum(shape.lengths) // batch + count.shape[1] * 63) // 64
    ends = ((count + 63) // 64).cumsum(1)
    ends[:, -1] = chunks
    offsets = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    rows = chunks * 64
    padded = {}
    for name, x in inputs.items():
        x = x.view(batch, -1, *x.shape[2:])
        missing = rows - x.shape[1]
        padding = [0, 0] * (x.ndim - 2) + [0, missing]
        padded[name] = torch.nn.functional.pad(x, padding)
    return padded, offsets


def packed_scan(**packing):
    """The scan's output, as a function of its float tensors."""
    return lambda **inputs: memory_scan(**inputs, **packing)[0]


def measure(function, inputs):
    """Milliseconds forward, and forward and backward; MiB beside the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    named = dict(zip(inputs, leaves))
    with torch.no_grad():
        out = function(**named)
        cotangent = torch.randn_like(out)
        ahead = triton.testing.do_bench(
            lambda: function(**named), warmup=50, rep=200, return_mode="median"
        )
    del out

    def both():
        for leaf in leaves:
            leaf.grad = None
        function(**named).backward(cotangent)

    total = triton.testing.do_bench(both, warmup=50, rep=200, return_mode="median")
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return ahead, total, peak / 2**20


def report(name, shape, result, peer=None):
    ahead, total, memory = result
    rows = sum(shape.lengths) * shape.heads
    products = 3 * shape.key_dim * shape.value_dim
    products += 128 * (shape.key_dim + shape.value_dim)
    flops = 2 * rows * products
    moved = 4 * rows * (shape.key_dim + shape.value_dim)
    beside = ""
    if peer is not None:
        beside = f"  of fla's: {ahead / peer[0]:.2f} {total / peer[1]:.2f}"
    print(
        f"{name:22} forward {ahead:6.3f} ms ({flops / ahead / 1e9:4.0f} TFLOP/s, "
        f"{moved / ahead / 1e9:4.2f} TB/s)  with backward {total:6.3f} ms "
        f"({3 * flops / total / 1e9:4.0f} TFLOP/s)  extra {memory:5.0f} MiB{beside}",
        flush=True,
    )


def fla_scan():
    """fla's gated delta rule, as a function of our arguments; None without it."""
    try:
        from fla.ops.gated_delta_rule import (  # type: ignore[reportMissingImports]
            chunk_gated_delta_rule,
        )
    except ImportError:
        return None
    return chunk_gated_delta_rule


def run_timings():
    peer_scan = fla_scan()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, triton.__version__)
    for shape in shapes():
        inputs, borders = timing_inputs(shape)
        started = time.time()
        packed_scan(cu_seqlens=borders)(**inputs)
        torch.cuda.synchronize()
        cold = time.time() - started
        result = measure(packed_scan(cu_seqlens=borders), inputs)
        peer = None
        if peer_scan is not None and shape.decay == "head":

            def fla(query, key, value, log_decay, beta, borders=borders):
                return peer_scan(
                    query, key, value, log_decay, beta, cu_seqlens=borders.long()
                )[0]

            peer = measure(fla, inputs)
            report(f"{shape.name}, fla", shape, peer)
        report(shape.name, shape, result, peer)
        print(f"{'':22} first forward call {cold:.1f} s", flush=True)
        if len(shape.lengths) > 1:
            padded, offsets = aligned(shape, inputs)
            result = measure(packed_scan(chunk_offsets=offsets), padded)
            report(f"{shape.name}, aligned", shape, result)


def run_profile():
    """Prints the time of each kernel, forward and backward, at MoM's shape."""
    shape = shapes()[0]
    inputs, _ = timing_inputs(shape)
    inputs, offsets = aligned(shape, inputs)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    repeats, activities = 10, [torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(repeats):
                memory_scan(**leaves, chunk_offsets=offsets)[0].sum().backward()
            torch.cuda.synchronize()
    for event in profile.key_averages():
        milliseconds = event.device_time_total / repeats / 1e3
        if milliseconds > 0.002:
            print(f"{event.key[:70]:70} {event.count // repeats} {milliseconds:.3f} ms")


def run_sweep():
    """Times other launches at MoM's shape, one kernel changed at a time."""
    shape = shapes()[0]
    inputs, _ = timing_inputs(shape)
    inputs, offsets = aligned(shape, inputs)
    scans = [
        Launch(128, v, warps, stages)
        for v, warps, stages in itertools.product((32, 64, 128), (4, 8), (1, 2))
    ]
    options: dict[str, list] = {"scan": scans, "states": scans, "reverse": scans}
    options["gradients"] = [
        Launch(k, v, warps, 1)
        for k, v, warps in itertools.product((64, 128), (32, 64), (4, 8))
    ]
    options["split"] = [False]
    for name, launches in options.items():
        for launch in launches:

            def changed(*arguments, name=name, launch=launch):
                return configuration(*arguments)._replace(**{name: launch})

            torch_launches.configuration = changed  # type: ignore[assignment]
            try:
                result = measure(packed_scan(chunk_offsets=offsets), inputs)
            except triton.runtime.errors.OutOfResources:
                print(f"{name} {launch}: too large", flush=True)
                continue
            print(f"{name} {launch}")
            report("", shape, result)
    torch_launches.configuration = configuration


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("check", "time", "profile", "sweep"))
    parser.add_argument("--workers", type=int, default=12)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This needs a GPU.")
    if arguments.what == "check":
        sys.exit(1 if run_checks(arguments.workers) else 0)
    elif arguments.what == "time":
        run_timings()
    elif arguments.what == "profile":
        run_profile()
    else:
        run_sweep()


if __name__ == "__main__":
    main()
