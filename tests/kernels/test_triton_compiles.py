"""The Triton kernels compile without a GPU, and keep to the registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def report(*arguments, script="offline.py"):
    """What a script prints: in a process of its own, without the interpreter."""
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = str(here.parents[1] / "kernels")
    command = [sys.executable, "-W", "ignore", str(here / script)]
    result = subprocess.run(
        [*command, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [line.split() for line in result.stdout.splitlines()]


# Bytes of stack, which were faster on an H200 than the forms without.
SPILLS = {"scan_chunks": 24, "scan_gradients": 136, "solve_gradients": 184}


def test_mom_shape_on_hopper_spills_few_registers():
    lines = report("cuda", 90, 128, 128, "bfloat16", "head")
    assert len(lines) == 13
    for name, registers, stack in lines:
        assert int(stack) <= SPILLS.get(name, 0), (name, registers, stack)


def test_kernels_around_the_scan_spill_no_register():
    lines = report("cuda", 90, script="offline_layer.py")
    assert len(lines) == 17
    for name, registers, stack in lines:
        assert int(stack) == 0, (name, registers, stack)


@pytest.mark.parametrize(
    "script, arguments, count",
    (
        ("offline.py", (64, 64, "bfloat16", "head"), 13),
        ("offline_convolution.py", (1024, 8, "bfloat16"), 3),
        ("offline_layer.py", (), 17),
        ("offline_step.py", (128, 128, "bfloat16"), 9),
    ),
)
class TestOtherChips:
    def test_amd(self, script, arguments, count):
        assert len(report("hip", "gfx942", *arguments, script=script)) == count

    @pytest.mark.exhaustive
    def test_ampere(self, script, arguments, count):
        assert len(report("cuda", 80, *arguments, script=script)) == count


def test_a_single_token_on_hopper_spills_no_register():
    lines = report("cuda", 90, 128, 128, "bfloat16", script="offline_step.py")
    assert len(lines) == 9
    for name, registers, stack in lines:
        assert int(stack) == 0, (name, registers, stack)
