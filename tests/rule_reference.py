"""Every update rule, one token at a time, as its own paper writes it.

Written from the equations, not through the form that the scan computes: transition
matrices are built and multiplied, gradients of losses are spelled out. A state is
`[H, K, V]`, and each function returns the next state and the output, `[H, V]`.
"""

import functools
from typing import Any, NamedTuple


class Token(NamedTuple):
    """What one memory makes of a token.

    Attributes:
        query, key: `[H, K]`.
        value: `[H, V]`.
        project: function of a weight's name and a width: the token's projection.
        low_rank: function of a projection's name, its rank, its width and an
            activation: the token's projection `[width]`.
        weights: the rule's other weights, by name.
        xp: `numpy` or `torch`.
    """

    query: Any
    key: Any
    value: Any
    project: Any
    low_rank: Any
    weights: dict
    xp: Any


def _sigmoid(x, xp):
    return 1 / (1 + xp.exp(-x))


def _softplus(x, xp):
    return xp.log1p(xp.exp(x))


def _unit(x, xp):
    return x / xp.sqrt((x**2).sum(-1)[:, None] + 1e-6)


def _outer(left, right):
    return left[:, :, None] * right[:, None, :]


def _erasing(strength, key, xp):
    """`I - b k k^T` of each head, `[H, K, K]`."""
    identity = xp.eye(key.shape[-1], dtype=xp.float64)
    return identity - strength[:, None, None] * _outer(key, key)


def _read(state, query, xp):
    """`S^T q / sqrt(K)` of each head."""
    return query.shape[-1] ** -0.5 * xp.einsum("hk,hkv->hv", query, state)


def linear_attention(rule, token, state):
    state = state + _outer(token.key, token.value)
    return state, _read(state, token.query, token.xp)


def retention(rule, token, state):
    heads = range(state.shape[0])
    decays = [1 - 2.0 ** (-5 - h) for h in heads]
    faded = token.xp.stack([decays[h] * state[h] for h in heads])
    state = faded + _outer(token.key, token.value)
    return state, _read(state, token.query, token.xp)


def lightning(rule, token, state):
    count = state.shape[0]
    slopes = [2.0 ** (-8 * h / count) for h in range(1, count + 1)]
    slopes = token.xp.exp(-rule.slope_scale * token.xp.asarray(slopes))
    faded = slopes[:, None, None] * state
    state = faded + _outer(token.key, token.value)
    return state, _read(state, token.query, token.xp)


def gla(rule, token, state):
    xp, shape = token.xp, token.key.shape
    gate = token.low_rank("decay", rule.rank, shape[0] * shape[1], None)
    decay = _sigmoid(gate, xp).reshape(shape) ** (1 / rule.temperature)
    state = decay[:, :, None] * state + _outer(token.key, token.value)
    return state, _read(state, token.query, token.xp)


def hgrn2(rule, token, state):
    bound = rule.lower_bound
    forget = bound + (1 - bound) * _sigmoid(token.key, token.xp)
    state = forget[:, :, None] * state + _outer(1 - forget, token.value)
    return state, _read(state, token.query, token.xp)


def mamba2(rule, token, state):
    xp = token.xp
    step = _softplus(
        token.project("step", state.shape[0]) + token.weights["dt_bias"], xp
    )
    rate = -xp.exp(token.weights["A_log"])
    kept = xp.exp(step * rate)[:, None, None] * state
    state = kept + _outer(token.key, step[:, None] * token.value)
    return state, _read(state, token.query, token.xp)


def delta_net(rule, token, state):
    xp = token.xp
    query, key = _unit(token.query, xp), _unit(token.key, xp)
    strength = _sigmoid(token.project("write_strength", state.shape[0]), xp)
    if rule.allow_negative_eigenvalues:
        strength = 2 * strength
    kept = xp.einsum("hij,hjv->hiv", _erasing(strength, key, xp), state)
    state = kept + strength[:, None, None] * _outer(key, token.value)
    return state, _read(state, query, token.xp)


def gated_delta_net(rule, token, state):
    xp, heads = token.xp, state.shape[0]
    query, key = _unit(token.query, xp), _unit(token.key, xp)
    step = _softplus(token.project("decay", heads) + token.weights["dt_bias"], xp)
    decay = xp.exp(-xp.exp(token.weights["A_log"]) * step)
    strength = _sigmoid(token.project("write_strength", heads), xp)
    transition = decay[:, None, None] * _erasing(strength, key, xp)
    kept = xp.einsum("hij,hjv->hiv", transition, state)
    state = kept + strength[:, None, None] * _outer(key, token.value)
    return state, _read(state, query, token.xp)


