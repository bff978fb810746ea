"""The CUDA path, proven without a GPU: mamba-ssm's real kernels under Triton's interpreter against our CPU scan.

mamba-ssm and Triton go into a folder of their own (about 1 GB, kept between runs; set MAMTRA_RAY_KERNEL_ENV to choose
it), never into the environment of the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

MAMBA_SSM = "mamba-ssm==2.3.2.post1"
PROGRAM = Path(__file__).with_name("mamba_ssm_interpreted.py")


def _pip_install(target: Path, *arguments: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), *arguments],
        check=True,
        env={**os.environ, **environment},
    )


def _kernel_environment() -> Path:
    """The folder with mamba-ssm and Triton, filled on first use. Renamed into place only when it is complete."""
    default = Path(tempfile.gettempdir()) / f"mamtra_ray_{MAMBA_SSM.replace('==', '_')}_py{sys.version_info.minor}"
    folder = Path(os.environ.get("MAMTRA_RAY_KERNEL_ENV", default))
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        build, kernels = Path(temporary) / "build", Path(temporary) / "kernels"
        _pip_install(build, "setuptools", "wheel", "packaging", "ninja")
        _pip_install(kernels, "--no-deps", "triton", "einops")
        # The package is built with the torch that is here, without its CUDA extensions: the Triton kernels are Python.
        _pip_install(
            kernels, "--no-deps", "--no-build-isolation", MAMBA_SSM,
            PYTHONPATH=str(build), MAMBA_FORCE_BUILD="TRUE", MAMBA_SKIP_CUDA_BUILD="TRUE",
        )  # fmt: skip
        kernels.rename(folder)
    return folder


@pytest.fixture(scope="module")
def report() -> dict:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[1]), str(_kernel_environment())]),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_cuda_tensors_go_through_mamba_ssm(report: dict) -> None:
    assert report["mamba_ssm"] in MAMBA_SSM
    for kernel in ("mamba_chunk_scan_combined", "selective_state_update", "rmsnorm_fn"):
        assert report["calls"].get(kernel, 0) > 0, f"{kernel} was not called"


@pytest.mark.slow
def test_mamba_ssm_agrees_with_the_cpu_path(report: dict) -> None:
    """Values and every gradient, of the scan (padded, with an initial state), the gated norm and the whole mixer."""
    errors = {f"{part}: {name}": e for part, parts in report["errors"].items() for name, e in parts.items()}
    assert len(errors) == 10 + 10 + 4 + 4 + 4
    too_large = {name: e for name, e in errors.items() if not e < 5e-6}
    assert not too_large


def test_no_module_imports_mamba_ssm_on_the_cpu() -> None:
    """Without mamba-ssm everything runs; with it installed, nothing pulls it in before a CUDA tensor comes."""
    program = (
        "import sys, torch; from mamtra_ray.models import mamba, ssd, ssd_cuda; "
        "mixer = mamba.MambaMixer(mamba.MixerConfig(16, 2, 1, 8)); mixer(torch.randn(1, 3, 16)).sum().backward(); "
        "assert 'mamba_ssm' not in sys.modules and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PROGRAM.parents[1])
