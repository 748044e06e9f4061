"""The Pallas kernels run shard by shard where batch or heads are sharded."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("jax_shards.py")


def test_shards_are_computed_where_they_lie():
    path = os.pathsep.join([str(SCRIPT.parents[2] / "kernels"), *sys.path])
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ok = ["head", "channel", "step", "convolution step", "vmap"]
    assert done.stdout.split("\n")[:-1] == [f"{name} ok" for name in ok]
