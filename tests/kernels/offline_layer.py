"""Compiles the Triton kernels around the scan for a GPU that need not be there."""

import sys

from offline import Kernel, compiled, resources

from keras_mom_kernels.gates import triton_gates
from keras_mom_kernels.gates.torch import launch_of as gates_of
from keras_mom_kernels.memory_mixing import triton_mixing
from keras_mom_kernels.memory_mixing.shapes import BENCHMARK
from keras_mom_kernels.memory_mixing.torch import launch_of
from keras_mom_kernels.memory_scan.configurations import Launch
from keras_mom_kernels.packing import triton_packing
from keras_mom_kernels.routing import triton_routing, triton_statistics
from keras_mom_kernels.routing.torch_projection import projection_sizes
from keras_mom_kernels.routing.torch_statistics import launch_of as statistics_of

_POINTERS = {"bfloat16": "*bf16", "float32": "*fp32"}
_INTEGERS = ("tokens", "rows", "length", "chunks")


def mixing_kernels(case):
    """The memory mixing's kernels, and the types of their arguments."""
    float32 = ("weights", "scale", "weights_grad", "partials")
    of_case = ("outputs", "gate", "result", "output_grad", "outputs_grad", "gate_grad")
    types = dict.fromkeys(float32, "*fp32") | {"targets": "*i32", "epsilon": "fp32"}
    types |= dict.fromkeys(of_case, _POINTERS[case.dtype])
    found = []
    for function in (triton_mixing.mix, triton_mixing.mix_gradients):
        gradients = function is triton_mixing.mix_gradients
        launch = launch_of(case.H, case.V, case.slots, gradients)
        constants = dict(
            H=case.H,
            V=case.V,
            WEIGHTED=case.k,
            SLOTS=case.slots,
            GATED=case.gated,
            TOKENS=launch.tokens,
            STEPS=launch.steps,
            HEADS=launch.heads,
            BLOCK_V=launch.block,
            BLOCK_SLOTS=1 << (case.slots - 1).bit_length(),
        )
        how = Launch(0, 0, launch.warps, 3)
        name = f"{function.__name__}-{case.name}"
        found.append(Kernel(name, function, how, constants))
    clear = dict(WIDTH=case.H * case.V, ROWS=32, BLOCK=128)
    types |= {"written": "*u8", "x": _POINTERS[case.dtype]}
    function = triton_mixing.clear_rows
    name = f"{function.__name__}-{case.name}"
    found.append(Kernel(name, function, Launch(0, 0, 4, 3), clear))
    return found, types


def routing_kernels():
    """The routing's kernels with 4 memories, and the types of their arguments."""
    names = ("logits", "probabilities", "weights")
    names += ("probabilities_grad", "weights_grad", "logits_grad")
    types = dict.fromkeys(names, "*fp32") | {"indices": "*i32"}
    types |= dict.fromkeys(("kernel", "partials"), "*fp32")
    types |= dict.fromkeys(("x", "x_grad"), "*bf16")
    sizes = dict(M=4, TOP_K=2, TOKENS=128, BLOCK_M=4, BLOCK_K=2)
    projected = projection_sizes(1024, 4, 2)
    gradients = dict(WIDTH=1024, M=4, TOKENS=8, STEPS=32, BLOCK_D=128)
    functions = {
        triton_routing.route: sizes,
        triton_routing.route_gradients: sizes,
        triton_routing.route_projected: projected,
        triton_routing.projection_gradients: gradients,
    }
    launch = Launch(0, 0, 4, 3)
    return [Kernel(x.__name__, x, launch, y) for x, y in functions.items()], types


def statistics_kernels():
    """The routing statistics' kernels with 4 memories, and their arguments' types."""
    names = ("probabilities", "partials", "share", "mean_entropy", "loss")
    names += ("tokens_counted", "entropy_grad", "loss_grad", "probabilities_grad")
    types = dict.fromkeys(names, "*fp32") | {"indices": "*i32", "mask": "*i1"}
    types |= {"steps": "i32", "programs": "i32"}
    blocks = statistics_of(2**14, 4)[2]
    known = dict(M=4, TOP_K=2, MASKED=True, ALONE=False, ROWS=16)
    known |= dict(ENTROPY=True, LOSS=True)
    functions = (
        triton_statistics.sum_tokens,
        triton_statistics.add_partials,
        triton_statistics.statistics_gradients,
    )
    launch = Launch(0, 0, 4, 3)
    return [Kernel(x.__name__, x, launch, known | blocks) for x in functions], types


def packing_kernels():
    """The packing's kernels with 4 memories and a shared one, and the like."""
    tables = ("position", "targets", "slot", "token", "memory", "place", "start")
    tables += ("count", "chunk_offsets", "indices")
    types = dict.fromkeys(tables, "*i32") | {"mask": "*i1"}
    sizes = dict(ROUTED=4, MEMORIES=5, TOP_K=2, HISTORY=3, CHUNK=64, MASKED=True)
    functions = {
        triton_packing.rank_tokens: dict(BLOCK=1024),
        triton_packing.place_rows: dict(BLOCK=256, BLOCK_M=8),
    }
    return [
        Kernel(x.__name__, x, Launch(0, 0, 4, 3), {**sizes, **blocks})
        for x, blocks in functions.items()
    ], types


def gate_kernels():
    """The gates' kernels with 8 heads, and the types of their arguments."""
    names = ("dt_bias", "a_log", "log_decay", "beta", "partials")
    types = dict.fromkeys((*names, "log_decay_grad", "beta_grad"), "*fp32")
    names = ("decay", "write_strength", "decay_grad", "write_strength_grad")
    types |= dict.fromkeys(names, "*bf16")
    known = dict(STEPS=4) | gates_of(8)
    functions = (triton_gates.gates, triton_gates.gate_gradients)
    launch = Launch(0, 0, 4, 3)
    return [Kernel(x.__name__, x, launch, known) for x in functions], types


def report(target, arch, found, types):
    """Prints each kernel's name; for an NVIDIA GPU registers and stack too."""
    types = {**types, **dict.fromkeys(_INTEGERS, "i32")}
    for kernel in found:
        binary = compiled(kernel, types, target, arch)
        line = kernel.name
        if target == "cuda":
            used = resources(binary)
            line += f" {used.registers} {used.stack}"
        print(line, flush=True)


if __name__ == "__main__":
    target, arch = sys.argv[1:]
    chip = target, int(arch) if target == "cuda" else arch
    report(*chip, *mixing_kernels(BENCHMARK))
    # The most registers: many rows a token, in float32.
    most = BENCHMARK._replace(name="most-rows", k=8, dtype="float32")
    report(*chip, *mixing_kernels(most))
    report(*chip, *routing_kernels())
    report(*chip, *statistics_kernels())
    report(*chip, *gate_kernels())
    report(*chip, *packing_kernels())
