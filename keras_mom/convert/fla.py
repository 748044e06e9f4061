"""Language models from published checkpoints, and back."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from keras_mom.checks import check_positive
from keras_mom.convert import fla_config
from keras_mom.convert.checkpoint import (
    DTYPES,
    Checkpoint,
    TensorInfo,
    dtype_name,
    raise_problems,
    read_json,
    write_checkpoint,
)
from keras_mom.convert.fla_tensors import EMBEDDING, HEAD, parts_of, unused_tensors
from keras_mom.models import CausalAttention, MoMBackbone, MoMCausalLM
from keras_mom.rules import GatedDeltaNet

# Arguments that a config decides without a word, and one that it sets although no
# weight depends on it.
_IMPLIED = {"update_rule", "num_experts"}
_FREE = {"balance_loss_weight"}


class Origin:
    """What a model's weights do not say of the checkpoint that they came from.

    Attributes:
        config: dict, its config.
        dtypes: dict from the names of its tensors to their dtypes' names.
        unused: dict of its tensors that nothing reads, NumPy arrays.
    """

    def __init__(self, config, dtypes, unused):
        self.config = config
        self.dtypes = dtypes
        self.unused = unused


def from_fla(source, config=None, *, dtype=None, preprocessor=None, **options):
    """A language model with the weights of a published checkpoint.

    Reads what `MomForCausalLM` of flash-linear-attention and of OpenSparseLLMs/MoM
    saves, and `MomGatedDeltaNetForCausalLM` of the latter. Names and shapes are
    checked before a weight is made; then the tensors of one weight are in memory at a
    time, from one file at a time.

    In inference mode the published code computes the same logits; in training its
    short convolution reads across memories and rows, which no model here does.

    Args:
        source: a `Checkpoint`, or what it takes: a folder, a file or a dict of tensors.
        config: dict, path of a `config.json`, or an object with `to_dict()`. Needed
            where no `config.json` lies beside the files.
        dtype: dtype or dtype policy of the model, such as `"bfloat16"`. Defaults to
            Keras' global policy. Float32 weights hold bfloat16 and float16 tensors
            exactly.
        preprocessor: of the `MoMCausalLM`.
        **options: other arguments of `keras_mom.models.MoMBackbone`, which change no
            weight: `remat`, `dropout`, `implementation`, `balance_loss_weight`, ...

    Returns:
        `keras_mom.models.MoMCausalLM`. It remembers the config and the dtypes of the
        checkpoint, for `to_fla`, until it is saved by other means.

    Raises:
        ValueError: if the checkpoint is damaged or pickled, if its config asks for
            what this library cannot represent, or if tensors are missing, extra,
            misshapen or of another dtype; the message names all of them.

    Example:

    >>> lm = keras_mom.convert.from_fla("mom-340m", dtype="bfloat16")
    >>> lm.generate([[1, 887, 4]], max_length=64)
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    with checkpoint:
        config = _config_dict(config, checkpoint)
        arguments = fla_config.to_backbone_arguments(config)
        layout = fla_config.layout_of(config)
        decided = sorted(set(options) & (set(arguments) | _IMPLIED) - _FREE)
        if decided:
            raise ValueError(
                "The checkpoint's config decides "
                f"{', '.join(f'`{x}`' for x in decided)}. Received: {options}"
            )
        parts = list(parts_of(arguments, layout))
        unused = unused_tensors(arguments, layout)
        _check_tensors(checkpoint, parts, unused)
        backbone = MoMBackbone(**arguments | options, dtype=dtype)
        for part in parts:
            part.write(backbone, [checkpoint[x] for x in part.names])
        if arguments["tie_embeddings"] and HEAD in checkpoint:
            _check_tied(checkpoint)
        kept = {name: np.array(checkpoint[name]) for name in unused}
        dtypes = {name: info.dtype for name, info in checkpoint.info.items()}
    model: Any = MoMCausalLM(backbone, preprocessor=preprocessor)
    model.fla_origin = Origin(config, dtypes, kept)
    return model


def to_fla(model, path=None, *, dtype=None, max_file_bytes=5 * 10**9):
    """The weights of a language model under the names of a published checkpoint.

    Args:
        model: `keras_mom.models.MoMCausalLM`, of the gated delta rule and without
            experts. LoRA updates are merged into the kernels.
        path: folder to write `model.safetensors`, or several files and their index,
            and `config.json` to; it holds no weights yet.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, of all tensors. By default
            those of the checkpoint that the model came from, so that
            `to_fla(from_fla(x))` has the bits of `x`; else those of the weights.
        max_file_bytes: most bytes a file, one of which is in memory at a time.

    Returns:
        Without a `path`, a dict from names to NumPy arrays, copies of the weights;
        else None.

    Raises:
        ValueError: if the model is one that `MomForCausalLM` cannot represent; the
            message names all that stands in the way.
    """
    plan = _plan(model, dtype)
    if path is None:
        return {name: plan.read(name) for name in plan.infos}
    check_positive("max_file_bytes", max_file_bytes)
    write_checkpoint(path, plan.infos, plan.read, plan.config, max_file_bytes)
    return None


def fla_config_of(model):
    """The `config.json` that `to_fla` writes for a model, as a dict.

    Args:
        model: as `to_fla` takes it.
    """
    return _plan(model, None).config


class _Plan(NamedTuple):
    """What `to_fla` writes: tensors, how each is read, and the config."""

    infos: dict
    read: Any
    config: dict


