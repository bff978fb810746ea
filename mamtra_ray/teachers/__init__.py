"""Teachers: pretrained speech language models, each read from its own kind of checkpoint."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mamtra_ray.assets import PACKAGED
from mamtra_ray.errors import InputError, nearest_name

if TYPE_CHECKING:
    import torch

    from mamtra_ray.teachers.teacher import Teacher

LOADERS = {
    "demo": "mamtra_ray.teachers.demo",
    "demo24": "mamtra_ray.teachers.demo24",
    "cosyvoice2": "mamtra_ray.teachers.cosyvoice2",
    "llasa": "mamtra_ray.teachers.llasa",
    "huggingface": "mamtra_ray.teachers.huggingface",
    "causal_lm": "mamtra_ray.teachers.causal_lm",
}
"""Module per kind; each has ``load(path, dtype, device) -> Teacher``. ``huggingface`` takes any Qwen2 or Llama of text
and speech tokens, ``causal_lm`` any of text alone."""


def load_teacher(
    kind: str, path: Path | str | None = None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Teacher:
    """Load a teacher, in evaluation mode.

    Args:
        kind: one of :data:`LOADERS`, or ``package.module:function`` of your own.
        path: its checkpoint folder, or GGUF file; None for a packaged teacher.
        dtype: of the parameters; float32 if None.
        device: where to put it.

    Raises:
        InputError: unknown kind, or a checkpoint that is missing, damaged or of another kind.
    """
    import torch

    from mamtra_ray.teachers.teacher import Teacher

    check_kind(kind, path)
    load = _loader(kind)
    teacher: Teacher = load(None if path is None else Path(path), dtype or torch.float32, device)
    if not isinstance(teacher, Teacher):
        raise InputError(f"teacher.kind={kind} must return a Teacher, not {type(teacher).__name__}")
    teacher.model.eval()
    return teacher


def _loader(kind: str) -> Callable[..., Teacher]:
    """The function behind a kind: a shipped one, or ``package.module:function`` of the user's."""
    module_name, separator, function = kind.partition(":")
    if not separator:
        loader: Callable[..., Teacher] = importlib.import_module(LOADERS[kind]).load
        return loader
    try:
        found: object = importlib.import_module(module_name)
        for part in function.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise InputError(
            f"teacher.kind={kind} cannot be imported ({error}): give MODULE:FUNCTION, its folder on PYTHONPATH"
        ) from None
    except (AttributeError, ValueError) as error:
        raise InputError(f"teacher.kind={kind}: {error}; expected is MODULE:FUNCTION") from None
    if not callable(found):
        raise InputError(f"teacher.kind={kind} is no function but {type(found).__name__}")
    return found


@functools.lru_cache(maxsize=1)
def cached_teacher(kind: str, path: str | None) -> Teacher:
    """:func:`load_teacher`, once per process: a verb asks for its shape before it begins a session."""
    return load_teacher(kind, path)


def check_kind(kind: str, path: Path | str | None) -> None:
    """Refuse a kind that has no loader, and one without the folder that it needs; loads nothing.

    Raises:
        InputError: one of these.
    """
    if ":" in kind:
        _loader(kind)
    elif kind not in LOADERS:
        raise InputError(
            f"teacher.kind: unknown teacher {kind!r}: {nearest_name(kind, LOADERS)}; or MODULE:FUNCTION of your own"
        )
    if path is None and kind not in PACKAGED:
        raise InputError(f"teacher {kind!r} needs teacher.path, the folder of its checkpoint")
    if path is not None and not Path(path).is_dir():
        if kind != "causal_lm":
            raise InputError(f"teacher.path: {path} is no folder")
        if not Path(path).is_file():
            raise InputError(f"teacher.path: {path} is neither a folder nor a GGUF file")
