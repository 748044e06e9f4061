"""The short convolution of packed rows on torch through Triton kernels.

    from keras_mom_kernels.packed_convolution.torch import packed_convolution

Runs on NVIDIA GPUs from sm_80 on, and on AMD; on a CPU with `TRITON_INTERPRET=1`. One
kernel takes the rows, convolves and normalizes them; each row is read and written
once. Nothing is read back to the host. Two custom operators with fakes and a gradient
stand for it in `torch.compile`. The backward pass keeps the inputs alone. A row's
results do not depend on what else is in the batch, and are the same in each run: no
kernel uses atomics.
"""

from typing import NamedTuple

import torch
import triton

from keras_mom_kernels.memory_scan.torch import check_device
from keras_mom_kernels.memory_scan.torch_launches import on
from keras_mom_kernels.packed_convolution.triton_rows import (
    convolve_rows,
    input_gradients,
    row_gradients,
)

# Channels of a head that a program holds in one piece.
_WIDEST_HEAD = 1024
# Packed rows that keep a GPU busy with fewer, longer programs.
_MANY_ROWS = 2**14


def packed_convolution(
    inputs: torch.Tensor,
    kernel: torch.Tensor | None,
    source: torch.Tensor,
    targets: torch.Tensor,
    *,
    documents: torch.Tensor | None = None,
    activation: str | None = "silu",
    heads: int | None = None,
    epsilon: float = 1e-6,
) -> torch.Tensor:
    """Takes rows into a packed layout and mixes each with the rows before it.

    With `x_r = inputs[source[r]]`, and zeros for an empty row:

        y_r = activation(sum_i kernel[i] * x_{r - W + i})       i from 0 to W
        y_r = y_r / sqrt(sum(y_r^2) + epsilon)                  a head, with `heads`

    Rows before row 0 count as zeros. Sums are float32. Differentiable in inputs and
    kernel, once.

    Args:
        inputs: float32, bfloat16 or float16 `[B, S, E]`. Rows that `source` does not
            name may hold anything.
        kernel: floating `[W + 1, E]`; its last row meets the current row. None for no
            convolution, and no activation.
        source: int32 `[B, R]`, the row of `inputs` in each packed row, -1 for an empty
            row. Its values are not checked.
        targets: int32 `[B, S, J]`, the packed rows that each row of `inputs` goes to,
            -1 for none: the inverse of `source`. The gradient needs it.
        documents: int32 `[B, R]`, or None for one document: rows of another document
            are not read.
        activation: `"silu"` or None.
        heads: number of heads to L2-normalize, a divisor of E, or None.
        epsilon: keeps the norm of an all-zero vector finite.

    Returns:
        `[B, R, E]`, of the dtype of `inputs`. Empty rows are zeros.

    Raises:
        NotImplementedError: if the kernels cannot serve the call, with the reason.
    """
    check_served(inputs, source, activation, heads)
    return _forward(
        inputs.contiguous(),
        None if kernel is None else kernel.contiguous(),
        source.to(torch.int32).contiguous(),
        targets.to(torch.int32).contiguous(),
        None if documents is None else documents.to(torch.int32).contiguous(),
        activation == "silu" and kernel is not None,
        0 if heads is None else heads,
        float(epsilon),
    )


