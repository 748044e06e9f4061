"""What `config.json` of a published checkpoint says, in our arguments, and back."""

import numbers
from typing import NamedTuple

from keras_mom.convert.checkpoint import raise_problems


class Layout(NamedTuple):
    """A family of checkpoints.

    Attributes:
        architecture: name of the model's class.
        joined_gate: whether the gate of a feed-forward network and what it gates are
            projected by one matrix, the gate first.
        unused: names of tensors of a memory layer, `[H]`, that nothing reads.
        output_gate: the config's name for whether a memory layer's output is gated.
        defaults: what a config means by leaving a key out.
    """

    architecture: str
    joined_gate: bool
    unused: tuple
    output_gate: str
    defaults: dict


_DEFAULTS = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "vocab_size": 32000,
    "num_heads": 4,
    "head_dim": 256,
    "expand_v": 1.0,
    "num_memories": 4,
    "topk": 2,
    "shared_mem": True,
    "single_kv_proj": False,
    "conv_size": 4,
    "use_short_conv": True,
    "use_output_gate": True,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "attn": None,
    "tie_word_embeddings": False,
    "aux_loss_scale": 0.01,
    "mom_backend": "gated_deltanet",
    "attnres_block_size": None,
    "norm_first": False,
}
LAYOUTS = {
    # flash-linear-attention, and the folder `mom` of OpenSparseLLMs/MoM.
    "mom": Layout("MomForCausalLM", False, (), "use_output_gate", _DEFAULTS),
    # The folder `mom_naive` of OpenSparseLLMs/MoM.
    "mom_gated_deltanet": Layout(
        "MomGatedDeltaNetForCausalLM",
        True,
        ("D",),
        "use_gate",
        {
            **_DEFAULTS,
            "num_hidden_layers": 21,
            "num_heads": 6,
            "expand_v": 2.0,
            "num_memories": 8,
            "shared_mem": False,
            "use_gate": True,
        },
    ),
}
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "num_heads",
    "head_dim",
    "num_memories",
    "topk",
    "conv_size",
)
_ATTENTION_DEFAULTS = {
    "num_kv_heads": None,
    "window_size": None,
    "rope_theta": 10000.0,
    "qkv_bias": False,
    "qk_norm": False,
}


def layout_of(config):
    """The key of `LAYOUTS` that a config names.

    Raises:
        ValueError: if it names another model.
    """
    names = config.get("architectures") or []
    found = [x for x, layout in LAYOUTS.items() if layout.architecture in names]
    if not names and config.get("model_type", "mom") in LAYOUTS:
        found = [config.get("model_type", "mom")]
    if len(found) != 1:
        raise ValueError(
            "The checkpoint's config must name the architecture "
            f"{' or '.join(x.architecture for x in LAYOUTS.values())}. Received: "
            f"architectures={names!r}, model_type={config.get('model_type')!r}"
        )
    return found[0]


def to_backbone_arguments(config):
    """Arguments of `keras_mom.models.MoMBackbone`.

    Args:
        config: dict, as in `config.json`; keys left out have the defaults of
            `MomConfig`, and keys that change no output are passed over.

    Raises:
        ValueError: if the config names another model, or options that this library
            cannot represent; the message names all of them.
    """
    layout = LAYOUTS[layout_of(config)]
    given = {**layout.defaults, **config}
    problems, attention = _unsupported(given), {}
    if not problems:
        attention, problems = _attention_arguments(given)
    raise_problems(
        "The checkpoint's config cannot be represented.", {"options": problems}
    )
    value_dim = given["head_dim"] * given["expand_v"]
    return {
        "vocabulary_size": given["vocab_size"],
        "num_layers": given["num_hidden_layers"],
        "hidden_dim": given["hidden_size"],
        "num_heads": given["num_heads"],
        "key_dim": given["head_dim"],
        "value_dim": round(value_dim),
        "intermediate_dim": _inner_width(given),
        "tie_embeddings": bool(given["tie_word_embeddings"]),
        "num_memories": given["num_memories"],
        "top_k": given["topk"],
        "shared_memory": bool(given["shared_mem"]),
        "per_memory_projections": not given["single_kv_proj"],
        "conv_width": given["conv_size"],
        "use_output_gate": bool(given[layout.output_gate]),
        "balance_loss_weight": float(given["aux_loss_scale"]),
        "norm_epsilon": given["norm_eps"],
        **attention,
    }


