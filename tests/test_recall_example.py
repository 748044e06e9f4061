"""`examples/recall`: what is asked, which runs are made, how they are shared out."""

import dataclasses
import shutil
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from tests.example_modules import example_module


@pytest.fixture(scope="module")
def example():
    """`run.py`, whose small preset has become tiny."""
    with example_module("recall/run") as module:
        preset = module.PRESETS["small"]
        (task,) = preset.tasks
        short = dict(length=8, num_pairs=2, vocabulary_size=16, random_fill=False)
        task = dataclasses.replace(
            task,
            vocabulary_size=16,
            training=(dict(short, num_examples=16),),
            tests=(dict(short, num_examples=8), dict(short, num_examples=8, length=16)),
        )
        changes = dict(tasks=(task,), widths=(8,), batch_size=8, epochs=1, value_dim=8)
        module.PRESETS["small"] = preset.changed(**changes)
        yield module
        module.PRESETS["small"] = preset


def test_only_what_is_asked_is_kept(example):
    rng = np.random.default_rng(0)
    tokens = rng.integers(9, size=(5, 16)).astype("int32")
    weights = (rng.random((5, 16)) < 0.3).astype("float32")
    weights[0] = 0
    targets = (tokens * (weights > 0)).astype("int32")
    asked = example.Asked.of(example.keras_mom.tasks.Examples(tokens, targets, weights))
    assert asked.places.shape[1] == max(4, weights.sum(axis=1).max())
    inputs, found, counted = asked.batch(slice(1, None))
    np.testing.assert_array_equal(inputs["tokens"], tokens[1:])
    for row, (places, target, weight) in enumerate(
        zip(inputs["places"], found, counted), 1
    ):
        np.testing.assert_array_equal(places[weight > 0], np.flatnonzero(weights[row]))
        np.testing.assert_array_equal(target, targets[row, places])
        assert len(set(places)) == len(places)


def test_logits_are_those_of_the_places(example):
    preset = example.PRESETS["small"].changed(models=("mom",))
    _, settings, task = example.list_runs(preset)[0]
    model = example.build_model(settings, task.vocabulary_size)
    tokens = np.arange(16, dtype="int32").reshape(2, 8)
    everywhere = np.tile(np.arange(8, dtype="int32"), (2, 1))
    places = np.array([[7, 2, 2], [0, 1, 5]], "int32")
    whole = model.predict({"tokens": tokens, "places": everywhere}, verbose=0)
    some = model.predict({"tokens": tokens, "places": places}, verbose=0)
    assert whole.shape == (2, 8, 16)
    expected = np.take_along_axis(whole, places[..., None], axis=1)
    np.testing.assert_allclose(some, expected, rtol=1e-5, atol=1e-6)


def test_best_rate_alone_for_other_seeds(example, tmp_path):
    preset = example.PRESETS["small"].changed(
        models=("single",), learning_rates=(0.1, 0.2), seeds=(0, 1)
    )
    runs = example.list_runs(preset)
    results = example.Results(tmp_path, example.RUN, example.MEASURED, example.run_name)

    def needed():
        return {
            (run["learning_rate"], run["seed"]): example.is_needed(
                run, runs, results, sweep_seeds=[0]
            )
            for run, _, _ in runs
        }

    def finish(rate, validation):
        (run,) = (
            run for run, _, _ in runs if (run["learning_rate"], run["seed"]) == rate
        )
        line = dict.fromkeys(example.MEASURED, 0) | {"validation": validation}
        results.add(run, [line])

    finish((0.1, 0), 0.5)
    assert needed() == {(0.1, 0): True, (0.2, 0): True, (0.1, 1): None, (0.2, 1): None}
    finish((0.2, 0), 0.6)
    assert needed() == {(0.1, 0): True, (0.2, 0): True, (0.1, 1): False, (0.2, 1): True}
    # Another seed does not change which rate is best.
    finish((0.2, 1), 0.1)
    rows = [row for run, _, _ in runs for row in results.rows_of(run)]
    (chosen,) = example.best(rows).values()
    assert {row["learning_rate"] for row in chosen} == {"0.2"}


def test_plot_of_seeds_that_agree(example, tmp_path):
    """The mean of three times 0.90004 is above each of them, by rounding."""
    preset = example.PRESETS["small"].changed(models=("single",), seeds=(0, 1, 2))
    measured = dict.fromkeys(example.MEASURED, "1") | {"accuracy": "0.90004"}
    rows = [
        {name: str(value) for name, value in run.items()} | measured
        for run, _, _ in example.list_runs(preset)
    ]
    for file in example.plot(rows, str(tmp_path)):
        assert (tmp_path / file).stat().st_size > 0


def test_a_run_is_claimed_once(example, tmp_path):
    results = example.Results(tmp_path, ("a",), ("b",), lambda run: f"run{run['a']}")
    with results.claimed({"a": 1}) as first, results.claimed({"a": 1}) as second:
        assert first
        assert not second or sys.platform == "win32"
        with results.claimed({"a": 2}) as other:
            assert other
    with results.claimed({"a": 1}) as again:
        assert again


