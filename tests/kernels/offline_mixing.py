"""Compiles the memory mixing's Triton kernels for a GPU that need not be there."""

from offline import Kernel, compiled, resources

from keras_mom_kernels.memory_mixing import triton_mixing
from keras_mom_kernels.memory_mixing.shapes import BENCHMARK
from keras_mom_kernels.memory_mixing.torch import launch_of
from keras_mom_kernels.memory_scan.configurations import Launch

_POINTERS = {"bfloat16": "*bf16", "float32": "*fp32"}
_FLOAT32 = ("weights", "scale", "weights_grad", "partials")
_ROWS = ("outputs", "gate", "result", "output_grad", "outputs_grad", "gate_grad")


def kernels(case):
    """The kernels of both directions, and the types of their arguments."""
    types = dict.fromkeys(_FLOAT32, "*fp32") | {"targets": "*i32", "epsilon": "fp32"}
    types |= dict.fromkeys(_ROWS, _POINTERS[case.dtype])
    types |= dict.fromkeys(("tokens", "rows"), "i32")
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
        found.append(Kernel(function.__name__, function, how, constants))
    return found, types


def report(case):
    """Prints name, case, registers and stack of each kernel, a line each."""
    found, types = kernels(case)
    for kernel in found:
        used = resources(compiled(kernel, types))
        print(kernel.name, case.name, used.registers, used.stack, flush=True)


if __name__ == "__main__":
    report(BENCHMARK)
    # The most registers: many rows a token, in float32.
    report(BENCHMARK._replace(name="most-rows", k=8, dtype="float32"))
