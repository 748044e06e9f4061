"""A layer through the kernels equals its portable form.

Keras is imported in a process of its own: the other tests here run without it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("script", ("layer_steps.py", "layer_whole.py"))
def test_the_layer(script):
    here = Path(__file__).resolve().parent
    root = here.parents[1]
    environment = {**os.environ, "KERAS_BACKEND": "torch", "TRITON_INTERPRET": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    # Beside another worker, and for small arrays, threads cost more than they give.
    environment["OMP_NUM_THREADS"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (root, root / "kernels")))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(here / script)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
