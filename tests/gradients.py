"""Values and gradients of functions of arrays, on the Keras backend at hand.

Functions are compiled once per function and shapes: hand in the same function object
again, and not a new lambda, to compile it once.
"""

import functools
import math
import re

import keras
import numpy as np
import torch
from keras import ops

# Threads of several test processes that wait for each other take most of the time.
torch.set_num_threads(1)


def evaluate(function, arrays):
    """Runs `function(**tensors)`, which returns a tuple of tensors.

    Args:
        function: what to run; compiled on JAX and TensorFlow.
        arrays: dict of NumPy arrays.

    Returns:
        The outputs, a tuple of NumPy arrays; low precision comes as float32.
    """
    return _to_numpy(_BACKEND[0](function)(_to_tensors(arrays)))


def value_and_grad(function, arrays, cotangents):
    """Runs `function(**tensors)`, and pulls cotangents back through it.

    Args:
        function: returns a tuple of float tensors; compiled on JAX and TensorFlow.
        arrays: dict of NumPy arrays.
        cotangents: an array for each output: what the gradients are a product with.

    Returns:
        The outputs, a tuple of NumPy arrays, and a dict of the gradients of all
        arrays of a float dtype. Low precision comes as float32.
    """
    tensors = _to_tensors(arrays)
    floats = {name: x for name, x in tensors.items() if "float" in str(x.dtype)}
    others = {name: x for name, x in tensors.items() if name not in floats}
    cotangents = tuple(ops.convert_to_tensor(x, "float32") for x in cotangents)
    outputs, gradients = _BACKEND[1](function)(floats, others, cotangents)
    return _to_numpy(outputs), dict(zip(gradients, _to_numpy(gradients.values())))


def _to_tensors(arrays):
    return {name: ops.convert_to_tensor(x, x.dtype.name) for name, x in arrays.items()}


def _to_numpy(tensors):
    return tuple(
        ops.convert_to_numpy(ops.cast(x, "float32") if "float" in str(x.dtype) else x)
        for x in tensors
    )


def _like(cotangents, outputs):
    return tuple(ops.cast(x, y.dtype) for x, y in zip(cotangents, outputs))


@functools.cache
def _jax_evaluate(function):
    import jax

    return jax.jit(lambda tensors: function(**tensors))


@functools.cache
def _jax_gradients(function):
    import jax

    def run(floats, others, cotangents):
        outputs, pull_back = jax.vjp(
            lambda floats: function(**floats, **others), floats
        )
        return outputs, pull_back(_like(cotangents, outputs))[0]

    return jax.jit(run)


@functools.cache
def _tensorflow_evaluate(function):
    import tensorflow as tf

    return tf.function(lambda tensors: function(**tensors), autograph=False)


@functools.cache
def _tensorflow_gradients(function):
    import tensorflow as tf

    @tf.function(autograph=False)
    def run(floats, others, cotangents):
        with tf.GradientTape() as tape:
            tape.watch(floats)
            outputs = function(**floats, **others)
        return outputs, tape.gradient(
            outputs,
            floats,
            output_gradients=_like(cotangents, outputs),
            unconnected_gradients="zero",
        )

    return run


def _torch_evaluate(function):
    def run(tensors):
        return tuple(output.detach() for output in function(**tensors))

    return run


def _torch_gradients(function):
    def run(floats, others, cotangents):
        leaves = {name: x.detach().requires_grad_() for name, x in floats.items()}
        outputs = function(**leaves, **others)
        gradients = torch.autograd.grad(
            outputs, leaves.values(), _like(cotangents, outputs), materialize_grads=True
        )
        outputs = tuple(output.detach() for output in outputs)
        return outputs, dict(zip(leaves, gradients))

    return run


_BACKEND = {
    "jax": (_jax_evaluate, _jax_gradients),
    "tensorflow": (_tensorflow_evaluate, _tensorflow_gradients),
    "torch": (_torch_evaluate, _torch_gradients),
}[keras.backend.backend()]


