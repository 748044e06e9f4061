"""`MoMBackbone` and `MoMCausalLM`: what they compute, save and load."""

import gc
import json

import keras
import numpy as np
import pytest
from keras import ops

import keras_mom
from keras_mom.models import (
    ByteTokenizer,
    CausalAttention,
    GatedMLP,
    MixtureOfExperts,
    MoMBackbone,
    MoMCausalLM,
    MoMDecoderBlock,
)
from tests.layer_helpers import BACKEND, assert_close, to_numpy
from tests.model_helpers import forward, gradients, randomize, read

BATCH, LENGTH, VOCABULARY, WIDTH = 3, 10, 13, 8
SIZES = dict(
    vocabulary_size=VOCABULARY,
    num_layers=2,
    hidden_dim=WIDTH,
    num_heads=2,
    key_dim=4,
    num_memories=3,
)
# Everything at once: a MoM layer, attention with a window, experts, documents.
HYBRID = dict(
    **SIZES,
    attention_layers=[1],
    num_key_value_heads=1,
    sliding_window=3,
    num_experts=3,
    shared_expert=True,
    packed=True,
)
IDS = np.random.default_rng(5).integers(0, VOCABULARY, (BATCH, LENGTH), "int32")


@pytest.fixture(scope="module")
def lm():
    return randomize(MoMCausalLM(MoMBackbone(**HYBRID)))


def inputs(ids=IDS, mask=None, segments=None):
    return {
        "token_ids": np.asarray(ids, "int32"),
        "padding_mask": np.ones(ids.shape, "int32") if mask is None else mask,
        "segment_ids": np.zeros(ids.shape, "int32") if segments is None else segments,
    }


# What they compute.


def test_logits_are_the_embedding_in_reverse(lm):
    hidden = forward(lm.backbone, inputs())
    embeddings = to_numpy(lm.backbone.token_embedding.embeddings)
    logits = forward(lm, inputs())
    assert logits.shape == (BATCH, LENGTH, VOCABULARY)
    assert_close(logits, hidden @ embeddings.T, 1e-5)


