"""Compiles the packed convolution's Triton kernels for a GPU that need not be there."""

import sys

import offline

from keras_mom_kernels.memory_scan.configurations import Launch
from keras_mom_kernels.packed_convolution import triton_rows
from keras_mom_kernels.packed_convolution.torch import launches

_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
_ROWS = ("inputs", "output", "output_grad", "sum_grads", "input_grad")


def kernels(width, heads, dtype, *, documents=True, taps=4, targets=3):
    """The kernels of a forward and a backward pass, and the types of their arguments.

    `heads` is 0 where none are normalized.
    """
    types = dict.fromkeys(_ROWS, _POINTERS[dtype])
    types |= dict.fromkeys(("kernel", "partials"), "*fp32")
    types |= dict.fromkeys(("source", "targets"), "*i32")
    types |= dict.fromkeys(("length", "rows"), "i32")
    types["epsilon"] = "fp32"
    if documents:
        types["documents"] = "*i32"
    options = dict(
        DOCUMENTS=documents,
        TAPS=taps,
        TARGETS=targets,
        SILU=taps > 0,
        NORMALIZE=heads > 0,
    )
    found = []
    plan = launches(width, heads, 2**16)
    for name, (blocks, _, warps) in plan.items():
        launch = Launch(0, 0, warps, 1)
        function = getattr(triton_rows, name)
        found.append(offline.Kernel(name, function, launch, {**options, **blocks}))
    return found, types


def report(target, arch, width, heads, dtype):
    """Prints name, registers, stack and 16-byte loads of each kernel, a line each."""
    found, types = kernels(width, heads, dtype)
    for kernel in found:
        binary = offline.compiled(kernel, types, target, arch)
        line = kernel.name
        if target == "cuda":
            used = offline.resources(binary)
            wide = binary.asm["ptx"].count("ld.global.v4.b32")
            line += f" {used.registers} {used.stack} {wide}"
        print(line, flush=True)


if __name__ == "__main__":
    target, arch, width, heads, dtype = sys.argv[1:]
    report(
        target, int(arch) if target == "cuda" else arch, int(width), int(heads), dtype
    )
