"""Writes models on one backend, waits, and reads those that all backends wrote.

Run by `test_saving.py` as `python -m tests.exchange_files FOLDER`, once a backend.
Keras draws seeds from Python's `random`; its own function would import TensorFlow.
"""

import random
import sys
from pathlib import Path

import keras
import numpy as np

import keras_mom
from tests.layer_helpers import BACKEND, to_numpy, tokens

IDS = np.array([[1, 2, 3, 4, 5, 6, 7, 8], [0, 3, 1, 4, 1, 0, 5, 0]])


def language_model(seed, lora=False, **kwargs):
    """Random weights of this backend's own: the files carry them over."""
    random.seed(seed)
    ids = keras.Input((None,), dtype="int32")
    # Outputs of about 1.
    normal = keras.initializers.RandomNormal(stddev=1.0)
    x = keras.layers.Embedding(9, 12, normal, mask_zero=True)(ids)
    for _ in range(2):
        layer = keras_mom.MoMLayer(2, 6, **kwargs)
        x = x + layer(x)
        if lora:
            layer.enable_lora(2)
            for variable in layer.trainable_variables:
                if "lora" in variable.name:
                    variable.assign(0.3 * tokens(*variable.shape))
    return keras.Model(ids, keras.layers.Dense(9)(x))


def every_rule(seed):
    """One output a rule, in the order of their names."""
    random.seed(seed)
    ids = keras.Input((None,), dtype="int32")
    normal = keras.initializers.RandomNormal(stddev=1.0)
    x = keras.layers.Embedding(9, 12, normal, mask_zero=True)(ids)
    names = keras_mom.rules.names()
    outputs = [keras_mom.MoMLayer(2, 6, update_rule=name)(x) for name in names]
    return keras.Model(ids, outputs)


def main(folder):
    models = {
        "defaults": language_model(1),
        "small": language_model(
            2, update_rule="linear_attention", shared_memory=False, conv_width=None
        ),
        "lora": language_model(3, lora=True),
        "every rule": every_rule(4),
    }
    for name, model in models.items():
        model.save(folder / f"{name}-{BACKEND}.keras")
        np.save(folder / f"{name}-{BACKEND}.npy", np.array(to_numpy(model(IDS))))
    print("written", flush=True)
    sys.stdin.readline()
    for path in sorted(folder.glob("*.keras")):
        outputs = to_numpy(keras.saving.load_model(path)(IDS))
        np.save(folder / f"{path.stem}-read-by-{BACKEND}.npy", np.array(outputs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
