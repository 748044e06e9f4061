"""`examples/train_lm.py`: training that is killed and taken up again."""

import keras
import numpy as np
import pytest

from tests.example_modules import example_module
from tests.layer_helpers import BACKEND


@pytest.fixture(scope="module")
def example():
    with example_module("train_lm") as module:
        yield module


def test_batches_follow_the_step(example):
    text = np.arange(200, dtype="uint8")
    step = 0
    windows = example.Windows(text, 2, 5, steps=3, seed=1, step=lambda: step)
    windows.on_epoch_begin()
    assert len(windows) == 3
    first = [windows[index] for index in range(6)]
    assert all((np.diff(batch) == 1).all() for batch in first)
    assert not np.array_equal(first[0], first[3])
    step = 3
    windows.on_epoch_begin()
    np.testing.assert_array_equal(windows[1], first[4])


# Elsewhere the compilation of three models takes most of a minute; nothing in the
# example depends on the backend.
if BACKEND == "torch":

    def test_a_killed_run_ends_with_the_same_curve(example, tmp_path, monkeypatch):
        options = "--parameters 100k --epochs 3 --steps 3 --batch 2 --length 16"
        options += " --held-out 2 --final 2 --warmup 2 --dropout 0.2 --write 5"

        def run(name, *more):
            folder = str(tmp_path / name)
            return example.main([*options.split(), "--folder", folder, *more])

        def kill(*arguments):
            raise KeyboardInterrupt

        run("whole")
        monkeypatch.setattr(example.os, "kill", kill)
        with pytest.raises(KeyboardInterrupt):
            run("killed", "--kill-at", "5")
        curve = tmp_path / "killed" / "curve.csv"
        assert len(curve.read_text().splitlines()) == 2  # a head and an epoch
        # A row behind the backup, as of a run that was killed between the two.
        curve.write_text(curve.read_text() + "6,0,0,0,0\n")
        run("killed")
        whole = tmp_path / "whole" / "curve.csv"
        assert len(whole.read_text().splitlines()) == 4
        assert curve.read_text() == whole.read_text()
        weights = [
            keras.saving.load_model(tmp_path / name / "lm.keras").get_weights()
            for name in ("whole", "killed")
        ]
        for x, y in zip(*weights, strict=True):
            np.testing.assert_array_equal(x, y)
