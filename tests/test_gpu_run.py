"""`make gpu-test`: what it says without a card, and which tests it lists as run, skipped or failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu_run
import pytest

PROGRAM = Path(gpu_run.__file__)
TESTS = """
import pytest

@pytest.mark.gpu
def test_good():
    pass

@pytest.mark.gpu
def test_left_out():
    pytest.skip("no kernels here")

@pytest.mark.gpu
def test_bad():
    assert 1 == 2

@pytest.mark.gpu
@pytest.mark.slow
def test_long():
    pass

def test_of_the_cpu():
    raise AssertionError
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "test_made.py").write_text(TESTS)
    markers = "markers = ['gpu: x', 'slow: x']"
    (tmp_path / "pyproject.toml").write_text(f"[tool.pytest.ini_options]\naddopts = \"-m 'not gpu'\"\n{markers}\n")
    return tmp_path


def listed(folder, *arguments):
    """The exit code of a run whose tests need no card, and its last section."""
    code = (
        "import sys, gpu_run; gpu_run.missing_device = lambda: None;"
        "sys.exit(gpu_run.main(['-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parent)}
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return run.returncode, run.stdout.partition("GPU tests on ")[2]


def test_every_test_is_listed_with_its_reason(folder):
    code, lines = listed(folder)
    assert code == 1
    assert "ran: 2\n  test_made.py::test_good\n  test_made.py::test_long\n" in lines
    assert "skipped: 1\n  test_made.py::test_left_out: no kernels here\n" in lines
    assert "failed: 1\n  test_made.py::test_bad: assert 1 == 2\n" in lines
    assert "test_of_the_cpu" not in lines


@pytest.mark.parametrize(("chosen", "code"), [("good", 0), ("left_out", 2), ("of_the_cpu", 2)])
def test_only_a_test_that_ran_is_a_success(folder, chosen, code):
    assert listed(folder, "-k", chosen)[0] == code


def test_a_torch_without_a_device_is_one_sentence():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and run.stderr.endswith("nothing was run\n")


def test_a_machine_without_a_card_is_told_before_anything_is_installed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_run, "DEVICE_FILES", (str(tmp_path / "nvidia0"),))
    assert gpu_run.main(["--card"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "nvidia0").touch()
    assert gpu_run.main(["--card"]) == 0