def _plan(model, dtype):
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"`dtype` must be None or one of {', '.join(DTYPES)}. Received: {dtype!r}"
        )
    arguments = _arguments_of(model)
    origin = getattr(model, "fla_origin", None) or Origin({}, {}, {})
    layout = fla_config.layout_of(origin.config)
    backbone = model.backbone
    infos, owners = {}, {}
    for part in parts_of(arguments, layout):
        own = part.dtype(backbone)
        if dtype is None and own not in DTYPES:
            raise ValueError(f"`dtype` must be given, since weights are {own}")
        for name in part.names:
            of_tensor = dtype or origin.dtypes.get(name, own)
            infos[name] = TensorInfo(None, part.shape, of_tensor)
            owners[name] = part
    if HEAD in origin.dtypes and HEAD not in infos:
        infos[HEAD] = infos[EMBEDDING]
        owners[HEAD] = owners[EMBEDDING]._replace(names=(HEAD,))
    for name, shape in unused_tensors(arguments, layout).items():
        value = origin.unused.get(name, np.ones(shape, "float32"))
        infos[name] = TensorInfo(None, shape, dtype or dtype_name(value.dtype))
    held = {}

    def read(name):
        to = DTYPES[infos[name].dtype]
        if name not in owners:
            unused = origin.unused.get(name, np.ones(infos[name].shape))
            return unused.astype(to)
        part = owners[name]
        if part not in held:
            held.clear()
            held[part] = part.to_tensors(part.read(backbone))
        # A copy, since backends lend NumPy the memory of a weight.
        return np.array(held[part][name], to, order="C")

    written = [info.dtype for info in infos.values()]
    common = max(set(written), key=written.count)
    config = {
        **origin.config,
        **fla_config.from_backbone_arguments(arguments, layout),
        # Older and newer names of transformers.
        "torch_dtype": common,
        "dtype": common,
    }
    return _Plan(infos, read, config)


def _config_dict(config, checkpoint):
    if config is None:
        config = checkpoint.config
        if config is None:
            raise ValueError(
                "`config` must be given, because no config.json lies beside the "
                "checkpoint. Received: config=None"
            )
    elif hasattr(config, "to_dict"):
        config = config.to_dict()
    elif isinstance(config, str | os.PathLike):
        config = read_json(config)
    if not isinstance(config, Mapping):
        raise ValueError(
            "`config` must be a dict, the path of a config.json, or an object with "
            f"`to_dict()`. Received: {config!r}"
        )
    return dict(config)


def _check_tensors(checkpoint, parts, unused):
    """Raises unless the tensors are the expected ones, each of them and no other."""
    expected = {name: part.shape for part in parts for name in part.names} | unused
    optional = {HEAD: expected[EMBEDDING]}
    found = checkpoint.info
    problems = {
        "missing": [f"{x}: {shape}" for x, shape in expected.items() if x not in found],
        "extra": [
            f"{x}: {info.shape}"
            for x, info in found.items()
            if x not in expected and x not in optional
        ],
        "misshapen": [
            f"{x}: {found[x].shape}, expected {shape}"
            for x, shape in (optional | expected).items()
            if x in found and found[x].shape != shape
        ],
        "of a dtype that is not read": [
            f"{x}: {info.dtype}, expected one of {', '.join(DTYPES)}"
            for x, info in found.items()
            if info.dtype not in DTYPES
        ],
    }
    raise_problems("The checkpoint's tensors do not fit its config.", problems)


def _check_tied(checkpoint):
    head, embedding = (np.asarray(checkpoint[x], "float32") for x in (HEAD, EMBEDDING))
    if not np.array_equal(head, embedding):
        raise ValueError(
            f"tie_word_embeddings is True, but {HEAD} differs from {EMBEDDING}"
        )


def _arguments_of(model):
    """The arguments of a model's backbone, if its config can say them."""
    if not isinstance(model, MoMCausalLM):
        raise ValueError(
            f"`model` must be a MoMCausalLM. Received: {model.__class__.__name__}"
        )
    backbone = model.backbone
    arguments = backbone.get_config()
    mixers = [block.mixer for block in backbone.blocks]
    with_attention = [
        i for i, mixer in enumerate(mixers) if isinstance(mixer, CausalAttention)
    ]
    update_rules = {
        mixer.update_rule.__class__.__name__
        for i, mixer in enumerate(mixers)
        if i not in with_attention
    }
    problems = []
    if update_rules - {GatedDeltaNet.__name__}:
        problems.append(
            f"update_rule: {', '.join(sorted(update_rules))}, must be gated_delta_net"
        )
    if arguments["num_experts"]:
        problems.append(f"num_experts={arguments['num_experts']}: must be 0")
    if arguments["conv_width"] is None:
        problems.append("conv_width=None: must be a width")
    problems += [
        f"{layer.path}: quantized, must have floating-point weights"
        for layer in backbone._flatten_layers(include_self=False)
        if getattr(layer, "quantization_mode", None) is not None
    ]
    raise_problems(
        "MomForCausalLM cannot represent the model.", {"in the way": problems}
    )
    of_attention = arguments["num_attention_heads"]
    return {
        **arguments,
        "attention_layers": with_attention,
        "value_dim": arguments["value_dim"] or arguments["key_dim"],
        "num_key_value_heads": arguments["num_key_value_heads"] or of_attention,
    }
