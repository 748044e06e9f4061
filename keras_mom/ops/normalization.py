"""L2 normalization, as delta rules apply it to queries and keys."""

from keras import ops

from keras_mom import backend
from keras_mom.ops.blocks import join_blocks, row_blocks


def l2_normalize(x, epsilon=1e-6):
    """`x / sqrt(sum(x^2) + epsilon)` over the last axis, in float32.

    Args:
        x: float `[B, R, ..., K]`.
        epsilon: keeps an all-zero vector finite.

    Returns:
        float32, of the shape of `x`.
    """
    return _NORMALIZE((epsilon,), x)[0]


def _blocks(*tensors):
    """Blocks of rows that stay in the cache, float32."""
    for start, stop in row_blocks(ops.shape(tensors[0])):
        yield [ops.cast(x[:, start:stop], "float32") for x in tensors]


def _inverse_norm(x, epsilon):
    # LiteRT's converter makes an L2_NORMALIZATION of `ops.square`, without epsilon.
    squares = ops.sum(x * x, axis=-1, keepdims=True)
    return ops.rsqrt(squares + epsilon)


def _forward(options, x):
    return (join_blocks([x * _inverse_norm(x, *options) for (x,) in _blocks(x)]),)


def _backward(options, tensors, outputs, gradients):
    grads = []
    for x, gradient in _blocks(tensors[0], gradients[0]):
        scale = _inverse_norm(x, *options)
        along = ops.sum(gradient * x, axis=-1, keepdims=True)
        grad = scale * gradient - x * (scale * scale * scale * along)
        grads.append(ops.cast(grad, tensors[0].dtype))
    return (join_blocks(grads),)


_NORMALIZE = backend.Differentiable(
    "l2_normalize",
    _forward,
    _backward,
    lambda _, x: ((tuple(x.shape), "float32"),),
)
