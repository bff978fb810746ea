"""Files that others read: written atomically, carrying a version and a hash of what made them.

A *manifest* is a JSON object with ``kind``, ``schema_version``, ``made_by`` (whatever identifies the inputs: hashes,
settings) and ``checksum`` (of all the rest). Readers call :func:`read_manifest`, which refuses another kind or version
and a damaged file with one sentence.

What a verb writes into a folder of the user's is noted with its hash (:func:`write_output`), so that it overwrites its
own files only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mamtra_ray.errors import DiskFullError, InputError

# A file system with less than this left is full. Some writers, such as torch.save, do not say that this was the reason.
_FULL_BYTES = 1 << 16


@contextlib.contextmanager
def disk_full_is_said(path: Path | str, action: str = "write") -> Iterator[None]:
    """An error inside the block that a full disk or a quota has caused becomes one sentence.

    Args:
        path: the file that is written.
        action: what is done with it.

    Raises:
        DiskFullError: there is no space left. Other errors pass through.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, InputError) and is_disk_full(error, Path(path).parent):
            raise DiskFullError(
                f"no space left to {action} {path}: what was finished before is intact; free some space and run the "
                "same command again"
            ) from None
        raise


def is_disk_full(error: BaseException, folder: Path | None = None) -> bool:
    """Whether ``error`` says that there is no space left, or ``folder`` does, for errors that give no reason."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    if os.strerror(errno.ENOSPC) in str(error):
        return True
    if folder is None or isinstance(error, OSError):
        return False
    try:
        space = os.statvfs(folder)
    except OSError:
        return False
    return space.f_bavail * space.f_frsize < _FULL_BYTES


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces ``path``, on failure it is removed.

    The file is flushed to disk before the rename, so a reader (or a process that comes after a crash)
    sees either the old content or the whole new one.

    Raises:
        DiskFullError: there is no space left; ``path`` is as it was.
    """
    path = Path(path)
    with disk_full_is_said(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        # Judged while the temporary file still takes its space.
        with disk_full_is_said(path):
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


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` (JSON-ready) and, as ``checksum``, the hash of what a reader will find in it."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return {**rest, "checksum": content_hash(json.loads(json.dumps(rest)))}


def check_checksum(content: Mapping[str, Any], where: Path | str) -> None:
    """Refuse content that is not what :func:`with_checksum` made.

    Args:
        content: as read; ``where`` is named in the error.

    Raises:
        InputError: its checksum is missing or another one.
    """
    rest = {name: value for name, value in content.items() if name != "checksum"}
    if "checksum" not in content:
        raise InputError(f"{where} has no checksum: it is damaged, or an earlier version of mamtra_ray wrote it")
    if content["checksum"] != content_hash(rest):
        raise InputError(f"{where} is damaged: its content has not the checksum that it was written with")


def write_checked_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object with its checksum, atomically; for :func:`read_manifest` it needs ``kind`` and
    ``schema_version``."""
    write_json(path, with_checksum(content))


def write_manifest(path: Path, kind: str, schema_version: int, made_by: Mapping[str, Any], **content: Any) -> None:
    """Write a manifest of ``kind``; ``made_by`` identifies the inputs, ``content`` is the rest."""
    write_checked_json(path, {"kind": kind, "schema_version": schema_version, "made_by": dict(made_by), **content})


def read_manifest(path: Path, kind: str, schema_version: int, *, by_hand: bool = False) -> dict[str, Any]:
    """Read a manifest and check its kind, version and checksum.

    Args:
        path: of the file.
        kind, schema_version: what it must be.
        by_hand: people write such files too, so that one without a checksum is taken.

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
    if not by_hand or "checksum" in manifest:
        check_checksum(manifest, path)
    return manifest


def read_manifest_of(path: Path, kind: str, schema_version: int, made_by: Mapping[str, Any]) -> dict[str, Any] | None:
    """:func:`read_manifest` of what was made from ``made_by``; None where nothing is, or something made from else.

    Raises:
        InputError: as :func:`read_manifest`, if there is a file.
    """
    if not path.exists():
        return None
    manifest = read_manifest(path, kind, schema_version)
    return manifest if manifest["made_by"] == dict(made_by) else None


def checked_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines, each with its checksum."""
    return "".join(json.dumps(with_checksum(row), ensure_ascii=False) + "\n" for row in rows)


def row_of_line(line: str | bytes, where: str) -> dict[str, Any]:
    """A row of :func:`checked_lines`, without its checksum; ``where`` is named in errors.

    Raises:
        InputError: the line is damaged.
    """
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise InputError(f"{where} is damaged: {error}") from None
    check_checksum(row, where)
    row.pop("checksum")
    return row


OUTPUTS = "written_by_mamtra_ray.json"
"""Beside what a verb writes into a folder that it may share with the user: which files are its own."""


def write_output(folder: Path, name: str, write: Callable[[Path], object]) -> Path:
    """Write ``folder / name`` atomically and note its hash in :data:`OUTPUTS`; returns its path.

    Args:
        folder: of the user's choice.
        name: relative to ``folder``.
        write: is called with the temporary path to write to.

    Raises:
        InputError: as :func:`check_outputs`.
    """
    check_outputs(folder, [name])
    path = _inside(folder, name)
    with written_atomically(path) as temporary:
        write(temporary)
        # Before the file takes its place. Its old hash stays until the next time, for a process that stops in between.
        digests = {file_hash(temporary)} | ({file_hash(path)} if path.is_file() else set())
        files = _noted(folder) | {name: sorted(digests)}
        write_checked_json(folder / OUTPUTS, {"kind": "outputs", "schema_version": 1, "files": files})
    return path


def check_outputs(folder: Path, names: Iterable[str]) -> None:
    """Refuse to overwrite what :func:`write_output` did not write, or what was changed since.

    Raises:
        InputError: names the first such file of ``names``.
    """
    noted = _noted(folder)
    for name in names:
        path = _inside(folder, name)
        is_there = path.is_symlink() or path.exists()
        if is_there and not (path.is_file() and file_hash(path) in noted.get(name, ())):
            raise InputError(
                f"{path} would be overwritten, but mamtra_ray did not write it, or it was changed since: move it "
                "away, or give another --output"
            )


def _inside(folder: Path, name: str) -> Path:
    """Also where ``name`` begins with ``..`` and the folder is not there yet."""
    return Path(os.path.normpath(folder / name))


def _noted(folder: Path) -> dict[str, list[str]]:
    path = folder / OUTPUTS
    return dict(read_manifest(path, "outputs", 1)["files"]) if path.exists() else {}


def check_made_by(path: Path | str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse an artifact that was made from something else, naming the first difference.

    Raises:
        InputError: a key of ``expected`` differs in ``found``.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise InputError(f"{path} was made with another {key.replace('_', ' ')}: {found.get(key)!r}, not {value!r}")