def from_backbone_arguments(arguments, layout):
    """A config, of arguments of `keras_mom.models.MoMBackbone`, for a layout."""
    attention = None
    if arguments["attention_layers"]:
        attention = {
            "layers": list(arguments["attention_layers"]),
            "num_heads": arguments["num_attention_heads"],
            "num_kv_heads": arguments["num_key_value_heads"],
            "window_size": arguments["sliding_window"],
            "rope_theta": float(arguments["rope_max_wavelength"]),
            "qkv_bias": False,
        }
    expand = arguments["value_dim"] / arguments["key_dim"]
    return {
        "architectures": [LAYOUTS[layout].architecture],
        "model_type": layout,
        "vocab_size": arguments["vocabulary_size"],
        "num_hidden_layers": arguments["num_layers"],
        "hidden_size": arguments["hidden_dim"],
        "num_heads": arguments["num_heads"],
        "head_dim": arguments["key_dim"],
        # `mom_naive` takes sizes from it, which must be integers.
        "expand_v": int(expand) if expand.is_integer() else expand,
        "intermediate_size": arguments["intermediate_dim"],
        "hidden_act": "swish",
        "tie_word_embeddings": arguments["tie_embeddings"],
        "num_memories": arguments["num_memories"],
        "topk": arguments["top_k"],
        "shared_mem": arguments["shared_memory"],
        "single_kv_proj": not arguments["per_memory_projections"],
        "conv_size": arguments["conv_width"],
        "use_short_conv": True,
        LAYOUTS[layout].output_gate: arguments["use_output_gate"],
        "aux_loss_scale": arguments["balance_loss_weight"],
        "norm_eps": arguments["norm_epsilon"],
        "mom_backend": "gated_deltanet",
        "attn": attention,
    }


def _unsupported(given):
    """What a config asks for that is not here, a line each."""
    problems = []

    def refuse(name, expected):
        problems.append(f"{name}={given[name]!r}: {expected}")

    for name in _SIZES:
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            refuse(name, "must be a positive integer")
        elif value < 1:
            refuse(name, "must be a positive integer")
    if given["mom_backend"] != "gated_deltanet":
        refuse("mom_backend", "only 'gated_deltanet' is read")
    if given["hidden_act"] not in ("swish", "silu"):
        refuse("hidden_act", "only 'swish' is read")
    if not given["use_short_conv"]:
        refuse("use_short_conv", "a model without a convolution is not read")
    if given["norm_first"]:
        refuse("norm_first", "norms inside of the projections are not here")
    if given["attnres_block_size"] is not None:
        refuse("attnres_block_size", "residuals with attention are not here")
    try:
        value_dim = given["head_dim"] * given["expand_v"]
        whole = value_dim > 0 and abs(value_dim - round(value_dim)) < 1e-6
    except TypeError:
        whole = False
    if not whole:
        refuse("expand_v", "head_dim * expand_v must be a positive integer")
    return problems


def _attention_arguments(given):
    """Arguments for the attention layers, and what is not supported, a line each."""
    attention = given["attn"]
    if not attention:
        return {"attention_layers": ()}, []
    if isinstance(attention, dict):
        attention = [attention]
    problems, layers, rest = [], [], []
    for place, spec in enumerate(attention):
        at = f"attn[{place}]" if len(attention) > 1 else "attn"
        lacking = [x for x in ("layers", "num_heads") if x not in spec]
        if lacking:
            problems.append(f"{at}: lacks {', '.join(lacking)}")
            continue
        spec = {**_ATTENTION_DEFAULTS, **spec}
        layers += spec.pop("layers")
        spec["num_kv_heads"] = spec["num_kv_heads"] or spec["num_heads"]
        problems += [
            f"{at}.{name}={spec[name]!r}: not supported"
            for name in ("qkv_bias", "qk_norm")
            if spec[name]
        ]
        known = ("num_heads", "num_kv_heads", "window_size", "rope_theta")
        problems += [
            f"{at}.{name}={value!r}: not known"
            for name, value in spec.items()
            if name not in (*known, *_ATTENTION_DEFAULTS)
        ]
        rest.append({name: spec[name] for name in known})
    count = given["num_hidden_layers"]
    if len(set(layers)) < len(layers) or not set(layers) <= set(range(count)):
        problems.append(
            f"attn.layers={layers!r}: must be different indices below {count}"
        )
    problems += [
        f"attn.num_heads={x['num_heads']}: must divide hidden_size"
        for x in rest
        if given["hidden_size"] % x["num_heads"]
    ]
    if any(x != rest[0] for x in rest):
        problems.append(
            f"attn={attention!r}: attention layers must be alike but for `layers`"
        )
    if problems:
        return {}, problems
    return {
        "attention_layers": tuple(sorted(layers)),
        "num_attention_heads": rest[0]["num_heads"],
        "num_key_value_heads": rest[0]["num_kv_heads"],
        "sliding_window": rest[0]["window_size"],
        "rope_max_wavelength": rest[0]["rope_theta"],
    }, []


def _inner_width(given):
    """Width of the feed-forward layer, to the next multiple of 256 where not given."""
    if given["intermediate_size"] is not None:
        return given["intermediate_size"]
    ratio = 4 if given["hidden_ratio"] is None else given["hidden_ratio"]
    return -(-int(given["hidden_size"] * ratio * 2 / 3) // 256) * 256