def kda(rule, token, state):
    xp, (heads, width) = token.xp, token.key.shape
    query, key = _unit(token.query, xp), _unit(token.key, xp)
    rank = width if rule.rank is None else rule.rank
    gate = token.low_rank("decay", rank, heads * width, None).reshape(heads, width)
    step = _softplus(gate + token.weights["dt_bias"], xp)
    decay = xp.exp(-xp.exp(token.weights["A_log"])[:, None] * step)
    strength = _sigmoid(token.project("write_strength", heads), xp)
    transition = _erasing(strength, key, xp) * decay[:, None, :]
    kept = xp.einsum("hij,hjv->hiv", transition, state)
    state = kept + strength[:, None, None] * _outer(key, token.value)
    return state, _read(state, query, token.xp)


def _loss_gradient(state, key, value, xp):
    """Of `1/2 |S^T k - v|^2` by S."""
    error = xp.einsum("hkv,hk->hv", state, key) - value
    return _outer(key, error)


def ttt(rule, token, state):
    xp = token.xp
    query, key = _unit(token.query, xp), _unit(token.key, xp)
    rate = _sigmoid(token.project("rate", state.shape[0]), xp) * rule.learning_rate
    gradient = _loss_gradient(state, key, token.value, xp)
    state = state - rate[:, None, None] * gradient
    return state, _read(state, query, token.xp)


def titans(rule, token, state):
    xp, heads = token.xp, state.shape[0]
    query, key = _unit(token.query, xp), _unit(token.key, xp)
    forgotten = token.project("forget", heads) + token.weights["forget_bias"]
    forgotten = _sigmoid(forgotten, xp)[:, None, None]
    rate = _sigmoid(token.project("rate", heads), xp)[:, None, None]
    gradient = _loss_gradient(state, key, token.value, xp)
    state = (1 - forgotten) * state - rate * gradient
    return state, _read(state, query, token.xp)


def rwkv7(rule, token, state):
    xp, (heads, width) = token.xp, token.key.shape
    key = _unit(token.key, xp)
    gate = token.low_rank("decay", rule.rank, heads * width, xp.tanh)
    gate = gate.reshape(heads, width) + token.weights["decay_bias"]
    decay = xp.exp(-0.6065306597126334 * _sigmoid(gate, xp))
    rate = _sigmoid(token.project("rate", heads), xp)
    identity = xp.eye(width, dtype=xp.float64)
    transition = decay[:, :, None] * identity - rate[:, None, None] * _outer(key, key)
    kept = xp.einsum("hij,hjv->hiv", transition, state)
    state = kept + rate[:, None, None] * _outer(key, token.value)
    return state, _read(state, token.query, token.xp)


def rwkv6(rule, token, state):
    xp, (heads, width) = token.xp, token.key.shape
    gate = token.low_rank("decay", rule.rank, heads * width, xp.tanh)
    gate = gate.reshape(heads, width) + token.weights["decay_bias"]
    decay = xp.exp(-xp.exp(gate))
    written = _outer(token.key, token.value)
    current = state + token.weights["bonus"][:, :, None] * written
    return decay[:, :, None] * state + written, _read(current, token.query, xp)


def gsa(rule, token, state):
    xp, heads = token.xp, state.shape[0]
    gate = _sigmoid(token.project("decay", heads * rule.num_slots), xp)
    decay = gate.reshape(heads, rule.num_slots) ** (1 / rule.temperature)
    key_dim = token.key.shape[-1]
    keys = decay[:, :, None] * state[..., :key_dim] + _outer(1 - decay, token.key)
    values = decay[:, :, None] * state[..., key_dim:] + _outer(1 - decay, token.value)
    attention = xp.exp(xp.einsum("hmk,hk->hm", keys, token.query))
    attention = attention / attention.sum(-1)[:, None]
    state = xp.concatenate([keys, values], -1)
    return state, xp.einsum("hm,hmv->hv", attention, values)


STEPS = {
    "linear_attention": linear_attention,
    "retention": retention,
    "lightning": lightning,
    "gla": gla,
    "gsa": gsa,
    "hgrn2": hgrn2,
    "mamba2": mamba2,
    "delta_net": delta_net,
    "gated_delta_net": gated_delta_net,
    "kda": kda,
    "ttt": ttt,
    "titans": titans,
    "rwkv6": rwkv6,
    "rwkv7": rwkv7,
}

# Whether query, key and value pass SiLU behind the convolution.
ACTIVATED = {"hgrn2": (True, False, False)}


def name_of(rule):
    """The name under which a layer takes a rule of this class."""
    return _name_of_class(type(rule))


@functools.cache
def _name_of_class(wanted):
    from keras_mom import rules

    return next(n for n in rules.names() if type(rules.get(n)) is wanted)
