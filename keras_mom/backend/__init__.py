"""The one place in `keras_mom` that imports a framework.

Each module of this package offers the same names for one Keras backend:

- `scan(step, carry, length, shapes, reverse)`: a loop without a gradient of its own.
  `step` takes a carry and an index, and returns a carry and a tuple of tensors of the
  carry's dtype and of these shapes, which are joined along their second axis, in index
  order;
- `Differentiable(name, forward, backward, infer, make_options)`: a function of tensors
  with a gradient written by hand, called as `function(options, *tensors)`. Options
  are a tuple of strings, numbers, booleans and None, which `make_options` makes of
  its items; tensors may be None.
  `forward(options, *tensors)` returns a tuple of tensors; those that a caller drops
  may serve as residuals. `backward(options, tensors, outputs, gradients)` returns a
  gradient, or None, for each of `tensors`. `infer(options, *tensors)` returns the
  (shape, dtype) of each output for tracers that do not run `forward`;
- `compiled(function)`: `function(options, *tensors)`, as one program where a call
  outside of a compiled function would compile every operation for itself. Options are
  hashable; tensors and results are tuples, named tuples and dicts of tensors and None;
- `decoding_program(function, read, written, jit_compile)`: `call(carry, inputs)`, one
  program of `function(carry, inputs)`, which returns a carry and outputs, all nested
  structures of tensors. The carry given is used up: its memory serves the next.
  `read` are the variables that the function reads, which it sees as they are at each
  call, and `written` those that it writes. `jit_compile` is True, False, or None
  for what is usual: all but torch compile;
- `gather_batch(inputs, index)`: `[B, R, E]` of the rows `index` int32 `[B, R]`, none
  of them negative, of each batch row of `[B, S, E]`;
- `fill_batch(size, index, values)`: int32 `[B, size]`, in each batch row `values` at
  the places `index`, both int32 `[B, N]`, and -1 elsewhere; those at `size` go nowhere;
- `add_product(total, left, right)`: `total + left @ right` of matrices, in the dtype of
  `total`, whose memory may serve the result;
- `sum_rows_by_index(rows, index, count)`: `[count, D]`, the sums of the rows `[N, D]`
  with each index, int32 `[N]`;
- `full_precision()`: a context in which float32 products are float32 products;
- `softplus(x)`: as in Keras, also behind an export that knows no log1p;
- `accelerator()`: the kind of accelerator in use, or None on a CPU;
- `is_concrete(tensor)`: whether the values can be read without a device sync;
- `overwrites_variables()`: whether a variable's tensor may be overwritten here, since
  nobody reads its old values any more;
- `block_elements()`: how many elements an elementwise computation should take at a
  time, so that its intermediates stay in the cache; None to take all at once;
- `least_rows()`: how many rows a product with a matrix should have, since with one it
  takes longer;
- `unit_lower_inverse(strict)`: `(I + A)^-1` of strictly lower triangular matrices
  `[..., C, C]`, by substitution; None where the framework's own is slow. It may return
  None where a call cannot have it;
- `check_export(length)`: raises where a trace of a sequence of this length, made for
  an export, would be wrong for other lengths without a word.
"""

import keras

if keras.backend.backend() == "jax":
    from keras_mom.backend import jax as _implementation
elif keras.backend.backend() == "torch":
    from keras_mom.backend import torch as _implementation
elif keras.backend.backend() == "tensorflow":
    from keras_mom.backend import tensorflow as _implementation
else:
    raise ImportError(
        "keras_mom runs on the Keras backends jax, torch and tensorflow. "
        f"Received: KERAS_BACKEND={keras.backend.backend()!r}"
    )

Differentiable = _implementation.Differentiable
accelerator = _implementation.accelerator
add_product = _implementation.add_product
compiled = _implementation.compiled
decoding_program = _implementation.decoding_program
fill_batch = _implementation.fill_batch
gather_batch = _implementation.gather_batch
full_precision = _implementation.full_precision
is_concrete = _implementation.is_concrete
scan = _implementation.scan
sum_rows_by_index = _implementation.sum_rows_by_index
softplus = _implementation.softplus
overwrites_variables = _implementation.overwrites_variables
block_elements = _implementation.block_elements
least_rows = _implementation.least_rows
check_export = _implementation.check_export
unit_lower_inverse = _implementation.unit_lower_inverse

__all__ = [
    "Differentiable",
    "accelerator",
    "add_product",
    "block_elements",
    "check_export",
    "compiled",
    "decoding_program",
    "fill_batch",
    "full_precision",
    "gather_batch",
    "is_concrete",
    "least_rows",
    "overwrites_variables",
    "scan",
    "sum_rows_by_index",
    "softplus",
    "unit_lower_inverse",
]
