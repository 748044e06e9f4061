"""Cross entropy of a projection to a vocabulary, without all of its logits."""

from typing import Any, NamedTuple

from keras import ops

from keras_mom import backend
from keras_mom.checks import check_positive
from keras_mom.ops.constants import at_least, select
from keras_mom.ops.padding import pad


def linear_cross_entropy(
    hidden,
    kernel,
    labels,
    weights=None,
    *,
    label_smoothing=0.0,
    z_loss=0.0,
    chunk_size=None,
):
    """Mean cross entropy of `softmax(hidden @ kernel)`.

    The tokens are taken a chunk at a time, forward and backward, so that no more than
    `[chunk_size, V]` logits exist at once. They are products in the dtype of `hidden`;
    the softmax, and all sums over tokens, are float32.

    Args:
        hidden: float `[B, T, D]`.
        kernel: float `[D, V]`; cast to the dtype of `hidden`.
        labels: integer `[B, T]`. Tokens with a negative label do not count; a label of
            V or more makes the loss NaN.
        weights: `[B, T]`, weights of the tokens, 0 or more, or None for 1. A token of
            weight 0 does not count, whatever `hidden` holds there.
        label_smoothing: share of the target that is spread over the vocabulary.
        z_loss: weight of the squared logarithm of the softmax's denominator, which
            keeps logits from drifting (arXiv 2204.02311, section 5).
        chunk_size: number of tokens whose logits exist at once. By default as many as
            have some millions of logits, or D.

    Returns:
        float32 `[]`: the weighted mean over the tokens that count, 0 if none does.
        There is a gradient for `hidden` and `kernel`, none for `weights`.

    Raises:
        ValueError: if shapes do not fit.
    """
    losses, _ = token_cross_entropy(
        hidden,
        kernel,
        labels,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk_size=chunk_size,
    )
    if weights is not None and len(weights.shape) != 2:
        raise ValueError(
            "`weights` must have the shape of `labels`, [B, T]. "
            f"Received: {tuple(weights.shape)}, labels {tuple(labels.shape)}"
        )
    return weighted_mean(losses, labels, weights)


def weighted_mean(values, labels, weights=None):
    """Mean over the tokens that count in the sense of `linear_cross_entropy`.

    Args:
        values: float32 `[B, T]`.
        labels, weights: as in `linear_cross_entropy`.

    Returns:
        float32 `[]`.
    """
    counted = counted_weights(labels, weights)
    # Not a product alone: a token that does not count may hold anything.
    total = ops.sum(select(counted > 0, values, 0.0) * counted)
    return total / at_least(ops.sum(counted), 1e-30)


def counted_weights(labels, weights=None):
    """Weights, float32 `[B, T]`, which are 0 where a label is negative."""
    labels = ops.convert_to_tensor(labels)
    if weights is None:
        return ops.cast(labels >= 0, "float32")
    weights = ops.stop_gradient(ops.cast(weights, "float32"))
    return select(labels >= 0, weights, 0.0)


def token_cross_entropy(
    hidden, kernel, labels, *, label_smoothing=0.0, z_loss=0.0, chunk_size=None
):
    """Cross entropy of each token.

    Args:
        hidden, kernel, labels, label_smoothing, z_loss, chunk_size: as in
            `linear_cross_entropy`.

    Returns:
        Losses, float32 `[B, T]`, 0 at negative labels; and whether the label is among
        the most probable tokens, float32 `[B, T]`, 0 or 1, without a gradient.
    """
    hidden = ops.convert_to_tensor(hidden)
    # Cast inside, so that its gradient is not rounded.
    kernel = ops.convert_to_tensor(kernel)
    labels = ops.cast(labels, "int32")
    _check(hidden, kernel, labels, label_smoothing, z_loss, chunk_size)
    batch, length, width = ops.shape(hidden)
    # A loop over chunks needs to know how large they are.
    flat = not isinstance(batch, int)
    if flat:
        hidden = ops.reshape(hidden, (1, batch * length, width))
        labels = ops.reshape(labels, (1, batch * length))
    rows = hidden.shape[0]
    chunk = _chunk_length(rows, hidden.shape[1], kernel.shape, chunk_size)
    options = _Options(chunk, float(label_smoothing), float(z_loss))
    losses, correct, _ = _CROSS_ENTROPY(options, hidden, kernel, labels)
    if flat:
        losses = ops.reshape(losses, (batch, length))
        correct = ops.reshape(correct, (batch, length))
    return losses, ops.stop_gradient(correct)


