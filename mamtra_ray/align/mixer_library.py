"""The mixer library: one aligned Mamba mixer per layer, tied to the teacher and the corpus that made it. ::

mixers.safetensors   layers.{i}.{parameter of MambaMixer}, float32
manifest.json        what made it, every layer's error before and after, the hash of the other file
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamtra_ray.artifacts import check_made_by, file_hash, read_manifest, write_manifest, written_atomically
from mamtra_ray.errors import InputError
from mamtra_ray.runtime.progress import table

KIND, SCHEMA_VERSION = "mixer library", 1
WEIGHTS, MANIFEST = "mixers.safetensors", "manifest.json"


@dataclass(frozen=True)
class LibraryManifest:
    """What a mixer library says of itself; errors are per layer, normalized (1 = as good as writing nothing)."""

    errors_transferred: dict[int, float]
    """Held-out error of the mixers with the attention's weights."""
    errors_start: dict[int, float]
    """The same after the least-squares fit of the output projections, before the first step."""
    errors: dict[int, float]
    """After training."""
    tokens: int
    steps: int
    seconds: float
    """Of training, over all sessions; without loading and validation."""
    workers: int


def save_library(
    folder: Path, library: dict[int, dict[str, Tensor]], made_by: dict[str, str], manifest: LibraryManifest
) -> None:
    """Write a library; the manifest last, so a folder with a manifest is complete."""
    tensors = {f"layers.{layer}.{name}": tensor for layer, part in library.items() for name, tensor in part.items()}
    with written_atomically(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    content = dataclasses.asdict(manifest)
    write_manifest(folder / MANIFEST, KIND, SCHEMA_VERSION, made_by, sha256=file_hash(folder / WEIGHTS), **content)


def read_library_manifest(folder: Path, made_by: dict[str, str] | None = None) -> LibraryManifest:
    """Read the manifest of a library, and check what made it.

    Raises:
        InputError: no library, or one of another teacher, corpus or other settings.
    """
    path = folder / MANIFEST
    content = read_manifest(path, KIND, SCHEMA_VERSION)
    check_made_by(path, content["made_by"], made_by or {})
    try:
        fields: dict[str, Any] = {field.name: content[field.name] for field in dataclasses.fields(LibraryManifest)}
        for name in ("errors_transferred", "errors_start", "errors"):
            fields[name] = {int(layer): float(error) for layer, error in fields[name].items()}
        return LibraryManifest(**fields)
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no manifest of a mixer library: {error}") from None


def load_library(folder: Path, *, teacher_fingerprint: str) -> dict[int, dict[str, Tensor]]:
    """Tensors of every layer's mixer, checked: layer -> parameter name -> tensor (float32, on the CPU).

    Raises:
        InputError: no library, one of another teacher, or a damaged one.
    """
    read_library_manifest(folder, {"teacher": teacher_fingerprint})
    path = folder / WEIGHTS
    if file_hash(path) != read_manifest(folder / MANIFEST, KIND, SCHEMA_VERSION).get("sha256"):
        raise InputError(f"{path} is not the file that {folder / MANIFEST} describes: it was changed or cut off")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    library: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        _, layer, parameter = name.split(".", 2)
        library.setdefault(int(layer), {})[parameter] = tensor
    return dict(sorted(library.items()))


def error_table(manifest: LibraryManifest) -> str:
    """Every layer's error: with transferred weights, after least squares, after training."""
    rows = [
        [
            layer,
            f"{manifest.errors_transferred[layer]:.3f}",
            f"{manifest.errors_start[layer]:.3f}",
            f"{manifest.errors[layer]:.3f}",
        ]
        for layer in sorted(manifest.errors)
    ]
    return table(["layer", "transferred", "least squares", "aligned"], rows)
