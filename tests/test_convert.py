"""Published checkpoints: what is read computes the same, and comes back bit for bit."""

import json
import weakref

import keras
import ml_dtypes
import numpy as np
import pytest

import keras_mom
from benchmarks import gpu_convert
from keras_mom.convert import Checkpoint, checkpoint, fla_config_of, from_fla, to_fla
from keras_mom.models import MoMBackbone, MoMCausalLM
from tests import fla_reference as reference
from tests.layer_helpers import relative_rms
from tests.selection import covering

safetensors = pytest.importorskip("safetensors.numpy")

TOKENS = np.random.default_rng(1).integers(0, 19, (2, 11)).astype("int32")
HYBRID = {
    "layers": [1],
    "num_heads": 3,
    "num_kv_heads": 1,
    "window_size": 5,
    "rope_theta": 100.0,
}
CASES = {
    "plain": {},
    "one projection for all": {
        "single_kv_proj": True,
        "use_output_gate": False,
        "tie_word_embeddings": True,
        "num_hidden_layers": 1,
    },
    "hybrid": {"shared_mem": False, "attn": HYBRID, "topk": 1},
}
# Names that a part of a checkpoint's tensors have in common, and their dtypes.
MIXED = {"proj": "bfloat16", "shared": "float16"}


@pytest.fixture(scope="module")
def plain():
    """A config, its tensors in three dtypes, and the model of both."""
    config = reference.make_config()
    tensors = reference.make_tensors(config)
    for part, dtype in MIXED.items():
        for name in tensors:
            if part in name:
                tensors[name] = tensors[name].astype(checkpoint.DTYPES[dtype])
    return config, tensors, convert(tensors, config)


def convert(*arguments, **options):
    """`from_fla`, without the time that initial weights take."""
    return from_fla(*arguments, kernel_initializer="zeros", **options)


def small_backbone(**options):
    options["kernel_initializer"] = "zeros"
    return MoMBackbone(9, 1, 8, num_heads=1, key_dim=4, **options)