def test_a_later_token_changes_no_earlier_output(lm):
    changed = IDS.copy()
    changed[:, 6] = (changed[:, 6] + 1) % VOCABULARY
    before, after = forward(lm, inputs()), forward(lm, inputs(changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(axis=-1).all()


def test_padding_changes_nothing_wherever_it_is(lm):
    short = LENGTH - 3
    whole = forward(lm, inputs())[:, :short]
    for places in ([7, 8, 9], [0, 1, 2], [2, 5, 6]):
        valid = np.setdiff1d(np.arange(LENGTH), places)
        ids, mask = np.full_like(IDS, 7), np.zeros_like(IDS)
        ids[:, valid], mask[:, valid] = IDS[:, :short], 1
        padded = forward(lm, inputs(ids, mask))
        assert_close(padded[:, valid], whole, 1e-5)


def test_documents_are_independent(lm):
    segments = np.zeros_like(IDS)
    segments[:, 4:] = 5
    segments[1, 8:] = 2
    packed = forward(lm, inputs(segments=segments))
    for row, start, end in [(0, 0, 4), (0, 4, 10), (1, 4, 8), (1, 8, 10), (2, 4, 10)]:
        ids, mask = np.zeros_like(IDS), np.zeros_like(IDS)
        ids[0, : end - start], mask[0, : end - start] = IDS[row, start:end], 1
        alone = forward(lm, inputs(ids, mask))[0, : end - start]
        assert_close(packed[row, start:end], alone, 1e-5)


@pytest.mark.parametrize("with_documents", [False, True])
def test_pieces_equal_the_whole(lm, with_documents):
    mask, segments = np.ones_like(IDS), np.zeros_like(IDS)
    mask[0, :2] = mask[1, 4:6] = mask[2, 7:] = 0
    masks = [mask, segments] if with_documents else [mask]
    if with_documents:
        segments[:, 5:] = 1
        segments[0, 2:] += 1  # begins with a piece, as do those at 5
    whole = forward(lm, inputs(mask=mask, segments=segments))
    first = lm.backbone.get_initial_cache(BATCH)
    cache, outputs, at = first, [], 0
    for size in (4, 1, 1, 4):
        part = [ops.convert_to_tensor(x[:, at : at + size]) for x in (IDS, *masks)]
        logits, hidden, cache = read(lm, part[0], cache, *part[1:])
        assert hidden.shape == (BATCH, size, WIDTH)
        outputs.append(to_numpy(logits))
        at += size
    valid = mask.astype(bool)
    assert_close(np.concatenate(outputs, axis=1)[valid], whole[valid], 1e-5)
    np.testing.assert_array_equal(to_numpy(cache["position"]), mask.sum(axis=1))
    keras.tree.assert_same_structure(cache, first)
    for before, after in zip(keras.tree.flatten(first), keras.tree.flatten(cache)):
        assert not to_numpy(before).any()
        assert before.shape == after.shape and before.dtype == after.dtype


def test_compiled_for_any_length(lm):
    expected = forward(lm, inputs())
    if BACKEND == "tensorflow":
        import tensorflow as tf

        spec = {name: tf.TensorSpec((None, None), "int32") for name in inputs()}
        function = tf.function(lm, jit_compile=True, input_signature=[spec])
        assert_close(to_numpy(function(inputs())), expected, 1e-5)
        part = {name: x[:2, :6] for name, x in inputs().items()}
        assert_close(to_numpy(function(part)), expected[:2, :6], 1e-5)
    else:
        assert_close(lm.predict_on_batch(inputs()), expected, 1e-5)


def test_rematerialized_gradients():
    settings = dict(HYBRID, num_layers=1, attention_layers=(), dropout=0.3, seed=1)
    plain = randomize(MoMBackbone(**settings))
    remat = randomize(MoMBackbone(**settings, remat=True))
    cotangent = np.random.default_rng(2).normal(size=(BATCH, LENGTH, WIDTH))
    cotangent = cotangent.astype("float32")
    mask = np.ones_like(IDS)
    mask[1, 4:] = 0
    expected = gradients(plain, inputs(mask=mask), cotangent)
    actual = gradients(remat, inputs(mask=mask), cotangent)
    assert expected[0] == actual[0] == 2  # losses: of memories and of experts
    assert all(np.any(x) for x in expected[1])
    assert_close(actual[1:], expected[1:], 1e-5)


def test_initial_weights():
    backbone = MoMBackbone(**HYBRID, tie_embeddings=False)
    for block in backbone.blocks:
        for layer, deviation in [
            (block.mixer.query_projection, 0.02),
            (block.mixer.output_projection, 0.02 / 2),
            (block.feed_forward.gate_projection, 0.02),
            (block.feed_forward.down_projection, 0.02 / 2),
        ]:
            assert abs(np.std(to_numpy(layer.kernel)) / deviation - 1) < 0.35
    embedding = backbone.token_embedding
    for weight in (embedding.embeddings, embedding.reverse_embeddings):
        assert abs(np.std(to_numpy(weight)) / 0.02 - 1) < 0.35


@pytest.mark.parametrize(
    "given, indices", [((), []), ([0, 2], [0, 2]), (2, [1, 3]), (4, [3]), (5, [])]
)
def test_attention_layers(given, indices):
    backbone = MoMBackbone(**dict(SIZES, num_layers=4), attention_layers=given)
    mixers = [type(block.mixer) for block in backbone.blocks]
    expected = [
        CausalAttention if i in indices else keras_mom.MoMLayer for i in range(4)
    ]
    assert mixers == expected


# What is saved and loaded.


@pytest.mark.filterwarnings("error:Skipping variable loading")
def test_configs_and_files(lm, tmp_path):
    config = lm.get_config()
    assert MoMCausalLM.from_config(config).get_config() == config
    flat = lm.backbone.get_config()
    assert {key: flat[key] for key in HYBRID} == HYBRID
    assert json.loads(json.dumps(flat)) == flat
    lm.save(tmp_path / "lm.keras")
    loaded = keras.models.load_model(tmp_path / "lm.keras")
    assert type(loaded) is MoMCausalLM and type(loaded.backbone) is MoMBackbone
    assert_close(forward(loaded, inputs()), forward(lm, inputs()), 1e-6)
    assert len(loaded.weights) == len(lm.weights)


def test_a_rule_with_arguments_is_saved():
    rule = keras_mom.rules.get("gsa")
    backbone = MoMBackbone(**SIZES, update_rule=rule, dtype="mixed_bfloat16")
    again = MoMBackbone.from_config(json.loads(json.dumps(backbone.get_config())))
    assert again.get_config() == backbone.get_config()
    assert again.dtype_policy.name == "mixed_bfloat16"
    logits = again.token_embedding(ops.zeros((1, 1, WIDTH), "bfloat16"), reverse=True)
    assert keras.backend.standardize_dtype(logits.dtype) == "bfloat16"
    first, second = (block.mixer.update_rule for block in again.blocks)
    assert first is not second and type(first) is type(rule)


def test_presets(lm, tmp_path):
    def assert_same_weights(loaded, rounding=1e-7):
        for actual, expected in zip(loaded.weights, lm.weights, strict=True):
            assert_close(to_numpy(actual), to_numpy(expected), rounding)

    lm.preprocessor = ByteTokenizer()
    lm.save_to_preset(tmp_path)
    lm.preprocessor = None
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"config.json", "metadata.json", "model.weights.h5", "task.json"}
    loaded = MoMCausalLM.from_preset(tmp_path)
    assert loaded.backbone.get_config() == lm.backbone.get_config()
    assert_same_weights(loaded)
    assert isinstance(loaded.preprocessor, ByteTokenizer)
    assert MoMCausalLM.from_preset(tmp_path, preprocessor=None).preprocessor is None
    backbone = MoMBackbone.from_preset(str(tmp_path), dtype="bfloat16")
    assert backbone.token_embedding.embeddings.dtype == "bfloat16"
    assert_same_weights(backbone, 1e-2)
    fresh = MoMBackbone.from_preset(tmp_path, load_weights=False)
    with pytest.raises(AssertionError):
        assert_same_weights(fresh)
    # A folder holds the weights that were written last, in whichever form.
    fresh.save_to_preset(tmp_path / "shards")
    lm.backbone.save_to_preset(tmp_path / "shards", max_shard_size=4e-6)
    assert (tmp_path / "shards" / "model.weights.json").exists()
    assert_same_weights(MoMCausalLM.from_preset(tmp_path / "shards"))


def test_named_presets():
    tiny = MoMCausalLM.from_preset("mom_tiny", num_layers=1, name="mine")
    assert tiny.backbone.get_config()["hidden_dim"] == 128 and tiny.name == "mine"
    assert len(tiny.backbone.blocks) == 1
    for name, width, heads in [("mom_340m", 1024, 4), ("mom_1.3b", 2048, 8)]:
        config = keras_mom.models.presets.configuration(name)
        assert (config["hidden_dim"], config["num_layers"]) == (width, 24)
        assert heads * 256 == width and config["num_heads"] == heads
        assert set(config) <= set(MoMBackbone(**SIZES).get_config())
    with pytest.raises(ValueError, match="`preset`.*mom_340m.*Received: 'mom_0'"):
        MoMBackbone.from_preset("mom_0")


def test_lora_and_quantization_survive_a_file(tmp_path):
    model = MoMCausalLM(MoMBackbone(**SIZES, attention_layers=[1]))
    randomize(model)
    # Keras collects garbage at every kernel; frozen objects cost no time.
    gc.freeze()
    model.quantize("int8")
    gc.unfreeze()
    names = {x.path for x in model._flatten_layers() if x.quantization_mode == "int8"}
    assert {"token_embedding", "block_0/mom/query", "block_1/attention/key"} < names
    assert not any("router" in name or "gated_delta_net" in name for name in names)
    model.enable_lora(2, ["query", "down"])
    assert len(model.trainable_weights) == 8  # two factors, in two layers of a block
    rng = np.random.default_rng(0)
    for variable in model.trainable_weights:
        variable.assign(rng.normal(size=variable.shape))
    model.save(tmp_path / "lm.keras")
    loaded = keras.models.load_model(tmp_path / "lm.keras")
    assert loaded.get_config() == model.get_config()
    assert len(loaded.trainable_weights) == 8
    assert {
        x.path for x in loaded._flatten_layers() if x.quantization_mode == "int8"
    } == names
    model.save_to_preset(tmp_path / "folder")
    merged = MoMBackbone.from_preset(tmp_path / "folder", lora_rank=None)
    assert merged.lora_rank is None
    # Keras merges LoRA into the quantized kernel when it saves.
    ids = {name: inputs()[name] for name in model.backbone.input}
    assert_close(forward(loaded, ids), forward(model, ids), 0.1)
    for one, other in zip(merged.blocks, loaded.backbone.blocks):
        kernels = [to_numpy(x.mixer.query_projection._kernel) for x in (one, other)]
        np.testing.assert_array_equal(*kernels)


# Bad input.


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_layers=0), "`num_layers` must be a positive integer.*0"),
        (dict(vocabulary_size=1.5), "`vocabulary_size`.*1.5"),
        (dict(attention_layers=[2]), "`attention_layers`.*0 to 1.*2"),
        (dict(attention_layers="all"), "`attention_layers`.*'all'"),
        (dict(attention_layers=[0], num_attention_heads=3), "divide `hidden_dim`.*3"),
        (dict(dropout=1.0), "`dropout`.*1.0"),
        (dict(top_k=4), "`top_k` must not exceed.*4"),
        (dict(num_experts=2, experts_per_token=3), "`experts_per_token`.*3"),
        (dict(lora_rank=2, lora_layers=["keys"]), "`target_layer_names`.*keys"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoMBackbone(**{**SIZES, **arguments})


def test_a_block_takes_layers_that_fit():
    layer = keras_mom.MoMLayer(2, 4, return_state=True)
    with pytest.raises(ValueError, match="`mixer`.*return_state=False.*True"):
        MoMDecoderBlock(layer, GatedMLP(8))


def test_a_block_is_a_layer():
    layers = keras_mom.MoMLayer(2, 4), MixtureOfExperts(2, 1, 8)
    block = MoMDecoderBlock(*layers, dropout=0.1)
    again = MoMDecoderBlock.from_config(block.get_config())
    again.build((None, None, WIDTH))
    assert again.compute_output_shape((2, 5, WIDTH)) == (2, 5, WIDTH)
    assert again.get_config()["dropout"] == 0.1
