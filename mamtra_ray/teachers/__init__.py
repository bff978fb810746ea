"""Teachers: pretrained speech language models, each read from its own kind of checkpoint."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from mamtra_ray.errors import InputError, nearest_name

if TYPE_CHECKING:
    import torch

    from mamtra_ray.teachers.base import Teacher

LOADERS = {
    "demo": "mamtra_ray.teachers.demo",
    "cosyvoice2": "mamtra_ray.teachers.cosyvoice2",
    "llasa": "mamtra_ray.teachers.llasa",
    "huggingface": "mamtra_ray.teachers.huggingface",
}
"""Module per kind; each has ``load(path, dtype, device) -> Teacher``. ``huggingface`` takes any Qwen2 or Llama."""


def load_teacher(
    kind: str, path: Path | str | None = None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Teacher:
    """Load a teacher, in evaluation mode.

    Args:
        kind: one of :data:`LOADERS`.
        path: its checkpoint folder; None for the packaged demo teacher.
        dtype: of the parameters; float32 if None.
        device: where to put it.

    Raises:
        InputError: unknown kind, or a checkpoint that is missing, damaged or of another kind.
    """
    import torch

    if kind not in LOADERS:
        raise InputError(f"unknown teacher {kind!r}: {nearest_name(kind, LOADERS)}")
    if path is None and kind != "demo":
        raise InputError(f"teacher {kind!r} needs the path of its checkpoint folder")
    module = importlib.import_module(LOADERS[kind])
    teacher: Teacher = module.load(None if path is None else Path(path), dtype or torch.float32, device)
    teacher.model.eval()
    return teacher
