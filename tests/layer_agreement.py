"""A layer against its float64 reference."""

import numpy as np
import torch
from keras import tree

from tests.layer_helpers import assert_close, call, evaluate, relative_rms, tokens
from tests.layer_reference import mom_layer, weights_of

torch.set_num_threads(1)


def check_layer(layer, given, batch=2, length=75, smallest=0.0):
    """Output and state within 1e-5, gradients within 1e-4.

    The reference for gradients is torch's autograd of the token-by-token form, routed
    as the layer routes. A gradient that is smaller than `smallest` times the largest
    one is held to 1e-4 of that: those of saturated gates are 0 in float32, and as good
    as 0 in float64.
    """
    width = layer.router.kernel.shape[0]
    inputs, cotangent = (
        tokens(batch, length, width),
        tokens(batch, length, width, seed=2),
    )
    outputs, of_inputs, of_weights = evaluate(layer, inputs, cotangent, **given)

    x = torch.tensor(inputs.astype("float64"), requires_grad=True)
    weights = weights_of(layer, torch)
    if "initial_state" in given:
        state = tuple(torch.tensor(s.astype("float64")) for s in given["initial_state"])
        given = {**given, "initial_state": state}
    expected = mom_layer(layer, weights, x, xp=torch, **given)
    assert_close(
        outputs, tree.map_structure(lambda t: t.detach().numpy(), expected), 1e-5
    )
    (expected[0] * torch.tensor(cotangent)).sum().backward()
    assert relative_rms(of_inputs, x.grad) < 1e-4
    gradients = {k: w.grad for k, w in weights.items() if w.grad is not None}
    floor = smallest * max(_rms(gradient) for gradient in gradients.values())
    for name in weights:
        if name not in gradients or not gradients[name].any():
            # The router of a lone memory, or a document of one token.
            assert np.abs(of_weights[name]).max() < 1e-6, name
        else:
            error = _rms(of_weights[name] - gradients[name].numpy())
            assert error < 1e-4 * max(_rms(gradients[name]), floor), name


def check_outputs(layer, given, batch=2, length=75):
    """`check_layer` without gradients; what the layer returns."""
    inputs = tokens(batch, length, layer.router.kernel.shape[0])
    expected = mom_layer(layer, weights_of(layer), inputs.astype("float64"), **given)
    actual = call(layer, inputs, **given)
    assert_close(actual, expected, 1e-5)
    return actual


def _rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, "float64")))))
