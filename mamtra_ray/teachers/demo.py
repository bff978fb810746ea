"""The demo teacher: a small Qwen2 that speaks household commands in one voice. Works offline, on a CPU.

``python -m mamtra_ray.demo_assets`` builds it, its corpus and its codec from nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from mamtra_ray.assets import demo_asset
from mamtra_ray.teachers.demo_grammar import detokenize_text, tokenize_text

if TYPE_CHECKING:
    import torch

    from mamtra_ray.teachers.teacher import Teacher

__all__ = ["detokenize_text", "load", "tokenize_text"]


def load(path: Path | None = None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Teacher:
    """The demo teacher.

    Args:
        path: its folder (a Qwen2 checkpoint and ``speech_lm.json``); none for the packaged one, which is
            checked against the package's manifest first.
        dtype: of the parameters; float32 if None.
        device: where to put it.

    Raises:
        InputError: a file is missing or damaged.
    """
    import torch

    from mamtra_ray.teachers import huggingface

    folder = demo_asset("teacher") if path is None else Path(path)
    teacher = huggingface.load(folder, dtype or torch.float32, device)
    return dataclasses.replace(teacher, name="demo")
