"""How a model routes, counted, drawn and watched in training."""

import struct
import sys

import keras
import numpy as np
import pytest

import keras_mom
from keras_mom import callbacks, visualization
from keras_mom.visualization.event_file import EventFile, _masked_checksum
from tests.layer_helpers import EAGERLY, make_layer, tokens
from tests.selection import exhaustive_on

BATCH, LENGTH, MEMORIES, VOCABULARY = 4, 10, 3, 12


@pytest.fixture(scope="module")
def model():
    """Rematerialized and masked."""
    keras.utils.set_random_seed(0)
    ids = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, 8, mask_zero=True)(ids)
    with keras.RematScope(mode="full"):
        x = keras_mom.MoMLayer(2, 4, num_memories=MEMORIES, name="mom")(x)
    model = keras.Model(ids, keras.layers.Dense(VOCABULARY)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, run_eagerly=EAGERLY)
    return model


@pytest.fixture(scope="module")
def ids():
    ids = np.random.default_rng(0).integers(1, VOCABULARY, size=(BATCH, LENGTH))
    ids[1, 6:] = 0
    return ids.astype("int32")


def a_routing(mask=None):
    """One row of four tokens, to two of three memories each."""
    probabilities = np.array([[[0.5, 0.5, 0], [1, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]]])
    indices = np.array([[[0, 1], [0, 1], [1, 2], [0, 2]]], "int32")
    mask = np.ones((1, 4), bool) if mask is None else np.array([mask], bool)
    weights = np.full((1, 4, 2), 0.5, "float32")
    return visualization.LayerRouting("layer", probabilities, indices, weights, mask)


def test_counts():
    layer = a_routing()
    shares = visualization.memory_shares([layer, a_routing([1, 1, 0, 0])])
    np.testing.assert_allclose(shares, [[3 / 8, 3 / 8, 2 / 8], [1 / 2, 1 / 2, 0]])
    entropies = visualization.router_entropy([layer, a_routing([0, 1, 0, 0])])
    np.testing.assert_allclose(entropies, [0.75 * np.log(2), 0])
    counts = visualization.memory_tokens(layer, [[4, 4, 0, 1]], 5)
    expected = np.zeros((5, 3))
    expected[[4, 0, 1]] = [[2, 2, 0], [0, 1, 1], [1, 0, 1]]
    np.testing.assert_array_equal(counts, expected)
    with pytest.raises(ValueError, match="`token_ids` must have the shape"):
        visualization.memory_tokens(layer, [[1, 2]], 5)
    with pytest.raises(ValueError, match="`token_ids` must be from 0 to 3"):
        visualization.memory_tokens(layer, [[4, 4, 0, 1]], 4)


def test_probe_reads_what_the_layers_do():
    layers = [
        make_layer(width=8, num_memories=MEMORIES, seed=seed, go_backwards=backwards)
        for seed, backwards in ((1, True), (2, False))
    ]
    x = tokens(2, 5, 8)
    mask = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], bool)
    source, given = keras.Input((5, 8)), keras.Input((5,), dtype="bool")
    outputs = [layer(source, mask=given) for layer in layers]
    model = keras.Model([source, given], outputs)
    found = visualization.collect_routing(model, [x, mask])
    assert len(found) == 2
    by_name = {one.name: one for one in found}
    for layer in layers:
        one = by_name[layer.path]
        scores = x @ keras.ops.convert_to_numpy(layer.router.kernel)
        expected = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(
            one.probabilities[mask], expected[mask], rtol=1e-4, atol=1e-6
        )
        order = np.argsort(-expected, axis=-1)[..., :2]
        np.testing.assert_array_equal(one.indices[mask], order[mask])
        chosen = np.take_along_axis(expected, order, axis=-1)
        chosen /= chosen.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(one.weights[mask], chosen[mask], rtol=1e-4)
        np.testing.assert_array_equal(one.mask, mask)


def test_layers_come_in_the_model_s_order():
    backbone = keras_mom.models.MoMBackbone(8, 3, 8, 2, 4, attention_layers=[1])
    lm = keras_mom.models.MoMCausalLM(backbone)
    names = [layer.path for layer in visualization.mom_layers(lm)]
    assert names == ["block_0/mom", "block_2/mom"]


