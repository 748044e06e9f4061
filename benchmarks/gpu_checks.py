"""The memory scan's kernels against a float64 recurrence, on a GPU."""

import functools
import itertools
import multiprocessing
import time
import traceback
from typing import NamedTuple

import torch

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
    state: bool = True


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
        for decay, write in itertools.product(
            ("none", "channel"), ("additive", "delta")
        ):
            yield Job("bfloat16", decay, write, False, *size, LENGTHS)
    for dtype in ("bfloat16", "float32"):
        yield Job(dtype, "head", "delta", False, 128, 128, LONG, heads=1)
        # One sequence alone is cut into splits.
        yield Job(dtype, "head", "delta", False, 128, 128, (5000,), heads=1)
        yield Job(dtype, "channel", "delta", True, 64, 64, (5000,), heads=1)
    # A large state outweighs what nearly cancels in the gradients of correlated keys.
    for decay, size in (("none", 128), ("head", 128), ("channel", 64)):
        yield Job("bfloat16", decay, "delta", False, size, size, LENGTHS, state=False)


def mosaic_jobs():
    """What the Mosaic kernel of Pallas serves."""
    for decay, state in itertools.product(("none", "head"), (False, True)):
        yield _mosaic_job(decay, LENGTHS, state=state)
    # Long ones, and one that is cut into splits, of every draw; then longer ones.
    yield _mosaic_job("head", (0, 1, 63, 64, 65, 900))
    yield _mosaic_job("head", (990,), heads=1)
    yield _mosaic_job("head", LONG, heads=1)
    yield _mosaic_job("head", (5000,), heads=1)


def _mosaic_job(decay, lengths, **options):
    return Job("bfloat16", decay, "delta", False, 128, 128, lengths, **options)


def draw(job, correlation, lowest, highest, seed=0):
    """Inputs on the GPU, by the names of the arguments, with a state or zeros."""
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
    return inputs | {"initial_state": normal(*states) * job.state}


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


def run_triton(inputs, cotangents, borders, options):
    """Output, state and gradients by name, of the Triton kernels."""
    from keras_mom_kernels.memory_scan.torch import memory_scan

    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    results = memory_scan(**leaves, cu_seqlens=borders, **options)
    torch.autograd.backward(results, cotangents)
    return *(x.detach() for x in results), {name: leaves[name].grad for name in leaves}


def check(job, run):
    """The largest errors of a job: those of values and of gradients, each by draw."""
    borders = torch.tensor((0, *job.lengths), dtype=torch.int32, device="cuda")
    borders = borders.cumsum(0, dtype=torch.int32)
    rows = sum(job.lengths)
    options = dict(write=job.write, erase_before_decay=job.erase_before_decay)
    draws = DRAWS if max(job.lengths) < 1000 else DRAWS[:1]
    started, found = time.time(), []
    for seed, chosen in enumerate(draws):
        inputs = draw(job, *chosen, seed=seed)
        exact = {name: x.double().requires_grad_() for name, x in inputs.items()}
        expected, expected_state = recurrence(job, exact)
        torch.manual_seed(seed)
        cotangents = [torch.randn_like(inputs[x]) for x in ("value", "initial_state")]
        if not job.state:
            del inputs["initial_state"]
        output, state, grads = run(inputs, cotangents, borders, options)
        wanted = cotangents[0][:, :rows].double(), cotangents[1].double()
        torch.autograd.backward((expected, expected_state), wanted)
        errors = dict(
            output=relative_error(output[:, :rows], expected),
            state=relative_error(state, expected_state),
            rest=output[:, rows:].abs().max().item(),
        )
        gradients = {
            name: relative_error(grads[name], exact[name].grad) for name in inputs
        }
        found.append((chosen, errors, gradients))
    return job, found, time.time() - started


def checked(job, run):
    """`check`, with what went wrong in place of the errors."""
    try:
        return check(job, run)
    except Exception:
        return job, traceback.format_exc().strip().splitlines()[-1], 0.0


def run_checks(workers, first=0, run=run_triton, todo=None):
    """Prints a line a job; returns how many are above a limit.

    Args:
        workers: number of processes.
        first: number of jobs to leave out.
        run: computes what is checked, as `run_triton`.
        todo: the jobs; None for all.
    """
    todo = list(jobs() if todo is None else todo)[first:]
    failed = 0
    context = multiprocessing.get_context("spawn")
    # A process each: what a kernel destroys takes no other job along.
    with context.Pool(workers, maxtasksperchild=1) as pool:
        results = pool.imap_unordered(functools.partial(checked, run=run), todo)
        for job, found, seconds in results:
            rule = f"{job.decay} {job.write}" + " before" * job.erase_before_decay
            name = f"{job.dtype:8} {rule:21} K {job.key_dim:3} V {job.value_dim:3}"
            name += f" longest {max(job.lengths):4}" + " no state" * (not job.state)
            if isinstance(found, str):
                failed += 1
                print(f"FAIL {name} {found}", flush=True)
                continue
            values, gradients = LIMITS[job.dtype]
            worst = {"values": (0.0, ""), "gradients": (0.0, "")}
            for chosen, errors, grads in found:
                for kind, entries in (("values", errors), ("gradients", grads)):
                    for entry, error in entries.items():
                        worst[kind] = max(worst[kind], (error, f"{entry} at {chosen}"))
            bad = worst["values"][0] > values or worst["gradients"][0] > gradients
            failed += bad
            print(
                f"{'FAIL' if bad else 'ok':4} {name} "
                f"values {worst['values'][0]:.1e} ({worst['values'][1]}) "
                f"gradients {worst['gradients'][0]:.1e} ({worst['gradients'][1]}) "
                f"{seconds:.0f} s",
                flush=True,
            )
    print(f"{len(todo) - failed} of {len(todo)} within the limits")
    return failed
