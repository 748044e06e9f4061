"""Times of the memory scan on a GPU, and of its peers, beside the chip's ceilings."""

import time
from typing import NamedTuple

import gpu_peers
import torch
import triton

from keras_mom_kernels.memory_scan.torch import memory_scan


class Shape(NamedTuple):
    """One shape to time."""

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
    """By name: what a MoM layer packs, and what its peers are known for."""
    packed = mom_lengths()
    return {
        "packed": Shape(packed),
        "long": Shape((32768,)),
        "equal": Shape((1024,) * 32),
        "equal-narrow": Shape((1024,) * 32, 16, 64, 64),
        "narrow": Shape(packed, 16, 64, 64),
        "wide": Shape(packed, 4, 256, 256),
        "channel": Shape(packed, decay="channel"),
    }


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


class Times(NamedTuple):
    """Milliseconds forward, and forward and backward.

    Attributes:
        ahead, total: from launch to launch, as the host launches them.
        ahead_kernels, total_kernels: sum of the kernels' own times.
        memory: MiB beside the inputs, forward and backward.
    """

    ahead: float
    total: float
    ahead_kernels: float
    total_kernels: float
    memory: float


def measure(function, inputs):
    """`Times` of a scan."""
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    named = dict(zip(inputs, leaves))

    @torch.no_grad()
    def forward():
        return function(**named)

    cotangent = torch.randn_like(forward())

    def both():
        for leaf in leaves:
            leaf.grad = None
        function(**named).backward(cotangent)

    options = dict(warmup=50, rep=200, return_mode="median")
    ahead, total = (triton.testing.do_bench(x, **options) for x in (forward, both))
    kernels = kernel_time(forward), kernel_time(both)
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return Times(ahead, total, *kernels, peak / 2**20)


def kernel_time(function, repeats=10):
    """Milliseconds of a call's kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    total = sum(event.device_time_total for event in profile.key_averages())
    return total / repeats / 1e3


def report(name, shape, times):
    """Prints a measurement."""
    rows = sum(shape.lengths) * shape.heads
    products = 3 * shape.key_dim * shape.value_dim
    products += 128 * (shape.key_dim + shape.value_dim)
    flops = 2 * rows * products
    moved = 4 * rows * (shape.key_dim + shape.value_dim)
    ahead, total = times.ahead_kernels, times.total_kernels
    print(
        f"{name:24} forward {times.ahead:6.3f} ms, with backward {times.total:6.3f} "
        f"ms; kernels {ahead:6.3f} ms ({flops / ahead / 1e9:4.0f} TFLOP/s, "
        f"{moved / ahead / 1e9:4.2f} TB/s) and {total:6.3f} ms "
        f"({3 * flops / total / 1e9:4.0f} TFLOP/s); extra {times.memory:5.0f} MiB",
        flush=True,
    )


def compare(name, times, peer, other):
    """Prints the ratios of a measurement to a peer's."""
    ratios = [x / y for x, y in zip(times, other)]
    print(
        f"{'':24} {name} takes {ratios[0]:.2f} and {ratios[1]:.2f} of {peer}; kernels "
        f"{ratios[2]:.2f} and {ratios[3]:.2f}; memory {ratios[4]:.2f}",
        flush=True,
    )


def run_timings(names=()):
    """Times the shapes of these names, or all, and peers that are installed."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__, triton.__version__)
    known = shapes()
    for name in names or known:
        time_shape(name, known[name])


def time_shape(name, shape):
    inputs, borders = timing_inputs(shape)
    started = time.time()
    packed_scan(cu_seqlens=borders)(**inputs)
    torch.cuda.synchronize()
    cold = time.time() - started
    ours = {name: measure(packed_scan(cu_seqlens=borders), inputs)}
    if len(shape.lengths) > 1:
        padded, offsets = aligned(shape, inputs)
        scan = packed_scan(chunk_offsets=offsets)
        ours[f"{name}, aligned"] = measure(scan, padded)
    for form, times in ours.items():
        report(form, shape, times)
    print(f"{'':24} first forward call {cold:.1f} s", flush=True)
    for peer, scan in gpu_peers.scans(shape).items():

        def run(scan=scan, **inputs):
            return scan(**inputs, borders=borders)

        try:
            found = measure(run, inputs)
        except Exception as error:
            print(f"{name}, {peer}: {type(error).__name__}: {str(error)[:300]}")
            continue
        report(f"{name}, {peer}", shape, found)
        for form, times in ours.items():
            compare(form, times, peer, found)


def print_kernels(function, repeats=10, least=0.002):
    """Prints a call's kernels of more than so many milliseconds, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(repeats):
                function()
            torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda x: -x.device_time_total)
    for event in events:
        milliseconds = event.device_time_total / repeats / 1e3
        if milliseconds > least:
            print(f"{event.key[:70]:70} {event.count // repeats} {milliseconds:.3f} ms")


def run_profile():
    """Prints the time of each kernel, forward and backward, at MoM's shape."""
    shape = shapes()["packed"]
    inputs, _ = timing_inputs(shape)
    inputs, offsets = aligned(shape, inputs)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    print_kernels(
        lambda: memory_scan(**leaves, chunk_offsets=offsets)[0].sum().backward()
    )
