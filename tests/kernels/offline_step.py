"""Compiles the Triton kernels of a single token for a GPU that need not be there."""

import sys

from offline import Kernel, compiled, resources

from keras_mom_kernels.memory_scan.configurations import Launch
from keras_mom_kernels.memory_step.torch_launches import (
    convolution_constants,
    step_constants,
)
from keras_mom_kernels.memory_step.triton_convolution import convolve_token
from keras_mom_kernels.memory_step.triton_routing import spread_choices
from keras_mom_kernels.memory_step.triton_step import step_memories

_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}


def kernels(key_dim, value_dim, dtype):
    """The kernels as a gated delta rule launches them, and their arguments' types."""
    rows, float32 = _POINTERS[dtype], "*fp32"
    types = dict.fromkeys(("query", "key", "value"), rows)
    types |= {f"new_{name}": rows for name in ("query", "key", "value")}
    types |= {f"{name}_kernel": rows for name in ("query", "key", "value")}
    types |= dict.fromkeys(("window", "new_window", "state", "new_state"), float32)
    types |= dict.fromkeys(("log_decay", "beta", "weights", "output"), float32)
    types |= {"indices": "*i32", "mask": "*u8", "spread": float32, "choices": "i32"}
    types |= {"active": "*u8", "heads": "i32", "memories": "i32"}
    types |= {"epsilon": "fp32", "scale": "fp32"}

    sizes, warps = convolution_constants(key_dim, value_dim, 3)
    constants = dict(
        sizes,
        SETS=(0, 1, 2, 3, 4, 5),
        QUERY_SILU=True,
        KEY_SILU=True,
        VALUE_SILU=True,
        NORMALIZED_QUERY=True,
        NORMALIZED_KEY=True,
    )
    others = {name: x for name, x in types.items() if name != "state"}
    for in_place in (False, True):
        name = "convolve_token" + ("-in-place" if in_place else "")
        known = dict(constants, IN_PLACE=in_place)
        yield Kernel(name, convolve_token, Launch(0, 0, warps, 1), known), others
    constants = dict(MEMORIES=5, BLOCK=16, SHARED=True, MASKED=True)
    yield Kernel("spread_choices", spread_choices, Launch(0, 0, 1, 1), constants), types
    sizes, warps = step_constants(key_dim, value_dim)
    for decay in ("none", "head", "channel"):
        for in_place in (False, True):
            constants = dict(
                sizes,
                DECAY=decay,
                DELTA=True,
                EXCLUSIVE=False,
                BETA=True,
                READ_FIRST=False,
                IN_PLACE=in_place,
            )
            name = f"step_memories-{decay}" + ("-in-place" if in_place else "")
            launch = Launch(0, 0, warps, 1)
            taken = {
                x: y for x, y in types.items() if (x, decay) != ("log_decay", "none")
            }
            yield Kernel(name, step_memories, launch, constants), taken


if __name__ == "__main__":
    target, arch, *sizes, dtype = sys.argv[1:]
    arch = int(arch) if target == "cuda" else arch
    for kernel, types in kernels(*map(int, sizes), dtype):
        binary = compiled(kernel, types, target, arch)
        line = kernel.name
        if target == "cuda":
            used = resources(binary)
            line += f" {used.registers} {used.stack}"
        print(line, flush=True)
