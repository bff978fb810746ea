"""Every key of a search-space file with type, default, allowed values and meaning (``--explain``)."""

from __future__ import annotations

import textwrap
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mamtra_ray.config.sections import Config

_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "none"}
_WIDTH = 116


def explain() -> str:
    """All keys, one paragraph each."""
    lines: list[str] = []
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines.append(f"\n{name}:")
            for key, inner in field.annotation.model_fields.items():
                lines += _paragraph(key, inner, "  ")
        else:
            lines += _paragraph(name, field, "")
    return "\n".join(lines).strip("\n")


def _paragraph(key: str, field: FieldInfo, indent: str) -> list[str]:
    default = "none" if field.default is None else _text(field.default)
    allowed = _allowed(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
    head = f"{indent}{key} = {default}   ({allowed})"
    meaning = " ".join((field.description or "").split())
    return [head, *textwrap.wrap(meaning, _WIDTH, initial_indent=f"{indent}    ", subsequent_indent=f"{indent}    ")]


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _allowed(annotation: Any) -> str:
    """A type in words, with its bounds: ``whole number > 0``, ``hidden | topk``, ``list of ...``."""
    origin = get_origin(annotation)
    if origin is Annotated:
        kind, *metadata = get_args(annotation)
        bounds = [text for part in metadata for text in _bounds(part)]
        return " ".join([_allowed(kind), *([", ".join(bounds)] if bounds else [])])
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        return " or ".join(_allowed(part) for part in get_args(annotation))
    if origin is tuple:
        return f"list of: {_allowed(get_args(annotation)[0])}"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(metadata: Any) -> list[str]:
    if isinstance(metadata, FieldInfo):
        return [text for part in metadata.metadata for text in _bounds(part)]
    signs = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}
    for kind, (sign, attribute) in signs.items():
        if isinstance(metadata, kind):
            return [f"{sign} {getattr(metadata, attribute):g}"]
    return [f"at least {metadata.min_length}"] if isinstance(metadata, MinLen) else []
