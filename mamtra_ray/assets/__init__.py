"""Data shipped with the package, and the check that it is whole."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from mamtra_ray.artifacts import file_hash, read_json, read_manifest
from mamtra_ray.errors import InputError

PACKAGED = ("demo", "demo24")
"""Kinds of teachers that are in the package, each with a corpus; they share codec, voice and vocabulary."""
DEMO = Path(__file__).parent / "demo"
MANIFEST = "manifest.json"
CORPUS = "corpus.parquet"
SCHEMA_VERSION = 1


def packaged_folder(kind: str) -> Path:
    """The assets of a packaged teacher."""
    return DEMO.with_name(kind)


@cache
def demo_asset(name: str, folder: Path = DEMO) -> Path:
    """Path of a demo asset after checking its files against the manifest.

    Args:
        name: a file, or a folder of which every file is checked: `corpus.parquet`, `codec/codec.safetensors`,
            `teacher`.
        folder: the assets of a packaged teacher.

    Raises:
        InputError: the asset is missing, damaged, or not in the manifest.
    """
    files = read_manifest(folder / MANIFEST, "demo_assets", SCHEMA_VERSION, by_hand=True)["files"]
    wanted = {path: entry for path, entry in files.items() if path == name or path.startswith(f"{name}/")}
    if not wanted:
        raise InputError(f"{folder / MANIFEST} lists no demo asset {name!r}")
    for path, entry in wanted.items():
        if not (folder / path).is_file():
            raise InputError(f"the demo asset {folder / path} is missing: reinstall mamtra-ray or rebuild the assets")
        if file_hash(folder / path) != entry["sha256"]:
            raise InputError(f"the demo asset {folder / path} is damaged: reinstall mamtra-ray or rebuild the assets")
    return folder / name


def demo_measured() -> dict[str, Any]:
    """What was measured of the demo's voice, codec and teacher (`measured.json`)."""
    measured: dict[str, Any] = read_json(demo_asset("measured.json"))
    return measured
