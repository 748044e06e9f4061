"""Gates at the ends of their range, for each rule that can reach them.

A setting scales a layer's weights and adds a constant to them: name to (factor,
constant). A gate that passes a sigmoid is 0 or 1 in float32 at 40 times its logits.
"""

import math

_STEP = math.log(math.expm1(20 / 16))  # softplus of it, times 16, is 20.
_SATURATED = (40.0, 0.0)
_KEYS_OF_NORM_10 = {"key": (8.0, 0.0)}

EXTREMES = {
    "linear_attention": {"keys of norm 10": _KEYS_OF_NORM_10},
    "retention": {"keys of norm 10": _KEYS_OF_NORM_10},
    "lightning": {"keys of norm 10": _KEYS_OF_NORM_10},
    "gla": {
        "keys of norm 10": _KEYS_OF_NORM_10,
        "decay 1": {"decay/up_kernel": (0.0, 0.0), "decay/bias": (0.0, 60.0)},
        "decay exp(-20)": {"decay/up_kernel": (0.0, 0.0), "decay/bias": (0.0, -320.0)},
    },
    "hgrn2": {"decay 0 or 1": {"key": _SATURATED}},
    "gsa": {
        "keys of norm 10": _KEYS_OF_NORM_10,
        "decay 0 to 1": {"decay": (60.0, 0.0)},
    },
    "mamba2": {
        "keys of norm 10": _KEYS_OF_NORM_10,
        "decay 1": {"A_log": (0.0, -60.0)},
        "decay exp(-20)": {
            "step": (0.0, 0.0),
            "dt_bias": (0.0, _STEP),
            "A_log": (0.0, math.log(16)),
        },
        "write strength 0 or large": {"step": _SATURATED},
    },
    "rwkv6": {
        "keys of norm 10": _KEYS_OF_NORM_10,
        "decay 1": {"decay/up_kernel": (0.0, 0.0), "decay_bias": (0.0, -60.0)},
        "decay exp(-20)": {
            "decay/up_kernel": (0.0, 0.0),
            "decay_bias": (0.0, math.log(20)),
        },
    },
    "delta_net": {"write strength 0 or 1": {"write_strength": _SATURATED}},
    "gated_delta_net": {
        "decay 1, write strength 0 or 1": {
            "A_log": (0.0, -60.0),
            "write_strength": _SATURATED,
        },
        "decay exp(-20)": {
            "decay": (0.0, 0.0),
            "dt_bias": (0.0, _STEP),
            "A_log": (0.0, math.log(16)),
        },
    },
    "kda": {
        "decay 1, write strength 0 or 1": {
            "A_log": (0.0, -60.0),
            "write_strength": _SATURATED,
        },
        "decay exp(-20)": {
            "decay/up_kernel": (0.0, 0.0),
            "dt_bias": (0.0, _STEP),
            "A_log": (0.0, math.log(16)),
        },
    },
    "ttt": {"write strength 0 or 1": {"rate": _SATURATED}},
    "titans": {
        "decay 1, write strength 0 or 1": {
            "forget": (0.0, 0.0),
            "forget_bias": (0.0, -60.0),
            "rate": _SATURATED,
        },
        "decay exp(-20)": {"forget": (0.0, 0.0), "forget_bias": (0.0, 20.0)},
    },
    "rwkv7": {
        "decay 1, write strength 0 or 1": {
            "decay/up_kernel": (0.0, 0.0),
            "decay_bias": (0.0, -60.0),
            "rate": _SATURATED,
        },
        "the strongest decay": {
            "decay/up_kernel": (0.0, 0.0),
            "decay_bias": (0.0, 60.0),
        },
    },
}
# Options that widen a gate's range are held to the settings of their rule.
EXTREMES["delta_net with negative eigenvalues"] = EXTREMES["delta_net"]
EXTREMES["ttt at a rate of 2"] = EXTREMES["ttt"]


def apply(variables, setting, values):
    """Assigns `factor * value + constant` to the variables that a setting names.

    Args:
        variables: dict of `keras.Variable`.
        setting: dict of (factor, constant).
        values: dict of NumPy arrays: the variables' values without a setting.
    """
    for name, (factor, constant) in setting.items():
        variables[name].assign(factor * values[name] + constant)
