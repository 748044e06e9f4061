"""The MoM layer, token by token: what `keras_mom.MoMLayer` is held to.

Runs in float64 on NumPy, and on torch (`xp=torch`) for gradients. Written from the
equations of arXiv 2502.13685 alone, with those of the rules in `rule_reference`: no
packing, no chunks.
"""

import operator

import numpy as np

from tests.layer_helpers import to_numpy, variables_of
from tests.rule_reference import ACTIVATED, STEPS, Token, name_of


def weights_of(layer, xp=np):
    """float64 copies of a layer's weights by name."""
    weights = {}
    for name, variable in variables_of(layer).items():
        value = to_numpy(variable.value).astype("float64")
        weights[name] = value if xp is np else xp.tensor(value, requires_grad=True)
    return weights


def mom_layer(
    layer,
    weights,
    inputs,
    *,
    mask=None,
    segment_ids=None,
    initial_state=None,
    indices=None,
    product=operator.matmul,
    xp=np,
):
    """Runs the layer over a batch.

    Args:
        layer: `MoMLayer`; only its sizes and settings are read.
        weights: what `weights_of` gives.
        inputs: float64 `[B, T, D]`, in the order of processing.
        mask: bool `[B, T]` or None.
        segment_ids: integer `[B, T]` or None.
        initial_state: (memories, windows), or (memories,) without a convolution.
        indices: `[B, T, k]`, to route as told; else the most probable memories.
        product: the product of a token, or of several, with a projection's kernel:
            exact, or that of a compute dtype.
        xp: `numpy` or `torch`.

    Returns:
        Outputs `[B, T, D]` and the state.
    """
    outputs, states = [], []
    for row in range(inputs.shape[0]):
        state = empty_state(layer, xp)
        if initial_state is not None:
            state = [[x[row, m] for m in range(x.shape[1])] for x in initial_state]
        document, row_outputs = None, []
        for t in range(inputs.shape[1]):
            if mask is not None and not mask[row, t]:
                row_outputs.append(xp.zeros_like(inputs[row, t]))
                continue
            if segment_ids is not None:
                if document is not None and segment_ids[row, t] != document:
                    state = empty_state(layer, xp)
                document = segment_ids[row, t]
            fixed = None if indices is None else [int(i) for i in indices[row, t]]
            token = inputs[row, t]
            output, state = _step(layer, weights, token, state, fixed, product, xp)
            row_outputs.append(output)
        outputs.append(xp.stack(row_outputs))
        states.append([xp.stack(list(x)) for x in state])
    return xp.stack(outputs), tuple(xp.stack(list(x)) for x in zip(*states))


def lone_memory(layer, weights, inputs, product=operator.matmul):
    """`mom_layer` for one memory without a convolution, of one row, on NumPy.

    Projects all tokens at once, and so is fast enough for many.

    Args:
        layer, weights, product: as `mom_layer` takes them.
        inputs: float64 `[T, D]`.

    Returns:
        Outputs `[T, D]` and the memory `[H, K, V]`.
    """
    heads, key_dim, value_dim = layer.num_heads, layer.key_dim, layer.value_dim
    query, key, value = (
        product(inputs, weights[name]).reshape(-1, heads, width)
        for name, width in (
            ("query", key_dim),
            ("key", key_dim),
            ("value", value_dim),
        )
    )
    rule = layer.update_rule
    step = STEPS[name_of(rule)]
    projected = _ProjectedOnce(weights, inputs, product)
    state = np.zeros((heads, *rule.state_shape))
    mixed = []
    for t in range(len(inputs)):
        project, low_rank = projected.of_token(t)
        token = Token(query[t], key[t], value[t], project, low_rank, weights, np)
        state, output = step(rule, token, state)
        mixed.append(output)
    mixed = np.stack(mixed)
    mean_square = (mixed**2).mean(-1, keepdims=True)
    normalized = mixed / np.sqrt(mean_square + layer.norm_epsilon)
    output = (normalized * weights["norm_scale"]).reshape(len(inputs), -1)
    if layer.use_output_gate:
        output = output * _silu(product(inputs, weights["gate"]), np)
    return product(output, weights["output"]), state


