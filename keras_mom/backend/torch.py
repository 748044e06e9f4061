"""Loops, hand-written gradients and device facts on torch."""

import ast
import contextlib
import functools
from typing import Any

import torch
from keras import ops
from keras.src.backend import in_stateless_scope

from keras_mom.backend import flat

gather_batch, fill_batch = flat.gather_batch, flat.fill_batch
softplus = ops.softplus


def scan(step, carry, length, shapes, reverse=False):
    """See `keras_mom.backend`."""
    del shapes
    outputs = [None] * length
    for index in reversed(range(length)) if reverse else range(length):
        carry, outputs[index] = step(carry, index)
    return carry, tuple(torch.cat(x, dim=1) for x in zip(*outputs))


_parsed = functools.cache(ast.literal_eval)


class Differentiable:
    """See `keras_mom.backend`.

    Both directions are custom operators, so that `torch.compile` sees one node and
    does not unroll the loops inside.
    """

    def __init__(self, name, forward, backward, infer, make_options: Any = tuple):
        self.name = name
        self.forward = forward
        self.backward = backward
        self.infer = infer
        self.make_options = make_options
        self._forward = self._register_forward()
        self._backward = self._register_backward()
        self._forward.register_autograd(
            self._autograd_backward, setup_context=self._setup_context
        )

    def __call__(self, options, *tensors) -> Any:
        if torch.compiler.is_exporting():
            # What is exported runs without this library, and so without its operators.
            return tuple(self.forward(options, *tensors))
        present = tuple(tensor is not None for tensor in tensors)
        values = [tensor for tensor in tensors if tensor is not None]
        # Text, because an operator takes no tuple.
        return tuple(self._forward(values, repr((tuple(options), present))))

    def _restore(self, values, key):
        options, present = _parsed(key)
        values = iter(values)
        tensors = [next(values) if there else None for there in present]
        return self.make_options(options), tensors

    def _register_forward(self):
        @torch.library.custom_op(
            f"keras_mom::{self.name}",
            mutates_args=(),
            schema="(Tensor[] tensors, str key) -> Tensor[]",
        )
        def forward(tensors, key):
            options, tensors = self._restore(tensors, key)
            return [x.contiguous() for x in self.forward(options, *tensors)]

        @forward.register_fake
        def _(tensors, key):
            options, restored = self._restore(tensors, key)
            return [
                tensors[0].new_empty(shape, dtype=getattr(torch, dtype))
                for shape, dtype in self.infer(options, *restored)
            ]

        return forward

    def _register_backward(self):
        @torch.library.custom_op(
            f"keras_mom::{self.name}_backward",
            mutates_args=(),
            schema=(
                "(Tensor[] tensors, Tensor[] outputs, Tensor[] gradients, str key)"
                " -> Tensor[]"
            ),
        )
        def backward(tensors, outputs, gradients, key):
            options, restored = self._restore(tensors, key)
            grads = self.backward(options, restored, outputs, gradients)
            return [
                grad.contiguous()
                for tensor, grad in zip(restored, grads)
                if tensor is not None and tensor.is_floating_point()
            ]

        @backward.register_fake
        def _(tensors, outputs, gradients, key):
            dense = torch.contiguous_format
            return [
                torch.empty_like(t, memory_format=dense)
                for t in tensors
                if t.is_floating_point()
            ]

        return backward

    @staticmethod
    def _setup_context(ctx, inputs, output):
        tensors, ctx.key = inputs
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors, *output)

    def _autograd_backward(self, ctx, gradients):
        saved = ctx.saved_tensors
        tensors, outputs = list(saved[: ctx.count]), list(saved[ctx.count :])
        gradients = [
            # Zeros that take no memory.
            output.new_zeros(()).expand(output.shape) if gradient is None else gradient
            for output, gradient in zip(outputs, gradients)
        ]
        grads = iter(self._backward(tensors, outputs, gradients, ctx.key))
        return [next(grads) if t.is_floating_point() else None for t in tensors], None


def compiled(function):
    """See `keras_mom.backend`. Operations need no compilation here."""
    return function


def decoding_program(function, read, written, jit_compile=None):
    """See `keras_mom.backend`. Memories are written in place where kernels can."""
    del read, written
    if jit_compile:
        function = torch.compile(function, dynamic=False)

    def call(carry, inputs):
        with torch.no_grad():
            return function(carry, inputs)

    return call


def add_product(total, left, right):
    """See `keras_mom.backend`. In place: new sums would scatter over the heap."""
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)


def sum_rows_by_index(rows, index, count):
    """See `keras_mom.backend`. In one order, whatever the device does first."""
    return torch.ops.aten.embedding_dense_backward(rows, index, count, -1, False)


def full_precision():
    """Context in which a float32 product is not rounded; torch's default."""
    return contextlib.nullcontext()


def accelerator():
    """`"cuda"`, `"mps"` or another device type; None on a CPU."""
    kind = ops.zeros((0,)).device.type  # of no numbers: nothing is launched
    return None if kind in ("cpu", "meta") else kind


def is_concrete(tensor):
    """Whether the values of `tensor` can be read here without a device sync."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(tensor, torch._subclasses.FakeTensor)
    )


def overwrites_variables():
    """See `keras_mom.backend`: not what the gradient reads, nor a caller's tensors."""
    return not (torch.is_grad_enabled() or in_stateless_scope())


def check_export(length):
    """See `keras_mom.backend`."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing and torch.onnx.is_in_onnx_export():
        raise ValueError(
            "A MoM layer is not exported to ONNX through TorchScript, whose trace "
            "holds for the lengths of its example alone and would be wrong for "
            "others. Keras goes that way where `input_signature` leaves a size open, "
            "and where the exporter of `torch.export` has failed, which needs `onnx` "
            "and `onnxscript`. Give every size, such as "
            "input_signature=[keras.layers.InputSpec(shape=(1, 128, 64))]."
        )
    if torch.compiler.is_exporting() and isinstance(length, torch.SymInt):
        raise ValueError(
            "A MoM layer is exported by `torch.export` for one number of tokens, since "
            "the loop over them is unrolled. Received: a dynamic number of tokens"
        )


def least_rows():
    """See `keras_mom.backend`."""
    return 1


def block_elements():
    """Elements that fit a core's cache together with a few arrays like them."""
    return None if accelerator() else 2**18


def unit_lower_inverse(strict):
    """See `keras_mom.backend`. Forward substitution, matrix by matrix."""
    if torch.compiler.is_exporting():
        return None  # ONNX has no triangular solve.
    identity = torch.eye(strict.shape[-1], dtype=strict.dtype, device=strict.device)
    return torch.linalg.solve_triangular(
        strict, identity.expand(strict.shape), upper=False, unitriangular=True
    )