def reference_value_and_grad(function, arrays, cotangents):
    """`value_and_grad` of a function of torch tensors, in float64 on every backend."""

    def tensor(x):
        x = np.asarray(x)
        return torch.from_numpy(x if x.dtype.kind in "iub" else x.astype("float64"))

    tensors = {name: tensor(x) for name, x in arrays.items()}
    for x in tensors.values():
        x.requires_grad_(x.is_floating_point())
    outputs = function(**tensors)
    leaves = {name: x for name, x in tensors.items() if x.requires_grad}
    gradients = torch.autograd.grad(
        [x for x in outputs if x.requires_grad],
        leaves.values(),
        [tensor(c) for c, x in zip(cotangents, outputs) if x.requires_grad],
        materialize_grads=True,
    )
    gradients = [x.numpy() for x in gradients]
    return tuple(x.detach().numpy() for x in outputs), dict(zip(leaves, gradients))


def compiled_value_and_grad(function, arrays, cotangents, length):
    """`value_and_grad` through the backend's compiler, as its users call it.

    That is `jax.jit`, `tf.function(jit_compile=True)` without knowing axes 1 that are
    `length` long, and `torch.compile(fullgraph=True)`.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        function = torch.compile(function, fullgraph=True)
        return value_and_grad(function, arrays, cotangents)
    tensors = _to_tensors(arrays)
    floats = {name: x for name, x in tensors.items() if "float" in str(x.dtype)}
    others = {name: x for name, x in tensors.items() if name not in floats}
    inputs = floats, others, tuple(map(ops.convert_to_tensor, cotangents))
    if backend == "jax":
        run = _jax_gradients(function).__wrapped__
        outputs, gradients = _jit(run)(*inputs)
    else:
        outputs, gradients = _xla(_tensorflow_gradients(function), inputs, length)
    return _to_numpy(outputs), dict(zip(gradients, _to_numpy(gradients.values())))


# Undoes what `conftest.py` asks of XLA.
_AS_SHIPPED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}


def _jit(run):
    import jax

    return jax.jit(run, compiler_options=_AS_SHIPPED)


def _xla(function, inputs, length):
    import tensorflow as tf

    def specification(x):
        shape = x.shape.as_list()
        if shape[1:2] == [length]:
            shape[1] = None
        return tf.TensorSpec(shape, x.dtype)

    signature = tf.nest.map_structure(specification, inputs)
    run = tf.function(
        function.python_function,
        input_signature=signature,
        jit_compile=True,
        autograph=False,
    )
    return run(*inputs)


def kept_for_backward(function, arrays, cotangents):
    """Bytes that a forward pass keeps for its backward pass.

    TensorFlow does not tell; there it is the largest of all arrays that the two passes
    make, kept or not.
    """
    return _KEPT[keras.backend.backend()](function, arrays, cotangents)


def _jax_kept(function, arrays, cotangents):
    import jax

    _, pull_back = jax.vjp(lambda arrays: function(**arrays), arrays)
    return sum(x.nbytes for x in jax.tree.leaves(pull_back))


def _torch_kept(function, arrays, cotangents):
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tensors = {name: x.requires_grad_() for name, x in _to_tensors(arrays).items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = function(**tensors)
    total = sum(kept.values())
    del outputs  # Kept alive until here, and with it what it keeps.
    return total


def _tensorflow_kept(function, arrays, cotangents):
    import tensorflow as tf

    run = _tensorflow_gradients(function).python_function
    run = tf.function(run, jit_compile=True, autograph=False)
    inputs = _to_tensors(arrays), {}, tuple(map(tf.convert_to_tensor, cotangents))
    program = run.experimental_get_compiler_ir(*inputs)(stage="optimized_hlo")
    shapes = re.findall(r"\bf32\[([0-9,]+)\]", program)
    return 4 * max(math.prod(map(int, shape.split(","))) for shape in shapes)


_KEPT = {"jax": _jax_kept, "torch": _torch_kept, "tensorflow": _tensorflow_kept}
