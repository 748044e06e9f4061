"""Times of the memory scan on a GPU, and of its peers, beside the chip's ceilings."""

import time
from typing import NamedTuple

import torch
import triton

from keras_mom_kernels.memory_scan.torch import memory_scan


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