@exhaustive_on("tensorflow")
def test_monitor_in_training(model, ids, tmp_path):
    """Of a sample, and of the last batch, which is the sample here."""
    pytest.importorskip("matplotlib")
    sampled = callbacks.RoutingMonitor(
        ids, png_dir=tmp_path / "pictures", tensorboard_dir=tmp_path / "board"
    )
    last_batch = callbacks.RoutingMonitor(every=2)
    before = visualization.collect_routing(model, ids)
    history = model.fit(
        ids,
        ids,
        batch_size=BATCH,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[sampled, last_batch],
    )
    assert sampled.layer_names == ["mom"]
    assert sampled.history["epoch"] == [1, 2]
    assert last_batch.history["epoch"] == [2]
    # The batch of the second epoch is routed by what the first one left.
    for kind in ("share", "entropy"):
        np.testing.assert_allclose(
            last_batch.history[kind][0], sampled.history[kind][0], rtol=1e-4, atol=1e-6
        )
    expected = [values.mean() for values in sampled.history["entropy"]]
    assert history.history["router_entropy"][0] == pytest.approx(expected[0])
    assert np.any(visualization.router_entropy(before) != sampled.history["entropy"][0])
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == sorted(
        [f"shares_{n:04d}.png" for n in (1, 2)]
        + [f"tokens_mom_{n:04d}.png" for n in (1, 2)]
        + ["entropy.png"]
    )
    (board,) = (tmp_path / "board").iterdir()
    content = board.read_bytes()
    assert content.count(b"memory_share/mom/memory_2") == 2
    assert content.count(b"\x89PNG") == 6
    # Nothing of the watching is left behind.
    for layer in visualization.mom_layers(model):
        assert "_compute" not in vars(layer) and "_route" not in vars(layer)
        assert layer._remat_mode is not None


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    figures = [
        visualization.plot_shares([[0.2, 0.8], [0.5, 0.5]], ["a", "b"], "title"),
        visualization.plot_tokens(np.array([[1, 2], [0, 0], [3, 0]]), "xyz"),
        visualization.plot_text(a_routing([1, 1, 1, 0]), token_names="abcd"),
        visualization.plot_entropy([[1.0, 0.5], [0.5, 0.2]], num_memories=3),
    ]
    for number, figure in enumerate(figures):
        path = tmp_path / "folder" / f"{number}.png"
        visualization.save_figure(figure, path)
        assert path.read_bytes().startswith(b"\x89PNG")
    names = [label.get_text() for label in figures[1].axes[0].get_yticklabels()]
    assert names == ["z", "x"]
    with pytest.raises(ValueError, match="`counts` must hold a token"):
        visualization.plot_tokens(np.zeros((3, 2)))


def test_event_file(tmp_path):
    """Checksums of RFC 3720 and records that TensorBoard can follow."""
    assert _masked_checksum(bytes(32)) == (
        (0x8A9136AA >> 15 | 0x8A9136AA << 17) + 0xA282EAD8 & 0xFFFFFFFF
    )
    events = EventFile(str(tmp_path))
    events.add_scalar("a", 0.5, 300)
    events.close()
    with open(events.path, "rb") as file:
        content = file.read()
    records = []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert struct.unpack("<I", content[8:12])[0] == _masked_checksum(content[:8])
        records.append(content[12 : 12 + length])
        (checksum,) = struct.unpack("<I", content[12 + length : 16 + length])
        assert checksum == _masked_checksum(records[-1])
        content = content[16 + length :]
    assert records[0].endswith(b"brain.Event:2")
    value = b"\x0a\x01a\x15" + struct.pack("<f", 0.5)
    summary = b"\x0a" + bytes([len(value)]) + value
    assert records[1][9:] == b"\x10\xac\x02\x2a" + bytes([len(summary)]) + summary


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match="`every` must be a positive integer"):
        callbacks.RoutingMonitor(every=0)
    with pytest.raises(ValueError, match="`token_ids` are the tokens in `inputs`"):
        callbacks.RoutingMonitor(token_ids=np.zeros((1, 2), "int32"))
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="`model` must have a `keras_mom.MoMLayer`"):
        visualization.collect_routing(plain, np.zeros((1, 2)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        callbacks.RoutingMonitor(png_dir="nowhere")
