"""Models of fixed weights, and their calls and gradients, alike on every backend."""

import keras
import numpy as np

from tests.layer_helpers import BACKEND, to_numpy

if BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch
else:
    import tensorflow as tf

# Compiled functions by model: eager JAX compiles operation by operation.
_COMPILED = {}


def randomize(model, seed=0):
    """Weights at which every part of a model matters."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        value = rng.normal(size=variable.shape)
        if len(variable.shape) < 2:
            value = 0.5 + 0.3 * value
        elif "embedding" not in variable.path:
            value = value / np.sqrt(variable.shape[0])
        variable.assign(value.astype("float32"))
    return model


def forward(model, inputs):
    """The outputs of a model in inference, as NumPy arrays."""
    if BACKEND == "torch":
        with torch.no_grad():
            return to_numpy(model(inputs))
    if BACKEND == "tensorflow":
        return to_numpy(model(inputs))
    key = (id(model), "forward")
    if key not in _COMPILED:

        def function(trainable, non_trainable, inputs):
            return model.stateless_call(trainable, non_trainable, inputs)[0]

        # The model too, so that no other one takes its id.
        _COMPILED[key] = model, jax.jit(function)
    return to_numpy(
        _COMPILED[key][1](
            [v.value for v in model.trainable_variables],
            [v.value for v in model.non_trainable_variables],
            inputs,
        )
    )


def read(model, token_ids, cache, *masks):
    """`model.call_with_cache`, compiled on JAX; tensors."""
    if BACKEND == "torch":
        with torch.no_grad():
            return model.call_with_cache(token_ids, cache, *masks)
    if BACKEND == "tensorflow":
        return model.call_with_cache(token_ids, cache, *masks)
    key = (id(model), "read")
    if key not in _COMPILED:

        def function(values, *arguments):
            with keras.StatelessScope(zip(model.variables, values)):
                return model.call_with_cache(*arguments)

        _COMPILED[key] = model, jax.jit(function)
    values = [v.value for v in model.variables]
    return _COMPILED[key][1](values, token_ids, cache, *masks)


def gradients(model, inputs, cotangent):
    """Of `sum(output * cotangent)` and the model's losses, in training.

    Returns:
        The number of losses, the gradients of all trainable variables, and the
        non-trainable variables behind the call.
    """
    trainable = [v.value for v in model.trainable_variables]
    if BACKEND == "jax":
        non_trainable = [v.value for v in model.non_trainable_variables]

        def loss(trainable):
            output, non_trainable_, losses = model.stateless_call(
                trainable, non_trainable, inputs, training=True, return_losses=True
            )
            total = (output * cotangent).sum() + sum(losses)
            return total, (non_trainable_, len(losses))

        function = jax.jit(jax.grad(loss, has_aux=True))
        found, (non_trainable, count) = function(trainable)
        return int(count), to_numpy(found), to_numpy(non_trainable)
    if BACKEND == "torch":
        loss = (model(inputs, training=True) * torch.tensor(cotangent)).sum()
        losses = model.losses
        found = torch.autograd.grad(loss + sum(losses), trainable)
    else:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(inputs, training=True) * cotangent)
            losses = model.losses
            loss += sum(losses)
        found = [tf.convert_to_tensor(x) for x in tape.gradient(loss, trainable)]
    non_trainable = [v.value for v in model.non_trainable_variables]
    return len(losses), to_numpy(list(found)), to_numpy(non_trainable)