def token_cross_entropy_of_logits(logits, labels, *, label_smoothing=0.0, z_loss=0.0):
    """`token_cross_entropy`, where the logits `[B, T, V]` are there already."""
    options = _Options(0, float(label_smoothing), float(z_loss))
    logits, labels = ops.cast(logits, "float32"), ops.cast(labels, "int32")
    losses, correct, _ = _of_logits(options, logits, labels)
    return losses, ops.stop_gradient(correct)


def _check(hidden, kernel, labels, label_smoothing, z_loss, chunk_size):
    if len(hidden.shape) != 3:
        raise ValueError(
            f"`hidden` must have shape [B, T, D]. Received: {tuple(hidden.shape)}"
        )
    if len(kernel.shape) != 2 or kernel.shape[0] != hidden.shape[2]:
        raise ValueError(
            f"`kernel` must have shape [{hidden.shape[2]}, V]. "
            f"Received: {tuple(kernel.shape)}"
        )
    known = zip(labels.shape, hidden.shape[:2])
    if len(labels.shape) != 2 or any(
        x != y for x, y in known if x is not None and y is not None
    ):
        raise ValueError(
            f"`labels` must have shape {tuple(hidden.shape[:2])}. "
            f"Received: {tuple(labels.shape)}"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            "`label_smoothing` must be at least 0 and less than 1. "
            f"Received: {label_smoothing}"
        )
    if not z_loss >= 0:
        raise ValueError(f"`z_loss` must be 0 or more. Received: {z_loss}")
    if chunk_size is not None:
        check_positive("chunk_size", chunk_size)