def check_served(inputs, source, activation, heads):
    """Raises `NotImplementedError`, with the reason, for calls without a kernel."""
    check_device(inputs)
    if inputs.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise NotImplementedError(f"no Triton kernel for {inputs.dtype}")
    if activation not in ("silu", None):
        raise NotImplementedError(f"no Triton kernel for activation={activation!r}")
    width = inputs.shape[-1]
    if heads is not None and (width % heads or width // heads > _WIDEST_HEAD):
        raise NotImplementedError(
            f"the Triton kernels normalize heads of up to {_WIDEST_HEAD} channels, not "
            f"{heads} heads of {width} channels"
        )
    if max(inputs.shape[1], source.shape[1]) * width >= 2**31:
        raise NotImplementedError(
            "the Triton kernels take batch rows of up to 2**31 elements, not "
            f"{max(inputs.shape[1], source.shape[1])} rows of {width}"
        )


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        blocks: how channels and rows are divided among programs, as the kernel names
            it.
        rows: rows of a program.
        warps: warps of a program.
    """

    blocks: dict
    rows: int
    warps: int = 8

    def programs(self, batch, rows):
        """Programs of a group of channels."""
        return batch * triton.cdiv(rows, self.rows)

    def run(self, kernel, programs, *arguments, **options):
        """Launches `programs` programs a group of channels."""
        if programs:
            grid = (programs * self.blocks["GROUPS"],)
            options |= self.blocks
            kernel[grid](*arguments, **options, num_warps=self.warps, num_stages=1)


def launches(width, heads, rows):
    """`Launch` of each kernel, by name, for `rows` packed rows of all batch rows."""
    # What a thread holds of a tile leaves registers for two or three programs a
    # multiprocessor: 8 elements with the shares of the kernel's gradient, else 16.
    of_rows = _blocks(width, heads, 2048)
    # More steps a program: fewer shares of the kernel's gradient.
    of_rows["STEPS"] = steps = 8 if rows >= _MANY_ROWS else 1
    return {
        "convolve_rows": _launch(_blocks(width, heads, 4096)),
        "row_gradients": _launch(of_rows, steps),
        "input_gradients": _launch(_blocks(width, 0, 4096)),
    }


def _launch(blocks, steps=1):
    return Launch(blocks, blocks["ROWS"] * steps)


def _blocks(width, heads, elements):
    """Groups of channels, and up to 64 rows, of a tile of so many elements."""
    group = width // heads if heads else min(128, triton.next_power_of_2(width))
    block = triton.next_power_of_2(group)
    return dict(
        ROWS=max(4, min(64, elements // block)),
        GROUP=group,
        GROUPS=triton.cdiv(width, group),
        BLOCK=block,
        WIDTH=width,
    )


def _options(kernel, documents, silu, heads):
    return dict(
        DOCUMENTS=documents is not None,
        TAPS=0 if kernel is None else kernel.shape[0],
        SILU=silu,
        NORMALIZE=heads > 0,
    )


@torch.library.custom_op("keras_mom_kernels::packed_convolution", mutates_args=())
def _forward(
    inputs: torch.Tensor,
    kernel: torch.Tensor | None,
    source: torch.Tensor,
    targets: torch.Tensor,
    documents: torch.Tensor | None,
    silu: bool,
    heads: int,
    epsilon: float,
) -> torch.Tensor:
    batch, length, width = inputs.shape
    rows = source.shape[1]
    output = inputs.new_empty((batch, rows, width))
    options = _options(kernel, documents, silu, heads)
    launch = launches(width, heads, batch * rows)["convolve_rows"]
    with on(inputs.device):
        launch.run(
            convolve_rows,
            launch.programs(batch, rows),
            inputs,
            kernel,
            source,
            documents,
            output,
            length,
            rows,
            epsilon,
            **options,
        )
    return output


@_forward.register_fake
def _(inputs, kernel, source, targets, documents, silu, heads, epsilon):
    return inputs.new_empty((inputs.shape[0], source.shape[1], inputs.shape[2]))


@torch.library.custom_op(
    "keras_mom_kernels::packed_convolution_backward", mutates_args=()
)
def _backward(
    output_grad: torch.Tensor,
    inputs: torch.Tensor,
    kernel: torch.Tensor | None,
    source: torch.Tensor,
    targets: torch.Tensor,
    documents: torch.Tensor | None,
    silu: bool,
    heads: int,
    epsilon: float,
) -> list[torch.Tensor]:
    batch, length, width = inputs.shape
    rows = source.shape[1]
    options = _options(kernel, documents, silu, heads)
    taps = options["TAPS"]
    launch = launches(width, heads, batch * rows)
    of_rows, of_inputs = launch["row_gradients"], launch["input_gradients"]
    programs = of_rows.programs(batch, rows)
    sum_grads = torch.empty_like(output_grad)
    input_grad = torch.empty_like(inputs)
    partials = inputs.new_empty((programs, taps, width), dtype=torch.float32)
    with on(inputs.device):
        of_rows.run(
            row_gradients,
            programs,
            output_grad,
            inputs,
            kernel,
            source,
            documents,
            sum_grads,
            partials,
            length,
            rows,
            epsilon,
            **options,
        )
        of_inputs.run(
            input_gradients,
            of_inputs.programs(batch, length),
            sum_grads,
            kernel,
            targets,
            documents,
            input_grad,
            length,
            rows,
            DOCUMENTS=documents is not None,
            TAPS=taps,
            TARGETS=targets.shape[-1],
        )
    if kernel is None:
        return [input_grad]
    return [input_grad, partials.sum(0).to(kernel.dtype)]


@_backward.register_fake
def _(output_grad, inputs, kernel, source, targets, documents, silu, heads, epsilon):
    present = [inputs] if kernel is None else [inputs, kernel]
    return [torch.empty_like(x) for x in present]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _autograd_backward(ctx, output_grad):
    input_grad, *kernel_grad = _backward(
        output_grad.contiguous(), *ctx.saved_tensors, *ctx.options
    )
    return (input_grad, *(kernel_grad or [None]), *[None] * 6)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
