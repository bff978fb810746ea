"""Reading and writing search-space files: defaults < file (``--space``) < ``key=value`` overrides.

Files are YAML 1.2, in which ``1:3`` is a ratio, ``1e-5`` a number and ``yes`` a word; a repeated key is refused.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mamtra_ray.artifacts import write_text
from mamtra_ray.config.sections import Config
from mamtra_ray.errors import InputError, nearest_name

_PACKAGE = Path(__file__).parents[1]
SHIPPED_SPACES = next(
    (folder for folder in (_PACKAGE / "search_spaces", _PACKAGE.parent / "search_spaces") if folder.is_dir()),
    _PACKAGE / "search_spaces",
)
"""The shipped files: in an installed package inside of it, in a checkout beside it."""
DEFAULT_SPACE = "demo"

RENAMED = {
    "search.seed": "seed",
    "search.context_length": "context_length",
    "search.cpus_per_worker": "resources.cpus_per_worker",
    "search.gpus_per_worker": "resources.gpus_per_worker",
    "student.initialisation": "student.initialization",
    "align.batch_tokens": "align.tokens_per_batch",
    "probe.masks": "probe.num_layouts",
    "distill.batch_tokens": "distill.tokens_per_batch",
    "distill.gradient_clip": "distill.max_grad_norm",
    "distill.logits_weight": "distill.kl_weight",
    "distill.embedding_weight": "distill.hidden_weight",
    "distill.embedding_levels": "distill.hidden_layers",
    "distill.skew": "distill.kl_skew",
    "distill.checkpoint_tokens": "distill.checkpoint_every_tokens",
}
"""Keys of version 0.1 and what they are called now."""


_SEAL, _SEAL_END = "# SHA-256 of what follows: ", " (remove this line to change it by hand)"


class _Quoted(str):
    """Written in quotation marks."""


_STRING_TAG = "tag:yaml.org,2002:str"


def load_config(space: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a search-space file and apply ``section.key=value`` overrides (values are YAML).

    Args:
        space: a file, or the name of a shipped one such as ``cosyvoice2``; none for ``demo``.
        overrides: later ones win.

    Raises:
        InputError: missing or malformed file, unknown key (with the nearest valid one), a value out of range, or
            values that contradict each other.
    """
    path = space_file(space)
    content = _read(path)
    for override in overrides:
        _apply_override(content, override)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise InputError(_first_problem(error, path)) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML with its hash, atomically; :func:`load_config` reads it back."""
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    # Quoted for readers of YAML 1.1, in which a bare 1:3 is the number 63.
    yaml.representer.add_representer(_Quoted, lambda to, value: to.represent_scalar(_STRING_TAG, value, style="'"))
    content = config.model_dump(mode="json")
    content["search"]["ratios"] = [_Quoted(ratio) for ratio in content["search"]["ratios"]]
    yaml.dump(content, text)
    write_text(path, f"{_SEAL}{_hash(text.getvalue())}{_SEAL_END}\n{text.getvalue()}")


def space_file(space: Path | str | None) -> Path:
    """The file behind ``--space``.

    Raises:
        InputError: neither a file nor the name of a shipped one.
    """
    text = str(space or DEFAULT_SPACE)
    if text and "\0" not in text and not Path(text).suffix and "/" not in text:
        shipped = SHIPPED_SPACES / f"{text}.yaml"
        if shipped.is_file():
            return shipped
        names = [file.stem for file in SHIPPED_SPACES.glob("*.yaml")]
        raise InputError(
            f"no shipped search space is called {text!r}: {nearest_name(text, names)}; or give a .yaml file"
        )
    return Path(text)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = _parse(text)
    except FileNotFoundError:
        raise InputError(f"search space {path} does not exist") from None
    except (OSError, ValueError, KeyError, YAMLError, RecursionError) as error:
        raise InputError(f"search space {_printable(path)} cannot be read: {_one_line(error)}") from None
    if not text.strip():
        raise InputError(f"search space {path} is empty")
    first, _, rest = text.partition("\n")
    if first.startswith(_SEAL) and first.removeprefix(_SEAL).removesuffix(_SEAL_END) != _hash(rest):
        raise InputError(
            f"{path} is not as mamtra_ray wrote it: give changes as key=value, or remove its first line if you changed "
            "it yourself"
        )
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"search space {path} must hold sections such as teacher: and search:")
    return content


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"an override is key=value, such as search.trials=40, not {override!r}")
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise InputError(f"override {override!r}: {parent} is no section")
    try:
        section[last] = _parse(text)
    except (YAMLError, ValueError, KeyError, RecursionError):
        raise InputError(f"override {_short(override)}: the value is no YAML") from None


def _first_problem(error: ValidationError, path: Path) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    keys = _keys(location)
    where, source = ".".join(keys), f"(in {path} or the overrides)"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        if where in RENAMED:
            return f"the key {where} is called {RENAMED[where]} since version 0.2 {source}: rename it"
        names = _section(keys[:-1]).model_fields
        return f"unknown key {where!r} {source}: {nearest_name(keys[-1], names)}"
    if problem["type"] in ("model_type", "dict_type"):
        return f"{where} {source} must be a section of keys, not {_short(problem['input'])}"
    if problem["type"] == "literal_error":
        message = nearest_name(str(problem["input"]), re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
    if isinstance(problem["input"], BaseModel | dict):  # a check of several keys, which names them itself
        return f"{message} {source}"
    return f"{where} = {_short(problem['input'])} {source}: {message}"


def _keys(location: Sequence[str]) -> list[str]:
    """The part of an error's location that a user has written: no list index, no name of a union's member."""
    keys: list[str] = []
    model: type[BaseModel] | None = Config
    for part in location:
        if model is None:
            break
        keys.append(part)
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return keys


def _section(keys: Sequence[str]) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for key in keys:
        annotation = model.model_fields[key].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return model


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _printable(path: Path) -> str:
    return _short(str(path)) if not str(path).isprintable() or len(str(path)) > 200 else str(path)


def _one_line(error: BaseException) -> str:
    return _short(" ".join(str(error).split()) or type(error).__name__)[:300]
