"""Layers with fixed weights, and their calls and gradients, alike on every backend."""

import collections
import weakref

import keras
import ml_dtypes
import numpy as np

import keras_mom

BACKEND = keras.backend.backend()

if BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch

    # Threads cost more than they give at these sizes, most of all under pytest-xdist.
    torch.set_num_threads(1)
else:
    import tensorflow as tf

# TensorFlow traces for seconds: where a test is not about that, it runs eagerly.
EAGERLY = BACKEND == "tensorflow"
# The rule that compilers are quickest with, for what does not depend on the rule.
QUICK = {"update_rule": "linear_attention"}
# Compiled functions by layer: eager JAX compiles operation by operation.
_COMPILED = weakref.WeakKeyDictionary()


def make_layer(width=12, batch=None, seed=0, **kwargs):
    """A built `MoMLayer` with the same weights on every backend."""
    kwargs = {"num_heads": 2, "key_dim": 6, "value_dim": 10, **kwargs}
    layer = keras_mom.MoMLayer(**kwargs)
    layer.build((batch, None, width))
    set_weights(layer, seed)
    return layer


def set_weights(layer, seed=0):
    """Random weights at which every part of the layer matters."""
    rng = np.random.default_rng(seed)
    for name, variable in variables_of(layer).items():
        value = rng.normal(size=variable.shape)
        if name == "norm_scale":
            value = 1 + 0.3 * value
        elif name == "dt_bias":
            value = -1 + 0.5 * value
        elif name == "A_log":
            value = 0.5 * value
        elif "convolution" in name:
            value = 0.6 * value
        elif name == "router":
            value = value * 2 / np.sqrt(variable.shape[0])
        else:
            value = value / np.sqrt(variable.shape[0])
        variable.assign(value.astype("float32"))


def variables_of(layer):
    """The trainable variables of a layer by the names of the reference."""
    variables = {
        "router": layer.router.kernel,
        "query": layer.query_projection.kernel,
        "key": layer.key_projection.kernel,
        "value": layer.value_projection.kernel,
        "output": layer.output_projection.kernel,
        "norm_scale": layer.norm_scale,
    }
    if layer.gate_projection is not None:
        variables["gate"] = layer.gate_projection.kernel
    if layer.convolution_kernels is not None:
        for name, kernel in zip(("query", "key", "value"), layer.convolution_kernels):
            variables[f"{name}_convolution"] = kernel
    rule = layer.update_rule
    for variable in rule.trainable_variables:
        # "decay" of "mom/gated_delta_net/decay/kernel".
        name = variable.path.rpartition(f"{rule.name}/")[2].removesuffix("/kernel")
        assert name not in variables
        variables[name] = variable
    return variables


STAY_FLOAT32 = ("router", "A_log", "dt_bias", "forget_bias", "decay_bias", "bonus")


def to_bfloat16(x):
    """The nearest bfloat16 numbers, in the dtype of `x`."""
    return x.astype(ml_dtypes.bfloat16).astype(x.dtype)


def bfloat16_product(x, kernel):
    """The product of the framework's Dense layers in bfloat16, in the dtype of `x`.

    How often a framework rounds its sums depends on the processor.
    """
    rows, kernel = (
        keras.ops.convert_to_tensor(part.astype("float32"), dtype="bfloat16")
        for part in (np.atleast_2d(x), kernel)
    )
    result = to_numpy(keras.ops.cast(keras.ops.matmul(rows, kernel), "float32"))
    return result.reshape(*x.shape[:-1], -1).astype(x.dtype)


def round_to_bfloat16(layer):
    """Rounds the weights that a bfloat16 layer rounds: those of its projections."""
    for name, variable in variables_of(layer).items():
        if name not in STAY_FLOAT32:
            variable.assign(to_bfloat16(to_numpy(variable.value)))


