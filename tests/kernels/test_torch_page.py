"""What docs/torch.md shows runs as it stands, and `keras_mom_kernels` as it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "torch.md"


def test_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    exec(blocks[0], names)
    assert names["output"].shape == (1, 8, 2, 16)
    assert names["state"].shape == (2, 2, 16, 16)
    for name in ("log_decay", "beta"):
        assert names[name].grad.abs().sum() > 0
    exec(blocks[1], names)
    outputs = torch.stack(names["outputs"])
    assert outputs.shape == (5, 1, 2, 16) and outputs.isfinite().all()
    assert names["state"].any()


def test_torch_is_imported_for_the_functions_alone():
    code = (
        "import sys\n"
        "import keras_mom_kernels, keras_mom_kernels.memory_scan.shapes\n"
        "assert 'torch' not in sys.modules\n"
        "from keras_mom_kernels.memory_scan import torch as folder\n"
        "from keras_mom_kernels import convolution_step, memory_scan, memory_step\n"
        "assert memory_scan is folder.memory_scan and callable(memory_step)\n"
        "assert not {'keras', 'keras_mom'} & set(sys.modules)\n"
        "assert not hasattr(keras_mom_kernels, 'nothing')"
    )
    path = {"PYTHONPATH": str(PAGE.parents[1] / "kernels"), "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=path)
