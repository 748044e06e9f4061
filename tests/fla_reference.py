"""`MomForCausalLM` in inference mode, in float64: what converted models are held to.

Written from the equations of flash-linear-attention 0.6.0's model, over tensors with
the names of its checkpoints: each memory takes the tokens that are routed to it, and
knows nothing of our packing, chunks or kernels.
"""

import numpy as np

SIZES = {
    "vocab_size": 19,
    "num_hidden_layers": 2,
    "hidden_size": 12,
    "num_heads": 2,
    "head_dim": 4,
    "expand_v": 1.5,
    "intermediate_size": 10,
    "num_memories": 3,
    "topk": 2,
    "conv_size": 4,
    "norm_eps": 1e-5,
}


def make_config(**changes):
    """A small config, as in `config.json`."""
    return {
        "model_type": "mom",
        "architectures": ["MomForCausalLM"],
        "shared_mem": True,
        "single_kv_proj": False,
        "use_output_gate": True,
        "tie_word_embeddings": False,
        "attn": None,
        **SIZES,
        **changes,
    }


def shapes_of(config):
    """Names and shapes of the tensors of a model."""
    c = config
    width, heads, inner = c["hidden_size"], c["num_heads"], c["intermediate_size"]
    keys, values = heads * c["head_dim"], round(heads * c["head_dim"] * c["expand_v"])
    shapes = {"model.embeddings.weight": (c["vocab_size"], width)}
    for i in range(c["num_hidden_layers"]):
        layer = {"attn_norm.weight": (width,), "mlp_norm.weight": (width,)}
        for name in ("gate", "up"):
            layer[f"mlp.{name}_proj.weight"] = (inner, width)
        layer["mlp.down_proj.weight"] = (width, inner)
        if c["attn"] and i in c["attn"]["layers"]:
            groups = c["attn"]["num_heads"] // c["attn"]["num_kv_heads"]
            for name in "qo":
                layer[f"attn.{name}_proj.weight"] = (width, width)
            for name in "kv":
                layer[f"attn.{name}_proj.weight"] = (width // groups, width)
        else:
            layer["attn.A_log"] = layer["attn.dt_bias"] = (heads,)
            layer["attn.q_proj.weight"] = (keys, width)
            layer["attn.gate.weight"] = (c["num_memories"], width)
            for name, units in (("k", keys), ("v", values), ("b", heads), ("a", heads)):
                if c["shared_mem"] or c["single_kv_proj"]:
                    layer[f"attn.shared_{name}.weight"] = (units, width)
                if not c["single_kv_proj"]:
                    for m in range(c["num_memories"]):
                        layer[f"attn.{name}_proj.{m}.weight"] = (units, width)
            for name, units in (("q", keys), ("k", keys), ("v", values)):
                layer[f"attn.{name}_conv1d.weight"] = (units, 1, c["conv_size"])
            if c["use_output_gate"]:
                layer["attn.g_proj.weight"] = (values, width)
            layer["attn.o_norm.weight"] = (values // heads,)
            layer["attn.o_proj.weight"] = (width, values)
        shapes |= {f"model.layers.{i}.{name}": x for name, x in layer.items()}
    shapes["model.norm.weight"] = (width,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], width)
    return shapes


def make_tensors(config, dtype="float32", seed=0):
    """Random tensors at which every part of the model matters."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes_of(config).items():
        value = rng.normal(size=shape)
        if name.endswith("norm.weight"):
            value = 1 + 0.3 * value
        elif name.endswith("dt_bias"):
            value = -1 + 0.5 * value
        elif name.endswith("A_log"):
            value = 0.5 * value
        elif name.endswith("conv1d.weight"):
            value = 0.6 * value
        elif name.endswith("attn.gate.weight"):
            value = value * 2 / np.sqrt(shape[-1])
        elif not name.startswith("model.emb"):
            value = value / np.sqrt(shape[-1])
        tensors[name] = value.astype(dtype)
    return tensors


def logits(tensors, config, tokens):
    """Logits, float64 `[B, T, vocabulary]`, of integer tokens `[B, T]`."""
    weights = {name: np.asarray(x, "float64") for name, x in tensors.items()}
    head = weights.get("lm_head.weight", weights["model.embeddings.weight"])
    return np.stack([_hidden(weights, config, row) @ head.T for row in tokens])


def _hidden(weights, config, tokens):
    epsilon = config["norm_eps"]
    x = weights["model.embeddings.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        layer = {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        inner = _rms_norm(x, layer["attn_norm.weight"], epsilon)
        of_attention = config["attn"] and i in config["attn"]["layers"]
        x = x + (_attention if of_attention else _mom)(layer, config, inner)
        inner = _rms_norm(x, layer["mlp_norm.weight"], epsilon)
        gate = _silu(inner @ layer["mlp.gate_proj.weight"].T)
        inner = gate * (inner @ layer["mlp.up_proj.weight"].T)
        x = x + inner @ layer["mlp.down_proj.weight"].T
    return _rms_norm(x, weights["model.norm.weight"], epsilon)


def _mom(layer, config, x):
    heads = config["num_heads"]
    scores = np.exp(x @ layer["attn.gate.weight"].T)
    scores = scores / scores.sum(-1, keepdims=True)
    chosen = np.argsort(-scores, axis=-1, kind="stable")[:, : config["topk"]]
    values = layer["attn.o_proj.weight"].shape[1]
    mixed = np.zeros((len(x), heads, values // heads))
    for m in range(config["num_memories"]):
        mine = np.flatnonzero((chosen == m).any(-1))
        total = np.take_along_axis(scores[mine], chosen[mine], axis=1).sum(-1)
        weight = scores[mine, m] / total
        of_set = "shared_{}" if config["single_kv_proj"] else f"{{}}_proj.{m}"
        answer = _memory(layer, config, x[mine], of_set)
        mixed[mine] += weight[:, None, None] * answer
    if config["shared_mem"]:
        mixed += _memory(layer, config, x, "shared_{}")
    mixed = _rms_norm(mixed, layer["attn.o_norm.weight"], config["norm_eps"])
    output = mixed.reshape(len(x), values)
    if config["use_output_gate"]:
        output = output * _silu(x @ layer["attn.g_proj.weight"].T)
    return output @ layer["attn.o_proj.weight"].T


def _memory(layer, config, x, of_set):
    """What one memory answers to the tokens that are its own: `[n, H, V]`."""
    heads = config["num_heads"]

    def project(name):
        name = "q_proj" if name == "q" else of_set.format(name)
        return x @ layer[f"attn.{name}.weight"].T

    def convolve(name):
        kernel = layer[f"attn.{name}_conv1d.weight"][:, 0]
        width = kernel.shape[1]
        padded = np.pad(project(name), ((width - 1, 0), (0, 0)))
        taps = [padded[j : j + len(x)] * kernel[:, j] for j in range(width)]
        return _silu(sum(taps)).reshape(len(x), heads, -1)

    query, key, value = _l2(convolve("q")), _l2(convolve("k")), convolve("v")
    beta = 1 / (1 + np.exp(-project("b")))
    step = np.log1p(np.exp(project("a") + layer["attn.dt_bias"]))
    decay = np.exp(-np.exp(layer["attn.A_log"]) * step)
    state = np.zeros((heads, config["head_dim"], value.shape[-1]))
    outputs = np.zeros_like(value)
    for t in range(len(x)):
        state = state * decay[t][:, None, None]
        error = value[t] - np.einsum("hk,hkv->hv", key[t], state)
        state = state + np.einsum("hk,hv->hkv", key[t], beta[t][:, None] * error)
        outputs[t] = np.einsum("hk,hkv->hv", query[t], state)
    return outputs * config["head_dim"] ** -0.5


def _attention(layer, config, x):
    options = config["attn"]
    heads, of_keys = options["num_heads"], options["num_kv_heads"]
    size = x.shape[1] // heads

    def project(name, count):
        return (x @ layer[f"attn.{name}_proj.weight"].T).reshape(len(x), count, size)

    place = np.arange(len(x))
    frequency = options["rope_theta"] ** (-np.arange(0, size, 2) / size)
    angle = (place[:, None] * frequency)[:, None]

    def turn(x):
        first, second = np.split(x, 2, axis=-1)
        real = first * np.cos(angle) - second * np.sin(angle)
        return np.concatenate(
            [real, first * np.sin(angle) + second * np.cos(angle)], axis=-1
        )

    query, key = turn(project("q", heads)), turn(project("k", of_keys))
    key = np.repeat(key, heads // of_keys, axis=1)
    value = np.repeat(project("v", of_keys), heads // of_keys, axis=1)
    scores = np.einsum("thd,shd->hts", query, key) * size**-0.5
    distance = place[:, None] - place
    window = options["window_size"] or len(x)
    scores = np.where((distance >= 0) & (distance < window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    mixed = np.einsum("hts,shd->thd", weights, value).reshape(len(x), -1)
    return mixed @ layer["attn.o_proj.weight"].T


def _rms_norm(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def _l2(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def _silu(x):
    return x / (1 + np.exp(-x))