def tokens(*shape, seed=1):
    """Standard normal float32 values."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def to_numpy(tree):
    """Tensors to NumPy arrays, floats as float32."""

    def convert(x):
        if keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)):
            x = keras.ops.cast(x, "float32")
        return np.array(keras.ops.convert_to_numpy(x))

    return keras.tree.map_structure(convert, tree)


def outputs_of(model, inputs):
    """The outputs of a model as NumPy arrays, in the way that takes the shortest time.

    TensorFlow traces `predict` for seconds; eager JAX compiles much more.
    """
    if BACKEND == "jax":
        return model.predict(inputs, verbose=0)
    return to_numpy(model(inputs))


def call(layer, inputs, training=False, **kwargs):
    """Calls a layer and returns NumPy arrays.

    Compiled once a shape on JAX, and on TensorFlow where a shape comes again and again.
    """
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if BACKEND == "torch":
        with torch.no_grad():
            kwargs = keras.tree.map_structure(keras.ops.convert_to_tensor, kwargs)
            inputs = keras.ops.convert_to_tensor(inputs)
            return to_numpy(layer(inputs, training=training, **kwargs))
    functions = _COMPILED.setdefault(layer, {})
    if (
        BACKEND == "tensorflow"
        and _calls_so_far(functions, training, inputs, kwargs) < 3
    ):
        # Tracing takes as long as a few eager calls.
        return to_numpy(layer(inputs, training=training, **kwargs))
    if training not in functions:
        # A strong reference from the function would keep the layer alive.
        functions[training] = _compile_call(weakref.ref(layer), training)
    if BACKEND == "tensorflow":
        return to_numpy(functions[training](inputs, kwargs))
    outputs, values = functions[training](
        [v.value for v in layer.trainable_variables],
        [v.value for v in layer.non_trainable_variables],
        inputs,
        kwargs,
    )
    for variable, value in zip(layer.non_trainable_variables, values):
        variable.assign(value)
    return to_numpy(outputs)


def _calls_so_far(functions, training, inputs, kwargs):
    counts = functions.setdefault("calls", collections.Counter())
    key = (training, inputs.shape, *sorted(kwargs))
    counts[key] += 1
    return counts[key] - 1


def _compile_call(layer, training):
    if BACKEND == "tensorflow":
        return tf.function(
            lambda inputs, kwargs: layer()(inputs, training=training, **kwargs),
            autograph=False,
        )

    def function(trainable, non_trainable, inputs, kwargs):
        return layer().stateless_call(
            trainable, non_trainable, inputs, training=training, **kwargs
        )

    return jax.jit(function)


def evaluate(layer, inputs, cotangent, training=True, **kwargs):
    """Calls a layer and differentiates `sum(output * cotangent)`.

    The losses of the layer do not count, nor does its state.

    Returns:
        The outputs, the gradient of the inputs, and a dict of the gradients of
        `variables_of(layer)`.
    """
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    named = variables_of(layer)
    values = [v.value for v in named.values()]
    if BACKEND == "jax":
        trainable = [v.value for v in layer.trainable_variables]
        (_, outputs), (of_inputs, of_trainable) = _jax_gradient(layer, training)(
            inputs, trainable, cotangent, kwargs
        )
        place = {id(v): i for i, v in enumerate(layer.trainable_variables)}
        of_weights = [of_trainable[place[id(v)]] for v in named.values()]
    elif BACKEND == "torch":
        inputs = torch.tensor(inputs, requires_grad=True)
        kwargs = keras.tree.map_structure(keras.ops.convert_to_tensor, kwargs)
        outputs = layer(inputs, training=training, **kwargs)
        loss = (first(outputs) * torch.tensor(cotangent)).sum()
        of_inputs, *of_weights = torch.autograd.grad(
            loss, [inputs, *values], allow_unused=True
        )
        outputs = keras.tree.map_structure(torch.detach, outputs)
    else:
        inputs = tf.convert_to_tensor(inputs)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=training, **kwargs)
            loss = tf.reduce_sum(first(outputs) * cotangent)
        of_inputs, *of_weights = tape.gradient(loss, [inputs, *values])
    of_weights = {
        name: np.zeros(v.shape, "float32") if g is None else to_numpy(g)
        for (name, v), g in zip(named.items(), of_weights)
    }
    return to_numpy(outputs), to_numpy(of_inputs), of_weights


def _jax_gradient(layer, training):
    functions = _COMPILED.setdefault(layer, {})
    if ("gradient", training) not in functions:
        reference = weakref.ref(layer)

        def loss(inputs, trainable, cotangent, kwargs):
            layer = reference()
            non_trainable = [v.value for v in layer.non_trainable_variables]
            outputs, _ = layer.stateless_call(
                trainable, non_trainable, inputs, training=training, **kwargs
            )
            return (first(outputs) * cotangent).sum(), outputs

        functions["gradient", training] = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        )
    return functions["gradient", training]


def first(outputs):
    """The output, without the state."""
    return outputs[0] if isinstance(outputs, tuple | list) else outputs


def relative_rms(actual, expected):
    """Root mean square of the error over that of the expected values."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = np.sqrt(np.mean(expected**2))
    return float(np.sqrt(np.mean((actual - expected) ** 2)) / max(scale, 1e-30))


def assert_close(actual, expected, limit):
    """Holds the relative RMS error of each tensor of two trees to a limit."""
    keras.tree.assert_same_structure(actual, expected)
    pairs = zip(keras.tree.flatten(actual), keras.tree.flatten(expected))
    for place, (a, e) in enumerate(pairs):
        assert a.shape == e.shape
        error = relative_rms(a, e) if np.any(e) else np.abs(a).max(initial=0)
        assert error < limit, f"tensor {place}: error {error:.3e}, limit {limit:.0e}"
