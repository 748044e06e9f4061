"""`examples/language_modelling`: text, equal parameters, measures, taking runs up."""

import csv
import gzip
import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from tests.example_modules import example_module
from tests.layer_helpers import BACKEND

SIZES = dict(layers=2, width=32, heads=2, key_dim=16, value_dim=16, memories=4, top_k=2)
SIZES |= dict(attention_heads=2, attention_every=2, target=100_000)
OPTIONS = "--layers 2 --width 16 --heads 2 --key-dim 8 --value-dim 8 --parameters 2e4"
OPTIONS += " --attention-every 2 --length 8 --batch 2 --bytes 96 --epochs 3 --warmup 2"
OPTIONS += " --validation-windows 2 --test-windows 3 --test-bytes 40 --no-plots"


@pytest.fixture(scope="module")
def example():
    """`run.py`, in whose name space the other modules' functions are."""
    with example_module("language_modelling/run") as module:
        yield module


def settings(example, model, **changes):
    weight = 0.01 if model in example.ROUTED else ""
    rule = "" if model == "attention" else "gated_delta_net"
    sizes = {**SIZES, **changes}
    return example.ModelSettings(model=model, rule=rule, balance_weight=weight, **sizes)


@pytest.fixture(scope="module")
def text(example):
    """240 files of 0 to 717 bytes, the number of the file in each byte."""
    return example.lm_text.join(
        [np.full(3 * index + 1, index, "uint8") for index in range(240)]
    )


def test_files_are_read_packed_and_split(example, text, tmp_path):
    lm_text = example.lm_text
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.rst").write_bytes(b"first")
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"second"))
    (folder / "c.rst").write_bytes(b"first")  # once more
    (folder / "d.png").write_bytes(b"third")
    read = lm_text.read_text([folder])
    assert read.data.tobytes() == b"first\0second\0"
    assert [len(file) for file in read.files()] == [6, 7]
    lm_text.pack(read, tmp_path / "text.npz")
    again = lm_text.read_text([tmp_path / "text.npz"])
    for x, y in zip(read, again, strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="`--text`: there is no"):
        lm_text.read_text([tmp_path / "none"])
    with pytest.raises(ValueError, match="`--text`: no file of .md"):
        lm_text.read_text([folder], (".md",))

    parts = lm_text.split(text)
    numbers = [set(np.unique(part.data)) for part in parts]
    assert not (numbers[0] & numbers[1] or numbers[0] & numbers[2])
    assert not numbers[1] & numbers[2]
    assert set.union(*numbers) == set(range(240))
    assert sum(len(part.data) for part in parts) == len(text.data)
    assert [len(part.ends) for part in parts] == [226, 2, 12]

    few = lm_text.join([np.arange(200, dtype="uint8")])
    together = np.concatenate([part.data for part in lm_text.split(few)])
    np.testing.assert_array_equal(together, few.data)


def test_windows_of_all_lengths_end_at_the_same_places_of_a_file(example, text):
    lm_text = example.lm_text
    ends, in_files = lm_text.window_ends(text, 640, 40, 100)
    assert in_files and len(ends) == len(set(ends))
    windows = lm_text.windows_before(text, ends, 640)
    assert (windows == windows[:, :1]).all()
    # One place in each file of 641 bytes or more, two in those of 681 or more.
    assert len(ends) == sum(3 * i + 1 > 640 for i in range(240)) + sum(
        3 * i + 1 > 680 for i in range(240)
    )
    np.testing.assert_array_equal(
        lm_text.windows_before(text, ends, 40), windows[:, -40:]
    )
    _, in_files = lm_text.window_ends(text, 2000, 40, 100)
    assert not in_files


def test_activated_parameters_are_equal(example):
    for model in example.KINDS:
        backbone = settings(example, model).fitted_backbone()
        activated = example.activated_parameters(backbone)
        assert abs(activated - 100_000) < 1_000, model
        if model in ("single", "attention"):
            assert activated == example.parameters(backbone)
    with pytest.raises(ValueError, match="`--parameters` must be .* or more for 'mom'"):
        settings(example, "mom", target=10_000).fitted_backbone()
    with pytest.raises(ValueError, match="`--attention-every` must be"):
        settings(example, "hybrid", attention_every=3).fitted_backbone()


@pytest.mark.parametrize("model", ["mom", "mom_unshared", "hybrid"])
def test_as_many_are_activated_as_with_two_memories(example, model):
    activated = example.activated_parameters(settings(example, model).backbone(16))
    two = settings(example, model, memories=2).backbone(16)
    routed_layers = 1 if model == "hybrid" else 2
    routers = routed_layers * 32 * 2  # of the two memories more
    assert activated == example.parameters(two) + routers


