"""Whether this machine has what torch.compile calls: a C++ compiler for a CPU, Triton and a C compiler for a GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

from mamtra_ray.errors import InputError


def check_compiler(*, is_cuda: bool) -> None:
    """Look for it without torch.

    Raises:
        InputError: names what is missing.
    """
    missing = None
    variable, names = ("CC", ("gcc", "clang")) if is_cuda else ("CXX", ("g++",))
    wanted = (os.environ[variable],) if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in wanted):
        missing = f"a {'C' if is_cuda else 'C++'} compiler, and there is no {' or '.join(wanted)} (set {variable})"
    elif not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing = "Python's headers (python3-dev)"
    elif is_cuda and importlib.util.find_spec("triton") is None:
        missing = "Triton, which is not installed"
    if missing:
        raise InputError(f"distill.compile=true needs {missing}; distill.compile=false does without")
