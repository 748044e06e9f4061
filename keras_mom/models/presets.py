"""Models by name, and models in folders.

A folder has KerasHub's layout: `config.json`, the serialized backbone;
`model.weights.h5`, or `model.weights.json` with shards beside it; `metadata.json`; and
for a whole language model `task.json`.
"""

import json
import math
import pathlib

import keras
import ml_dtypes
import numpy as np

CONFIG, METADATA, TASK = "config.json", "metadata.json", "task.json"
WEIGHTS, SHARDED_WEIGHTS = "model.weights.h5", "model.weights.json"

# The paper's training configurations: section 4.1, and the authors' repository.
_PAPER = dict(
    vocabulary_size=32000,
    num_layers=24,
    key_dim=256,
    num_memories=4,
    top_k=2,
    shared_memory=True,
    update_rule="gated_delta_net",
    balance_loss_weight=0.01,
    tie_embeddings=True,
)

PRESETS = {
    "mom_340m": {
        "description": "The paper's smaller model, which it calls 340M.",
        "config": {
            **_PAPER,
            "hidden_dim": 1024,
            "intermediate_dim": 2048,
            "num_heads": 4,
        },
    },
    "mom_1.3b": {
        "description": "The paper's larger model, which it calls 1.3B; heads of 256.",
        "config": {
            **_PAPER,
            "hidden_dim": 2048,
            "intermediate_dim": 4096,
            "num_heads": 8,
        },
    },
    "mom_tiny": {
        "description": "A model of bytes, for tests and first steps on a CPU.",
        "config": {
            **_PAPER,
            "vocabulary_size": 256,
            "num_layers": 4,
            "hidden_dim": 128,
            "intermediate_dim": 256,
            "num_heads": 4,
            "key_dim": 32,
        },
    },
}


def configuration(preset):
    """The arguments of the named preset's backbone, or None if it is no name."""
    named = PRESETS.get(preset) if isinstance(preset, str) else None
    return None if named is None else dict(named["config"])


def load_backbone(cls, preset, load_weights=True, **kwargs):
    """Makes a backbone from a folder."""
    folder = _folder(preset)
    backbone = _deserialize(_read(folder, CONFIG), cls, kwargs)
    if load_weights:
        _load_weights(backbone, folder)
    return backbone


def save_backbone(backbone, preset_dir, max_shard_size=10):
    """Writes a backbone to a folder, its weights in files of so many GB at most."""
    folder = pathlib.Path(preset_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, CONFIG, _serialize(backbone))
    metadata = {
        "keras_version": keras.version(),
        "parameter_count": backbone.count_params(),
        "tasks": ["CausalLM"],
    }
    _write(folder, METADATA, metadata)
    for name in (WEIGHTS, SHARDED_WEIGHTS):
        (folder / name).unlink(missing_ok=True)  # of a model that was here before
    size = sum(math.prod(v.shape) * _item_size(v.dtype) for v in backbone.variables)
    if max_shard_size is not None and size > max_shard_size * 2**30:
        path = str(folder / SHARDED_WEIGHTS)
        backbone.save_weights(path, max_shard_size=max_shard_size)
    else:
        backbone.save_weights(str(folder / WEIGHTS))


def load_task(cls, preset, load_weights=True, **kwargs):
    """Makes a language model from a folder, or from a backbone's folder."""
    folder = _folder(preset)
    backbone = kwargs.pop("backbone", None)
    if backbone is None:
        of_backbone = {"dtype": kwargs.pop("dtype")} if "dtype" in kwargs else {}
        backbone = load_backbone(cls.backbone_cls, preset, load_weights, **of_backbone)
    if (folder / TASK).exists() and "preprocessor" not in kwargs:
        preprocessor = _read(folder, TASK)["config"].get("preprocessor")
        if preprocessor is not None:
            preprocessor = keras.saving.deserialize_keras_object(preprocessor)
        kwargs["preprocessor"] = preprocessor
    return cls(backbone=backbone, **kwargs)


def save_task(task, preset_dir, max_shard_size=10):
    """Writes a language model to a folder."""
    save_backbone(task.backbone, preset_dir, max_shard_size)
    _write(pathlib.Path(preset_dir), TASK, _serialize(task))


def _item_size(dtype):
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def _folder(preset):
    folder = pathlib.Path(preset)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"`preset` must be one of {sorted(PRESETS)}, or a folder with a "
            f"`{CONFIG}`. Received: {str(preset)!r}"
        )
    return folder


def _read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _write(folder, name, content):
    (folder / name).write_text(json.dumps(content, indent=4), encoding="utf-8")


def _serialize(layer):
    return _without(
        keras.saving.serialize_keras_object(layer), ("compile_config", "build_config")
    )


def _without(config, keys):
    if not isinstance(config, dict):
        return config
    return {
        key: _without(value, keys) for key, value in config.items() if key not in keys
    }


def _deserialize(config, cls, changes):
    config = {**config, "config": {**config["config"], **changes}}
    if "registered_name" not in config:
        raise ValueError(
            f"`{CONFIG}` must hold a serialized Keras model, as `save_to_preset` "
            f"writes it. Received: one with the entries {sorted(config)}"
        )
    model = keras.saving.deserialize_keras_object(config)
    if not isinstance(model, cls):
        raise ValueError(
            f"`preset` must hold a `{cls.__name__}`. "
            f"Received: one that holds a `{type(model).__name__}`"
        )
    return model


def _load_weights(backbone, folder):
    for name in (WEIGHTS, SHARDED_WEIGHTS):
        if (folder / name).is_file():
            backbone.load_weights(str(folder / name))
            return
    raise ValueError(
        f"`preset` must be a folder with a `{WEIGHTS}`, unless `load_weights=False`. "
        f"Received: {str(folder)!r}"
    )