# Elsewhere the compilation takes most of a minute; nothing in the example depends on
# the backend.
if BACKEND == "torch":

    def test_bits_per_byte_are_those_of_evaluate(example, text):
        backbone = settings(example, "hybrid").fitted_backbone()
        lm = example.keras_mom.models.MoMCausalLM(backbone)
        lines = example.measure(lm, text, 8, (1, 2), 2, 40, 3)
        windows = text.data[:40].reshape(5, 8).astype("int32")
        found = lm.evaluate(windows, batch_size=5, verbose=0, return_dict=True)
        bits = float(lines[0]["bits_per_byte"])
        assert abs(bits - math.log2(found["perplexity"])) < 1e-4
        assert lines[0]["predicted"] == 35

        def line(measure, context):
            (found,) = (
                line
                for line in lines
                if (line["measure"], line["context"]) == (measure, context)
            )
            return float(found["bits_per_byte"]), found["predicted"]

        # The longer windows hold the first byte of the last 8, and 7 before it.
        assert line("last", 8) == line("window", 8)
        assert line("last", 16)[1] == 3 * 7
        places = line("position", 8)[0] * 7 + line("position", 16)[0] * 8
        assert abs(places / 15 - line("window", 16)[0]) < 1e-4
        ends, _ = example.lm_text.window_ends(text, 16, 8, 3)
        scores = lm.score(example.lm_text.windows_before(text, ends, 16))
        last = -scores[:, -7:].mean() / math.log(2)
        assert abs(last - line("last", 16)[0]) < 1e-4

    def test_every_run_has_the_precision_asked_for(
        example, text, tmp_path, monkeypatch
    ):
        example.lm_text.pack(text, tmp_path / "text.npz")
        found = []

        def train(run, *_):
            found.append((run["dtype"], keras.config.dtype_policy().name))
            line = dict(measure="last", context=16, bits_per_byte=1.0, seconds=1.0)
            return [line], SimpleNamespace(remove=lambda: None)

        monkeypatch.setattr(example, "train", train)
        monkeypatch.setattr(example, "tables", lambda rows: "")
        options = [*OPTIONS.split(), "--text", str(tmp_path / "text.npz")]
        options += ["--out", str(tmp_path), "--dtype", "mixed_bfloat16"]
        policy = keras.config.dtype_policy()
        example.main([*options, "--models", "single", "mom"])
        keras.config.set_dtype_policy(policy)
        assert found == 2 * [2 * ("mixed_bfloat16",)]

    def test_a_run_is_taken_up_and_then_left_out(example, text, tmp_path, monkeypatch):
        example.lm_text.pack(text, tmp_path / "text.npz")
        options = [*OPTIONS.split(), "--text", str(tmp_path / "text.npz")]

        def run(name, *models):
            folder = tmp_path / name
            example.main([*options, "--out", str(folder), "--models", *models])
            (curve,) = (folder / "curves").glob("mom-*.csv")
            with curve.open(newline="") as file:
                rows = list(csv.DictReader(file))
            return [{**row, "bytes_per_second": ""} for row in rows], folder

        whole, folder = run("whole", "mom")
        assert [row["bytes"] for row in whole] == ["32", "64", "96"]
        with monkeypatch.context() as patch:
            answers = iter([False, True, True])
            patch.setattr(example.Deadline, "passed", lambda self: next(answers))
            part, other = run("part", "mom")
        assert part == whole[:1]
        assert not list((other / "runs").iterdir())
        with monkeypatch.context() as patch:
            patch.setattr(example, "measure", None)
            with pytest.raises(TypeError):
                run("part", "mom")
        taken_up, _ = run("part", "mom")  # all but the tests is done
        assert taken_up == whole
        results = []
        for path in (folder, other):
            with (path / "results.csv").open(newline="") as file:
                results.append(list(csv.DictReader(file)))
            assert not list((path / "unfinished").iterdir())
        for x, y in zip(*results, strict=True):
            different = {name for name in x if x[name] != y[name]}
            assert different <= {"seconds", "bytes_per_second"}
            assert float(x["router_entropy"]) > 0
        # Of the test text: a line of its own, and three for each of five lengths.
        assert len(results[0]) == 1 + 3 * 5

        monkeypatch.setattr(example, "train", None)
        again, _ = run("part", "mom")
        assert again == whole