def test_rates_are_compared_with_seeds_that_run(example, tmp_path, monkeypatch):
    command = "run.py --preset small --seeds 0 1 --sweep-seeds 2 --out"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path)])
    with pytest.raises(SystemExit, match=r"--sweep-seeds: \{2\}.*\[0, 1\]"):
        example.main()


def test_command_is_taken_up(example, tmp_path, monkeypatch, capsys):
    command = "run.py --preset small --models single --seeds 0 --no-plots --out"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path)])
    example.main()
    assert "1 runs, 1 to do" in capsys.readouterr().out
    monkeypatch.setattr(example, "train", None)  # would fail
    example.main()
    printed = capsys.readouterr().out
    assert "1 runs, 0 to do" in printed and "| one memory" in printed


def test_known_runs_are_not_made_again(example, tmp_path, monkeypatch, capsys):
    command = "run.py --preset small --models single --seeds 0 1 --no-plots --out"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path / "first")])
    sys.argv[7:8] = []  # one seed
    monkeypatch.setattr(example, "train", _trained_by_nobody)
    example.main()
    capsys.readouterr()
    kept = tmp_path / "first" / "results.csv"
    arguments = [*command.split(), str(tmp_path / "second"), "--known", str(kept)]
    monkeypatch.setattr(sys, "argv", arguments)
    example.main()
    printed = capsys.readouterr().out
    assert "2 runs, 1 to do" in printed
    assert "| 2 |" in printed  # seeds of the table
    everything = (tmp_path / "second" / "results.csv").read_text()
    assert everything.startswith(kept.read_text()) and everything.count("\n") == 3
    # What is known twice, or the folder has itself, is there once.
    shutil.copy(tmp_path / "second" / "results.csv", tmp_path / "again.csv")
    sys.argv += [str(tmp_path / "again.csv"), "--seeds", "0", "1", "2"]
    example.main()
    again = (tmp_path / "second" / "results.csv").read_text()
    assert again.count("\n") == 4 and set(again.split()) > set(everything.split())
    sys.argv[-5:] = []
    kept.write_text("task,model\nmqar,single\n")
    with pytest.raises(ValueError, match="`--known`.*no column accuracy, active_state"):
        example.main()
    kept.unlink()
    with pytest.raises(ValueError, match="`--known`: there is no .*results.csv"):
        example.main()


def test_some_runs_alone(example, tmp_path, monkeypatch, capsys):
    command = "run.py --preset small --models single --seeds 0 1 --no-plots --runs 1"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--out", str(tmp_path)])
    monkeypatch.setattr(example, "train", _trained_by_nobody)
    for left in (2, 1, 0):
        example.main()
        assert f"2 runs, {left} to do" in capsys.readouterr().out
    sys.argv[sys.argv.index("--runs") + 1] = "0"
    with pytest.raises(SystemExit):
        example.main()
    assert "--runs: expected 1 or more, not 0" in capsys.readouterr().err


def test_every_run_has_the_precision_asked_for(example, tmp_path, monkeypatch):
    """Keras forgets its policy where it frees the models before."""
    found = []

    def train(run, *_):
        found.append((run["dtype"], keras.config.dtype_policy().name))
        return _trained_by_nobody()

    command = "run.py --preset small --models single --seeds 0 1 --no-plots"
    command += " --dtype mixed_bfloat16 --out"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path)])
    monkeypatch.setattr(example, "train", train)
    example.main()
    assert found == 2 * [2 * ("mixed_bfloat16",)]
    keras.config.set_dtype_policy("float32")
    sys.argv[sys.argv.index("mixed_bfloat16")] = "float32"
    example.main()  # runs of their own
    assert found[2:] == 2 * [2 * ("float32",)]


def _trained_by_nobody(*_):
    line = dict(test="T 8", length=8, state=1, active_state=1, parameters=1)
    line |= dict(validation=0.5, accuracy=0.5, seconds=1.0, backend="", hardware="")
    return [line], SimpleNamespace(remove=lambda: None)


def test_a_rate_is_data(example):
    """Steps are those of the rate as a number, but programs are alike for all rates."""
    schedule = keras.optimizers.schedules.CosineDecay
    options = dict(weight_decay=0.1)
    x = np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3)
    programs, ends = [], []
    for rate in (0.1, 0.3):
        for optimizer in (
            keras.optimizers.AdamW(schedule(rate, 4), **options),
            example.PeakRate.adamw(rate, schedule(1.0, 4), **options),
        ):
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
            model.compile(optimizer, "mse")
            model.fit(x, x[:, :2], epochs=3, batch_size=2, shuffle=False, verbose=0)
            ends.append(model.get_weights())
            programs.append(_program(model))
        for ours, theirs in zip(ends.pop(), ends.pop(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert programs[1] == programs[3]
    assert programs[0] is None or programs[0] != programs[2]


def _program(model):
    """What JAX compiles of an optimizer's step; None elsewhere."""
    if keras.config.backend() != "jax":
        return None
    import jax

    values = [x.value for x in model.trainable_variables]
    state = [x.value for x in model.optimizer.variables]
    step = jax.jit(model.optimizer.stateless_apply)
    return step.lower(state, values, values).as_text()
