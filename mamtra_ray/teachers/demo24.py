"""The deep demo teacher: 24 layers that speak the demo's language in sentences of up to 62 words. Offline, on a CPU.

``python -m mamtra_ray.demo_assets --teacher demo24`` builds it and its corpus; codec and words are the demo's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from mamtra_ray.assets import demo_asset, packaged_folder
from mamtra_ray.teachers import demo

if TYPE_CHECKING:
    import torch

    from mamtra_ray.teachers.teacher import Teacher


def load(path: Path | None = None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Teacher:
    """The deep demo teacher; arguments and errors as of :func:`mamtra_ray.teachers.demo.load`."""
    folder = demo_asset("teacher", packaged_folder("demo24")) if path is None else path
    return dataclasses.replace(demo.load(folder, dtype, device), name="demo24")
