"""L2 normalization, as delta rules apply it to queries and keys."""

from keras import ops

from keras_mom import backend


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
    batch, rows, *rest = ops.shape(tensors[0])
    size = backend.block_elements()
    if size is not None:
        for width in (batch, *rest):
            size = size // max(1, width)
        size = max(64, size)
    for start in range(0, rows, size) if size else [0]:
        stop = start + size if size else rows
        yield [ops.cast(x[:, start:stop], "float32") for x in tensors]


def _inverse_norm(x, epsilon):
    squares = ops.sum(ops.square(x), axis=-1, keepdims=True)
    return ops.rsqrt(squares + epsilon)


def _joined(blocks):
    return blocks[0] if len(blocks) == 1 else ops.concatenate(blocks, axis=1)


def _forward(options, x):
    return (_joined([x * _inverse_norm(x, *options) for (x,) in _blocks(x)]),)


def _backward(options, tensors, outputs, gradients):
    grads = []
    for x, gradient in _blocks(tensors[0], gradients[0]):
        scale = _inverse_norm(x, *options)
        along = ops.sum(gradient * x, axis=-1, keepdims=True)
        grad = scale * gradient - x * (scale * scale * scale * along)
        grads.append(ops.cast(grad, tensors[0].dtype))
    return (_joined(grads),)


_NORMALIZE = backend.Differentiable(
    "l2_normalize",
    _forward,
    _backward,
    lambda _, x: ((tuple(x.shape), "float32"),),
)