class _ProjectedOnce:
    """A rule's projections of all tokens, made when the first token asks for them."""

    def __init__(self, weights, inputs, product):
        self.weights, self.inputs, self.product = weights, inputs, product
        self.of_name = {}

    def of_token(self, t):
        def project(name, width):
            if name not in self.of_name:
                self.of_name[name] = self.product(self.inputs, self.weights[name])
            return self.of_name[name][t]

        def low_rank(name, rank, width, activation):
            if name not in self.of_name:
                low = self.product(self.inputs, self.weights[f"{name}/down_kernel"])
                low = low if activation is None else activation(low)
                output = low @ self.weights[f"{name}/up_kernel"]
                if f"{name}/bias" in self.weights:
                    output = output + self.weights[f"{name}/bias"][0]
                self.of_name[name] = output
            return self.of_name[name][t]

        return project, low_rank


def empty_state(layer, xp=np):
    """Lists over memories: matrices `[H, K, V]`, and windows `[W, channels]`."""
    count = layer.num_memories + layer.shared_memory
    heads, key, value = layer.num_heads, layer.key_dim, layer.value_dim
    memory = (heads, *layer.update_rule.state_shape)
    state = [[xp.zeros(memory, dtype=xp.float64)] * count]
    if layer.conv_width is not None:
        shape = (layer.conv_width - 1, heads * (2 * key + value))
        state.append([xp.zeros(shape, dtype=xp.float64)] * count)
    return state


def _step(layer, weights, x, state, indices, product, xp):
    # 1. Router: the k most probable memories; ties go to the lowest index.
    logits = x @ weights["router"]
    exponentials = xp.exp(logits - logits.max())
    probabilities = exponentials / exponentials.sum()
    if indices is None:
        order = range(layer.num_memories)
        indices = sorted(order, key=lambda m: (-float(probabilities[m]), m))
        indices = indices[: layer.top_k]
    total = sum(probabilities[m] for m in indices)
    visits = [(m, probabilities[m] / total) for m in indices]
    if layer.shared_memory:
        visits.append((layer.num_memories, 1.0))

    # 2. to 5. Each memory projects, convolves, writes and reads; answers are mixed.
    state = [list(x) for x in state]
    mixed = 0.0
    for memory, weight in visits:
        answer = _visit(layer, weights, x, state, memory, product, xp)
        mixed = mixed + weight * answer

    # 7. RMS norm over each head's V channels, gate, output projection.
    mean_square = (mixed**2).mean(-1)[:, None]
    normalized = mixed / xp.sqrt(mean_square + layer.norm_epsilon)
    output = (normalized * weights["norm_scale"]).reshape(-1)
    if layer.use_output_gate:
        output = output * _silu(product(x, weights["gate"]), xp)
    return product(output, weights["output"]), state


def _visit(layer, weights, x, state, memory, product, xp):
    """Writes a token into one memory, in place of the lists, and reads: `[H, V]`."""
    heads, key_dim, value_dim = layer.num_heads, layer.key_dim, layer.value_dim
    rule_name = name_of(layer.update_rule)
    if layer.per_memory_projections:
        place = memory
    else:
        place = 1 if memory == layer.num_memories else 0

    def of_memory(name, width):
        return product(x, _columns(weights[name], place, width))

    raw = {
        "query": product(x, weights["query"]),
        "key": of_memory("key", heads * key_dim),
        "value": of_memory("value", heads * value_dim),
    }
    # 3. The convolution runs over this memory's own tokens.
    if layer.conv_width is not None:
        newest = xp.concatenate([raw["query"], raw["key"], raw["value"]])
        window = xp.concatenate([state[1][memory], newest[None]])
        state[1][memory] = window[1:]
        keys = heads * key_dim
        for name, part, activated in zip(
            ("query", "key", "value"),
            (slice(0, keys), slice(keys, 2 * keys), slice(2 * keys, None)),
            ACTIVATED.get(rule_name, (True, True, True)),
        ):
            convolved = (window[:, part] * weights[f"{name}_convolution"]).sum(0)
            raw[name] = _silu(convolved, xp) if activated else convolved

    # 4. Update and read.
    def low_rank(name, rank, width, activation):
        low = product(x, _columns(weights[f"{name}/down_kernel"], place, rank))
        low = low if activation is None else activation(low)
        output = low @ _columns(weights[f"{name}/up_kernel"], place, width)
        if f"{name}/bias" in weights:
            output = output + weights[f"{name}/bias"][place]
        return output

    token = Token(
        raw["query"].reshape(heads, key_dim),
        raw["key"].reshape(heads, key_dim),
        raw["value"].reshape(heads, value_dim),
        of_memory,
        low_rank,
        weights,
        xp,
    )
    after, output = STEPS[rule_name](layer.update_rule, token, state[0][memory])
    state[0][memory] = after
    return output


def _columns(kernel, place, width):
    return kernel[:, place * width : (place + 1) * width]


def _silu(x, xp):
    return x / (1 + xp.exp(-x))