def assert_same_bits(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        assert actual[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("case", covering(CASES, ["plain"]))
def test_logits_are_those_of_the_published_model(case, plain):
    config, tensors, lm = plain
    if case != "plain":
        config = reference.make_config(**CASES[case])
        tensors = reference.make_tensors(config)
        lm = convert(tensors, config)
    inputs = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    actual = lm.predict(inputs, verbose=0)
    expected = reference.logits(tensors, config, TOKENS)
    assert relative_rms(actual, expected) < 1e-5
    back = to_fla(lm)
    assert_same_bits(back, tensors)
    if not config["single_kv_proj"]:
        count = sum(np.prod(x.shape) for x in lm.trainable_variables)
        assert count == sum(x.size for x in tensors.values())
    # What comes back is a copy: the weights do not follow it.
    for value in back.values():
        value[...] = 0
    assert_same_bits(to_fla(lm), tensors)
    # The config that is written makes the same model.
    assert_same_bits(to_fla(convert(tensors, fla_config_of(lm))), tensors)


def test_files_one_at_a_time_in_bounded_memory(plain, tmp_path, monkeypatch):
    config, tensors, lm = plain
    to_fla(lm, tmp_path, max_file_bytes=2000)
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    for file in files:
        held = safetensors.load_file(tmp_path / file)
        assert 0 < sum(x.nbytes for x in held.values()) <= 2000

    opened, alive, most = [], weakref.WeakSet(), 0
    real_open, real_read = checkpoint._open, Checkpoint.__getitem__

    class Handle:
        def __init__(self, file):
            assert not opened
            opened.append(file)
            self.inner = real_open(file)

        def __enter__(self):
            self.inner.__enter__()
            return self

        def __exit__(self, *exception):
            opened.clear()
            self.inner.__exit__(*exception)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    class Array(np.ndarray):
        __hash__ = object.__hash__

    def read(self, name):
        nonlocal most
        value = real_read(self, name).view(Array)
        alive.add(value)
        most = max(most, len(alive))
        return value

    monkeypatch.setattr(checkpoint, "_open", Handle)
    monkeypatch.setattr(Checkpoint, "__getitem__", read)
    loaded = convert(tmp_path)
    assert not opened
    # The tensors of one weight: a memory each, and the shared one; and those before.
    assert most <= 2 * (config["num_memories"] + 1)
    monkeypatch.undo()
    assert_same_bits(to_fla(loaded), tensors)
    assert fla_config_of(loaded) == fla_config_of(lm)

    # The same from the index, from one file, and from an open checkpoint.
    with Checkpoint(tmp_path / checkpoint.INDEX) as opened_checkpoint:
        assert opened_checkpoint.config["hidden_size"] == config["hidden_size"]
        assert_same_bits(dict(opened_checkpoint), tensors)
        assert_same_bits(to_fla(convert(opened_checkpoint)), tensors)
    to_fla(lm, tmp_path / "single")
    file = tmp_path / "single" / checkpoint.WEIGHTS
    assert_same_bits(safetensors.load_file(file), tensors)
    with safetensors.safe_open(file, "np") as handle:
        assert handle.metadata() == {"format": "pt"}
    assert_same_bits(to_fla(convert(file)), tensors)
    with pytest.raises(ValueError, match="`path` holds weights already: model"):
        to_fla(lm, tmp_path / "single")
    with pytest.raises(ValueError, match="`max_file_bytes` must be a positive"):
        to_fla(lm, tmp_path / "more", max_file_bytes=0)
    with pytest.raises(ValueError, match="`path` must be a folder"):
        to_fla(lm, file)


def test_dtypes(plain, tmp_path):
    config, tensors, lm = plain
    wide = to_fla(lm, dtype="float32")
    assert {x.dtype.name for x in wide.values()} == {"float32"}
    for name, value in tensors.items():
        assert np.array_equal(wide[name], value.astype("float32"))
    # Where nothing is remembered, the dtypes of the weights are written.
    lm.save(tmp_path / "lm.keras")
    loaded = keras.saving.load_model(tmp_path / "lm.keras")
    assert_same_bits(to_fla(loaded), wide)
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    rounded = convert(tensors, config, dtype="bfloat16", balance_loss_weight=0.5)
    assert rounded.backbone.dtype_policy.name == "bfloat16"
    assert rounded.backbone.blocks[0].mixer.balance_loss_weight == 0.5
    assert_same_bits(to_fla(rounded, dtype="bfloat16"), half)
    # And those that are remembered, of weights in bfloat16.
    back = to_fla(rounded)
    assert all(x.dtype == tensors[name].dtype for name, x in back.items())
    kept = {name: x for name, x in tensors.items() if "_proj" in name}
    assert_same_bits({name: back[name] for name in kept}, kept)
    with pytest.raises(ValueError, match="`dtype` must be None or one of float32"):
        to_fla(lm, dtype="int8")
    torch = pytest.importorskip("torch")
    of_torch = {
        name: torch.tensor(np.asarray(x, "float32")).to(getattr(torch, x.dtype.name))
        for name, x in tensors.items()
    }

    class Config:
        def to_dict(self):
            return config

    assert_same_bits(to_fla(convert(of_torch, Config())), tensors)


def test_tied_embeddings_may_be_written_twice():
    config = reference.make_config(**CASES["one projection for all"])
    tensors = reference.make_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"].copy()
    assert_same_bits(to_fla(convert(tensors, config)), tensors)
    tensors["lm_head.weight"][3, 2] += 1
    with pytest.raises(ValueError, match="tie_word_embeddings is True, but lm_head"):
        from_fla(tensors, config)


def test_the_older_layout(plain):
    config, tensors, lm = plain
    older = dict(config, architectures=["MomGatedDeltaNetForCausalLM"])
    older["model_type"] = "mom_gated_deltanet"
    older["use_gate"] = older.pop("use_output_gate")
    state = dict(tensors)
    for i in range(config["num_hidden_layers"]):
        mlp = f"model.layers.{i}.mlp."
        both = [state.pop(f"{mlp}{x}_proj.weight") for x in ("gate", "up")]
        state[f"{mlp}gate_proj.weight"] = np.concatenate(both)
        state[f"model.layers.{i}.attn.D"] = np.full(2, 1.5 + i, "float32")
    converted = convert(state, older)
    assert_same_bits(to_fla(converted), state)
    assert fla_config_of(converted)["model_type"] == "mom_gated_deltanet"
    for ours, expected in zip(converted.weights, lm.weights, strict=True):
        assert np.array_equal(
            keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(expected)
        )


def test_all_tensors_that_do_not_fit_are_named(plain, monkeypatch):
    config, tensors, _ = plain
    # No weight is made before the tensors are known to fit.
    monkeypatch.setattr(MoMBackbone, "__init__", None)
    wrong = dict(tensors)
    missing = ["model.norm.weight", "model.layers.1.attn.v_proj.2.weight"]
    for name in missing:
        del wrong[name]
    layer = "model.layers.0.attn."
    wrong[f"{layer}q_conv1d.weight"] = wrong[f"{layer}q_conv1d.weight"][..., 1:]
    wrong["lm_head.weight"] = wrong["lm_head.weight"].T
    wrong[f"{layer}A_log"] = wrong[f"{layer}A_log"].astype("float64")
    wrong[f"{layer}k_proj.3.weight"] = wrong[f"{layer}k_proj.0.weight"]
    with pytest.raises(ValueError) as raised:
        from_fla(wrong, config)
    lines = [x.strip() for x in str(raised.value).splitlines()]
    assert lines == [
        "The checkpoint's tensors do not fit its config.",
        "missing (2):",
        "model.layers.1.attn.v_proj.2.weight: (12, 12)",
        "model.norm.weight: (12,)",
        "extra (1):",
        "model.layers.0.attn.k_proj.3.weight: (8, 12)",
        "misshapen (2):",
        "lm_head.weight: (12, 19), expected (19, 12)",
        "model.layers.0.attn.q_conv1d.weight: (8, 1, 3), expected (8, 1, 4)",
        "of a dtype that is not read (1):",
        "model.layers.0.attn.A_log: float64, expected one of float32, float16, "
        "bfloat16",
    ]


def test_configs_that_cannot_be_represented(plain):
    config, tensors, _ = plain
    with pytest.raises(ValueError) as raised:
        changes = dict(hidden_act="powlu", use_short_conv=False, num_memories=2.5)
        changes |= dict(attnres_block_size=2, mom_backend="gla", expand_v=0.3)
        from_fla(tensors, dict(config, norm_first=True, **changes))
    for name in (*changes, "norm_first"):
        assert f"{name}=" in str(raised.value)
    for attention, message in (
        (dict(HYBRID, qkv_bias=True, qk_norm=True), r"qkv_bias=True[^$]*qk_norm=True"),
        (dict(HYBRID, sinks=4), "attn.sinks=4: not known"),
        (dict(HYBRID, layers=[1, 2]), "must be different indices below 2"),
        (dict(HYBRID, num_heads=5), "attn.num_heads=5: must divide hidden_size"),
        ({"layers": [0]}, "attn: lacks num_heads"),
        (
            [dict(HYBRID, layers=[0]), dict(HYBRID, window_size=None)],
            "attention layers must be alike",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            from_fla(tensors, dict(config, attn=attention))
    with pytest.raises(ValueError, match="must name the architecture MomForCausalLM"):
        from_fla(tensors, dict(config, architectures=["LlamaForCausalLM"]))
    with pytest.raises(ValueError, match="must name the architecture .*='mamba'"):
        from_fla(tensors, {"model_type": "mamba"})
    with pytest.raises(ValueError, match="`config` must be given"):
        from_fla(tensors)
    with pytest.raises(ValueError, match="`config` must be a dict"):
        from_fla(tensors, 3)
    with pytest.raises(ValueError, match="config decides `top_k`, `update_rule`"):
        from_fla(tensors, config, top_k=1, update_rule="gla", remat=True)
    # What is left out has the defaults of the published class.
    sizes = keras_mom.convert.fla_config.to_backbone_arguments({"hidden_size": 1024})
    assert sizes["intermediate_dim"] == 2816 and sizes["num_layers"] == 24


def test_damaged_checkpoints(tmp_path):
    def write(folder, **files):
        folder = tmp_path / folder
        folder.mkdir(exist_ok=True)
        for name, tensors in files.items():
            values = {x: np.zeros(2, "float32") for x in tensors}
            safetensors.save_file(values, folder / f"{name}.safetensors")
        return folder

    def index(folder, **weight_map):
        content = json.dumps({"weight_map": weight_map})
        (folder / checkpoint.INDEX).write_text(content)
        return folder

    def refused(source, message):
        with pytest.raises(ValueError, match=message):
            Checkpoint(source)

    folder = write("two", one="ab", two="c")
    refused(folder, "holds neither model.safetensors nor")
    maps = dict(a="one.safetensors", b="two.safetensors")
    refused(
        index(folder, **maps),
        r"missing tensors[^$]*b: not in two.safetensors\n"
        r"extra tensors[^$]*c: in two.safetensors",
    )
    refused(
        index(folder, a="../one.safetensors", b="three.safetensors"),
        r"not the name of a file[^$]*'../one.safetensors'\nmissing[^$]*three",
    )
    write("two", two="bc")
    refused(index(folder, **maps), "tensors in two files[^$]*b: one.* and two")
    write("two", model="a")
    refused(folder, "holds two checkpoints")
    index(folder)
    refused(folder / checkpoint.INDEX, "must hold a `weight_map`")
    (folder / checkpoint.INDEX).write_text("{")
    refused(folder / checkpoint.INDEX, "cannot be read as JSON")
    cut = write("cut", model="ab") / checkpoint.WEIGHTS
    cut.write_bytes(cut.read_bytes()[:-3])
    refused(cut, "is not a safetensors file")
    pickled = write("pickled")
    (pickled / "pytorch_model-00001-of-00002.bin").write_bytes(b"cos\nsystem\n")
    refused(pickled, r"pytorch_model-00001-of-00002.bin: pickled weights are not")
    refused(pickled / "pytorch_model-00001-of-00002.bin", "a pickle can run any")
    (pickled / "model.gguf").write_bytes(b"")
    refused(pickled / "model.gguf", "must end in .safetensors")
    refused(tmp_path / "absent", "does not exist")
    refused({"a": 1.0}, "must hold tensors.[^$]*'a': float")


def test_models_that_cannot_be_represented():
    def refused(message, **options):
        backbone = small_backbone(**options)
        kernel = backbone.blocks[0].mixer.key_projection.kernel
        kernel.assign(np.arange(np.prod(kernel.shape)).reshape(kernel.shape))
        with pytest.raises(ValueError, match=message):
            to_fla(MoMCausalLM(backbone))

    refused(
        r"update_rule: GLA[^$]*num_experts=2[^$]*conv_width=None",
        update_rule="gla",
        num_experts=2,
        conv_width=None,
    )
    refused(
        "shared_k.weight can hold one projection.*blocks.0.mixer.key_projection",
        per_memory_projections=False,
    )
    if keras.backend.backend() != "jax":
        refused("`dtype` must be given, since weights are float64", dtype="float64")
    with pytest.raises(ValueError, match="must be a MoMCausalLM. Received: Dense"):
        to_fla(keras.layers.Dense(3))


def test_lora_is_merged_and_quantized_weights_are_refused():
    backbone = small_backbone()
    lm = MoMCausalLM(backbone)
    before = to_fla(lm)
    assert repr(fla_config_of(lm)["expand_v"]) == "1"
    mixer = backbone.blocks[0].mixer
    mixer.enable_lora(2)
    mixer.query_projection.lora_kernel_b.assign(np.ones((2, 4), "float32"))
    update = np.sum(keras.ops.convert_to_numpy(mixer.query_projection.lora_kernel_a), 1)
    after = to_fla(lm)
    name = "model.layers.0.attn.q_proj.weight"
    expected = before.pop(name) + update[None]
    np.testing.assert_allclose(after.pop(name), expected, atol=1e-6)
    assert_same_bits(after, before)
    backbone.blocks[0].feed_forward.up_projection.quantize("int8")
    with pytest.raises(ValueError, match="feed_forward/up: quantized, must have"):
        to_fla(lm)


def test_arguments_of_the_gpu_benchmark(capsys):
    options = gpu_convert.parse(["--dtype", "bfloat16", "--length", "64"])
    assert options.dtype == ["bfloat16"] and options.length == 64
    for arguments, message in (
        (["--top-k", "5"], "--top-k 5 exceeds --memories 4"),
        (["--layers", "0"], "'0' is not a positive integer"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ):
        with pytest.raises(SystemExit):
            gpu_convert.parse(arguments)
        assert message in capsys.readouterr().err
