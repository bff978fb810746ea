"""Other projects' scans, in a folder of their own: `python benchmarks/foreign_packages.py` prints its path.

mamba-ssm, Triton, fla-core and einops must not enter the environment they are compared from: once mamba_ssm can be
imported, transformers binds its CUDA kernels and CPU models of that kind no longer run. The folder takes about 1 GB and
is kept; MAMTRA_RAY_KERNEL_ENV chooses another place.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

MAMBA_SSM = "mamba-ssm==2.3.2.post1"
FLA = "fla-core==0.6.0"
LOCK = Path(__file__).parents[1] / "constraints.txt"


def _pip_install(target: Path, *arguments: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", LOCK, "--target", target, *arguments],
        check=True,
        env={**os.environ, **environment},
        stdout=sys.stderr,
    )


def folder() -> Path:
    """The folder, filled on first use. It is renamed into place when it is complete."""
    default = Path(tempfile.gettempdir()) / f"mamtra_ray_kernels_py{sys.version_info.major}{sys.version_info.minor}"
    place = Path(os.environ.get("MAMTRA_RAY_KERNEL_ENV", default))
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
        build, packages = Path(temporary) / "build", Path(temporary) / "packages"
        _pip_install(build, "setuptools", "wheel", "packaging", "ninja")
        _pip_install(packages, "--no-deps", "triton", "einops", FLA)
        # Built with the torch that is here and without CUDA extensions: the Triton kernels are Python.
        _pip_install(
            packages, "--no-deps", "--no-build-isolation", MAMBA_SSM,
            PYTHONPATH=str(build), MAMBA_FORCE_BUILD="TRUE", MAMBA_SKIP_CUDA_BUILD="TRUE",
        )  # fmt: skip
        packages.rename(place)
    return place


if __name__ == "__main__":
    print(folder())