def _chunk_length(rows, length, kernel_shape, chunk_size):
    """Tokens of each row in a chunk; chunks of nearly equal length."""
    if chunk_size is None:
        # At least so many that a product takes longer than adding to the kernel's
        # gradient; their logits take no more memory than that does, or little.
        width, vocabulary = kernel_shape
        logits = 2**25 if backend.accelerator() else 2**21
        chunk_size = max(64, width, logits // vocabulary)
    chunk = max(1, chunk_size // rows)
    if length is None:
        return chunk
    chunks = max(1, -(-length // chunk))
    return max(1, -(-length // chunks))


class _Options(NamedTuple):
    """What is computed.

    Attributes:
        chunk: C, tokens of each row whose logits exist at once.
        label_smoothing, z_loss: as in `linear_cross_entropy`.
    """

    chunk: int
    label_smoothing: float
    z_loss: float


def _forward(options, hidden, kernel, labels):
    """Losses, whether the label leads, and the log of the softmax's denominator."""
    kernel = ops.cast(kernel, hidden.dtype)
    chunks = _Chunks(options.chunk, hidden)
    hidden, labels = chunks.fill(hidden), chunks.fill(labels, -1)

    def step(carry, index):
        x, label = chunks.take(hidden, index), chunks.take(labels, index)
        logits = ops.cast(ops.matmul(x, kernel), "float32")
        loss, leads, log_total = _of_logits(options, logits, label)
        return carry, (loss, leads, log_total)

    carry = ops.zeros((1,), "float32")
    _, outputs = backend.scan(step, carry, chunks.count, [chunks.shape] * 3)
    return tuple(chunks.join(x) for x in outputs)


def _of_logits(options, logits, labels):
    """What `_forward` returns, of logits float32 `[..., V]`."""
    smoothing, vocabulary = options.label_smoothing, logits.shape[-1]
    peak = ops.stop_gradient(ops.max(logits, axis=-1, keepdims=True))
    total = ops.sum(ops.exp(logits - peak), axis=-1)
    peak = peak[..., 0]
    log_total = peak + ops.log(total)
    possible = ops.logical_and(labels >= 0, labels < vocabulary)
    place = select(possible, labels, 0)[..., None]
    own = ops.take_along_axis(logits, place, axis=-1)[..., 0]
    target = own
    if smoothing:
        target = (1 - smoothing) * own + smoothing * ops.mean(logits, axis=-1)
    loss = log_total - target
    if options.z_loss:
        loss = loss + options.z_loss * log_total * log_total
    loss = select(labels >= 0, loss, 0.0)
    # An impossible label must not pass for a possible one.
    loss = select(labels < vocabulary, loss, float("nan"))
    leads = ops.cast(ops.logical_and(possible, own >= peak), "float32")
    return loss, leads, log_total


def _backward(options, tensors, outputs, gradients):
    hidden, kernel, labels = tensors
    dtype, kernel_dtype = hidden.dtype, kernel.dtype
    kernel = ops.cast(kernel, dtype)
    transposed = ops.transpose(kernel)
    smoothing, vocabulary = options.label_smoothing, kernel.shape[1]
    index_of_logit = ops.arange(vocabulary, dtype="int32")
    chunks = _Chunks(options.chunk, hidden)
    gradient = select(labels >= 0, gradients[0], 0.0)
    # A token of gradient 0 may hold anything.
    hidden = select((gradient != 0)[..., None], hidden, 0)
    log_totals = select(gradient != 0, outputs[2], 0.0)
    hidden, labels = chunks.fill(hidden), chunks.fill(labels, -1)
    gradient, log_totals = chunks.fill(gradient), chunks.fill(log_totals)

    def step(of_kernel, index):
        x, label, grad, log_total = [
            chunks.take(x, index)[0] for x in (hidden, labels, gradient, log_totals)
        ]
        grad, log_total = grad[:, None], log_total[:, None]
        logits = ops.cast(ops.matmul(x, kernel), "float32")
        scale = grad
        if options.z_loss:
            scale = grad * (1 + 2 * options.z_loss * log_total)
        of_logits = ops.exp(logits - log_total) * scale
        own = ops.cast(label[:, None] == index_of_logit, "float32")
        of_logits = of_logits - own * ((1 - smoothing) * grad)
        if smoothing:
            of_logits = of_logits - grad * (smoothing / vocabulary)
        of_logits = ops.cast(of_logits, dtype)
        of_kernel = backend.add_product(of_kernel[0], ops.transpose(x), of_logits)
        of_hidden = ops.matmul(of_logits, transposed)
        return of_kernel[None], (ops.cast(of_hidden, "float32")[None],)

    of_kernel = ops.zeros((1, *kernel.shape), "float32")
    shape = (*chunks.shape, kernel.shape[0])
    of_kernel, (of_hidden,) = backend.scan(step, of_kernel, chunks.count, [shape])
    of_hidden = ops.cast(chunks.join(of_hidden), dtype)
    return of_hidden, ops.cast(of_kernel[0], kernel_dtype), None


class _Chunks:
    """Tokens `[B, T, ...]` as chunks of C tokens of each row, `[1, B * C, ...]`.

    Rows stay apart up to there, so that each can be on a device of its own.

    Args:
        size: C.
        tokens: `[B, T, ...]`; B is a number, T may be a tensor.
    """

    def __init__(self, size, tokens):
        self.size = size
        self.rows, self.length = ops.shape(tokens)[:2]
        self.count: Any = (self.length + size - 1) // size
        self.shape = (1, self.rows * size)

    def fill(self, x, fill=0):
        """Whole chunks, `[B, count * C, ...]`."""
        return pad(x, 1, after=self.count * self.size - self.length, fill=fill)

    def take(self, x, index):
        """Chunk `index` of what `fill` returned."""
        rest = tuple(x.shape[2:])
        start = (0, index * self.size, *(0 for _ in rest))
        chunk = ops.slice(x, start, (self.rows, self.size, *rest))
        return ops.reshape(chunk, (*self.shape, *rest))

    def join(self, x):
        """`[B, T, ...]` of chunks side by side, `[1, count * B * C, ...]`."""
        rest = tuple(x.shape[2:])
        if self.rows > 1:
            x = ops.reshape(x, (self.count, self.rows, self.size, *rest))
            x = ops.swapaxes(x, 0, 1)
        x = ops.reshape(x, (self.rows, self.count * self.size, *rest))
        return x[:, : self.length]


def _infer(options, hidden, kernel, labels):
    del options, kernel, labels
    return ((tuple(hidden.shape[:2]), "float32"),) * 3


_CROSS_ENTROPY = backend.Differentiable(
    "linear_cross_entropy", _forward, _backward, _infer, _Options._make
)
