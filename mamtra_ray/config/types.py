"""What the values of a search-space file are made of: strict sections, lists, paths."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A part of the file: unknown keys are refused, values are not converted between types, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _as_list(value: Any) -> Any:
    """On a command line ``search.ratios=1:1,1:3`` and ``search.keep_attention=0`` are lists too."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


def _no_bool(value: Any) -> Any:
    """pydantic would take ``true`` for 1."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


def _no_blank(value: str | None) -> str | None:
    if value is not None and (not value.strip() or "\0" in value):
        raise ValueError("a path is expected; leave the key out for none")
    return value


Several = BeforeValidator(_as_list)
"""A list that may be written as one value, or with commas."""
_Number = BeforeValidator(_no_bool)
MOST = 10**15
"""Above every count that means something here, and exact as a float."""
Count = Annotated[int, _Number, Field(gt=0, le=MOST)]
CountOrZero = Annotated[int, _Number, Field(ge=0, le=MOST)]
Layers = Annotated[tuple[CountOrZero, ...], Several]
Positive = Annotated[float, _Number, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, _Number, Field(ge=0, le=1e9)]
LearningRate = Annotated[float, _Number, Field(gt=0, le=1)]
Share = Annotated[float, _Number, Field(ge=0, lt=1)]
Seed = Annotated[int, _Number, Field(ge=0, lt=2**32)]


def _absolute(path: str) -> str:
    """Links are left as they are: what they lead to may change between sessions."""
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 (Path has no way to do this)


LocalPath = Annotated[str, AfterValidator(_no_blank), AfterValidator(_absolute)]
"""A path of this machine, or of a folder that all machines share; absolute once read, whatever worker looks at it."""


def _absolute_unless_uri(location: str) -> str:
    return location if "://" in location else _absolute(location)


LocalPathOrUri = Annotated[str, AfterValidator(_no_blank), AfterValidator(_absolute_unless_uri)]
"""The same, or a URI such as ``s3://bucket/folder``."""


def _absolute_behind_colon(name: str) -> str:
    """``whisper:models/large`` -> ``whisper:/.../models/large``."""
    kind, separator, path = name.partition(":")
    return f"{kind}:{_absolute(path)}" if separator and path else name


NameWithPath = Annotated[str, AfterValidator(_no_blank), AfterValidator(_absolute_behind_colon)]
"""A name, with a path behind a colon where it needs files."""
