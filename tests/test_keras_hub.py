"""KerasHub's own tests of backbones and tasks, in a process of their own."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from keras_mom.models import hub


@pytest.mark.skipif(
    importlib.util.find_spec("keras_hub") is None, reason="KerasHub is not installed"
)
def test_conformance():
    path = pathlib.Path(__file__).with_name("keras_hub_conformance.py")
    # KerasHub brings TensorFlow along, whatever the backend: not into this process.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=path.parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed" in result.stdout


def test_a_broken_installation_is_as_none(monkeypatch):
    def fail(name):
        raise RuntimeError("a library of it is too old")

    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(hub.importlib, "import_module", fail)
    with pytest.warns(UserWarning, match="cannot be imported.*is too old"):
        assert hub._installed() is None
