"""Compiles the scan's Triton kernels for a GPU that need not be there."""

import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from keras_mom_kernels.memory_scan import (
    triton_backward,
    triton_channel_gradients,
    triton_forward,
    triton_prepare,
    triton_row_gradients,
    triton_splits,
)
from keras_mom_kernels.memory_scan.configurations import (
    CHUNK_SIZE,
    Launch,
    configuration,
    power_of_two,
)

_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
_INTEGERS = ("splits", "length", "chunks", "segments", "heads", "rows", "width")


class Kernel(NamedTuple):
    """A kernel as it would be launched.

    Attributes:
        name: of the kernel, and what it is launched for.
        function: the Triton function.
        launch: `Launch`.
        constants: its constant arguments, by name, and more.
    """

    name: str
    function: object
    launch: Launch
    constants: dict


class Resources(NamedTuple):
    """What a compiled kernel takes: registers a thread, bytes of stack and shared."""

    registers: int
    stack: int
    shared: int
    seconds: float = 0.0


def kernels(
    key_dim,
    value_dim,
    dtype,
    decay,
    *,
    write="delta",
    erase_before_decay=False,
    layout="segments",
    beta=True,
    resets=False,
    initial_state=True,
    target="cuda",
    capability=90,
    config=None,
):
    """The kernels of a forward and a backward pass, and the types of their arguments.

    `layout` is `"segments"`, `"batch"` or `"ragged"`.
    """
    config = config or configuration(
        key_dim, value_dim, dtype, decay, erase_before_decay, target, capability
    )
    rows = _POINTERS[dtype]
    narrow = "*bf16" if config.precision == "bf16" else "*fp32"
    delta, decays = write == "delta", decay != "none"
    types = dict.fromkeys(
        ("query", "key", "value", "output", "output_grad", "write_grads"), rows
    )
    types |= dict.fromkeys(("query_grad", "key_grad"), rows)
    prepared = ("reading_query", "reading_key", "ending_key", "ending_rest")
    types |= dict.fromkeys(prepared, narrow if decay == "channel" else rows)
    types |= dict.fromkeys(("states", "state_grads", "writes", "squares"), narrow)
    if decay == "channel":
        types["writes"] = "*fp32"
    types |= dict.fromkeys(("attention", "inverse"), narrow)
    types |= dict.fromkeys(
        ("final", "final_grad", "pairs", "partials", "row_partials"), "*fp32"
    )
    types["level_partials"] = "*fp32"
    types["channels"] = "*fp32"
    types |= dict.fromkeys(_INTEGERS, "i32")
    types["scale"] = "fp32"
    if decays:
        decay_types = ("log_decay", "coarse", "fine", "log_decay_grad")
        types |= dict.fromkeys(decay_types, "*fp32")
    if beta:
        types |= dict.fromkeys(("beta", "beta_grad"), "*fp32")
    if initial_state:
        types |= dict.fromkeys(("initial", "initial_grad"), "*fp32")
    if resets:
        types["resets"] = "*i32"
    types["first"] = "*i32"
    joined = ("transitions", "ends", "start", "befores", "last")
    types |= dict.fromkeys(joined, "*fp32")
    if layout == "ragged":
        types["table"] = "*i32"
    if layout != "batch":
        types["offsets"] = "*i32"
    parts = 2 if config.split else 1
    constants = dict(
        K=key_dim,
        V=value_dim,
        C=CHUNK_SIZE,
        ROWS=CHUNK_SIZE,
        LAYOUT={"batch": "padded", "segments": "full"}.get(layout, layout),
        SEGMENTED=layout != "batch",
        DECAY=decay,
        DELTA=delta,
        EXCLUSIVE=erase_before_decay,
        BETA=beta,
        RESETS=resets,
        INITIAL=initial_state,
        PRECISION=config.precision,
        LEVEL_PRECISION=config.level,
        PARTS=parts,
        ATTENTION=True,
    )
    small = Launch(0, 0, 4, 1)
    result = []

    def add(name, function, launch, **changes):
        blocks = dict(BLOCK_K=launch.block_k, BLOCK_V=launch.block_v)
        stages = {"STAGES": launch.stages}
        known = {**constants, **blocks, **stages, **changes}
        result.append(Kernel(name, function, launch, known))

    if decays:
        width = 8 * (key_dim if decay == "channel" else 1)
        block = min(64, power_of_two(width))
        add("sum_decays", triton_prepare.sum_decays, small, BLOCK=block)
    add("pair_rows", triton_prepare.pair_rows, config.pairs)
    if delta:
        solve = triton_prepare.solve_pairs
        add("solve_pairs", solve, config.solve, PRECISION=config.exact)
    scan = triton_forward.scan_chunks
    modes = dict(OUTPUT=False, STATES=False, FINAL=False, IDENTITY=False)
    add("scan_chunks", scan, config.scan, **modes | dict(OUTPUT=True, FINAL=True))
    add("scan_chunks-states", scan, config.states, **modes | dict(STATES=True))
    add("scan_chunks-ends", scan, config.states, **modes | dict(FINAL=True))
    transition = modes | dict(FINAL=True, IDENTITY=True, INITIAL=False, V=key_dim)
    add("scan_chunks-transitions", scan, config.states, **transition)
    reverse = triton_backward.scan_gradients
    add("scan_gradients", reverse, config.reverse, STATES=True, FINAL=True)
    modes = dict(START=True, LAST=True, PRECISION=config.exact)
    modes |= dict(BLOCK_K=power_of_two(key_dim), STEP=config.join.block_k)
    for name, backward in (("join_splits", False), ("join_splits-back", True)):
        join = triton_splits.join_splits
        add(name, join, config.join, BACKWARD=backward, **modes)
    if decay == "channel":
        add("decay_rows", triton_prepare.decay_rows, config.levels)
        gradients = triton_channel_gradients
        for name in ("square_gradients", "crossing_gradients"):
            add(name, getattr(gradients, name), config.gradients)
        add("level_gradients", gradients.level_gradients, config.levels)
    else:
        gradients = triton_row_gradients
        add("row_gradients", gradients.row_gradients, config.gradients)
        add("solve_gradients", gradients.solve_gradients, config.solve_gradients)
    row_blocks = -(-key_dim // config.gradients.block_k)
    blocks = row_blocks
    if decay != "channel":
        blocks = -(-key_dim // config.solve_gradients.block_k)
    levels = -(-key_dim // config.levels.block_k)
    sums = dict(BLOCK=16, ROW_BLOCKS=row_blocks, BLOCKS=blocks, LEVELS=levels)
    add("sum_partials", triton_row_gradients.sum_partials, small, **sums)
    return result, types


def compiled(kernel, types, target="cuda", arch=90):
    """The compiled kernel, as Triton returns it."""
    signature, constants = {}, {}
    for index, name in enumerate(kernel.function.arg_names):
        if name in kernel.constants or name not in types:
            signature[name] = "constexpr"
            constants[(index,)] = kernel.constants.get(name)
        else:
            signature[name] = types[name]
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.function.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(
        fn=kernel.function,
        signature=signature,
        constexprs=constants,
        attrs=attributes,
    )
    launch = kernel.launch
    return triton.compile(
        source,
        target=GPUTarget(target, arch, 32 if target == "cuda" else 64),
        options=dict(num_warps=launch.warps, num_stages=launch.stages),
    )


def resources(binary):
    """`Resources` of a kernel compiled for an NVIDIA GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(binary.asm["cubin"])
    try:
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True).stdout
    finally:
        os.unlink(file.name)
    registers, stack = (
        int(re.search(rf"{name}:(\d+)", text)[1])  # type: ignore[index]
        for name in ("REG", "STACK")
    )
    return Resources(registers, stack, binary.metadata.shared)


def report(target, arch, key_dim, value_dim, dtype, decay):
    """Prints name, registers and stack of each kernel, a line each."""
    capability = arch if target == "cuda" else 0
    how = dict(target=target, capability=capability)
    for kernel, types in _each(kernels(key_dim, value_dim, dtype, decay, **how)):
        binary = compiled(kernel, types, target, arch)
        line = kernel.name
        if target == "cuda":
            used = resources(binary)
            line += f" {used.registers} {used.stack}"
        print(line, flush=True)


def _each(found):
    return [(kernel, found[1]) for kernel in found[0]]


if __name__ == "__main__":
    target, arch, *sizes, dtype, decay = sys.argv[1:]
    arch = int(arch) if target == "cuda" else arch
    report(target, arch, *map(int, sizes), dtype, decay)
