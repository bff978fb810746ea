"""Files that others read: written atomically, carrying a version and a hash of what made them.

A *manifest* is a JSON object with ``kind``, ``schema_version`` and ``made_by`` (whatever identifies
the inputs: hashes, settings). Readers call :func:`read_manifest`, which refuses another kind or version
with one sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mamtra_ray.errors import InputError


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces ``path``, on failure it is removed.

    The file is flushed to disk before the rename, so a reader (or a process that comes after a crash)
    sees either the old content or the whole new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; a result is as readable as any other file of this user.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) atomically."""
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically. Non-finite numbers are refused (not valid JSON)."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is an :class:`InputError`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged or no JSON file: {error}") from None


def content_hash(content: Any) -> str:
    """First 16 hex digits of the SHA-256 of ``content`` as canonical JSON (keys sorted)."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    return digest.hexdigest()


def write_manifest(path: Path, kind: str, schema_version: int, made_by: Mapping[str, Any], **content: Any) -> None:
    """Write a manifest of ``kind``; ``made_by`` identifies the inputs, ``content`` is the rest."""
    write_json(path, {"kind": kind, "schema_version": schema_version, "made_by": dict(made_by), **content})


def read_manifest(path: Path, kind: str, schema_version: int) -> dict[str, Any]:
    """Read a manifest and check its kind and version.

    Raises:
        InputError: the file is missing, damaged, of another kind or of another schema version.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise InputError(f"{path} is no {kind} manifest (its kind is {found!r})")
    if manifest.get("schema_version") != schema_version:
        raise InputError(
            f"{path} has schema version {manifest.get('schema_version')!r}, this code reads version {schema_version}"
        )
    return manifest


def check_made_by(path: Path | str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse an artifact that was made from something else, naming the first difference.

    Raises:
        InputError: a key of ``expected`` differs in ``found``.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise InputError(f"{path} was made with another {key.replace('_', ' ')}: {found.get(key)!r}, not {value!r}")
