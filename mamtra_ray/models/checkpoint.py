"""Model folders: ``config.json`` and ``model.safetensors``, checked against each other on reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mamtra_ray.artifacts import file_hash, read_json, read_manifest, write_manifest, written_atomically
from mamtra_ray.errors import InputError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file atomically; dtypes stay as they are, devices do not matter."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_atomically(path) as temporary:
        save_file(on_cpu, temporary, metadata={"format": "pt"})


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read one safetensors file; a missing, truncated or foreign one is an :class:`InputError`."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is truncated, damaged or no safetensors file: {error}") from None


def read_sharded_tensors(folder: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a Hugging Face model folder: one safetensors file, or shards with their index."""
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return read_tensors(folder / WEIGHTS_FILE, device)
    if not (folder / INDEX_FILE).is_file():
        raise InputError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    index = read_json(folder / INDEX_FILE)
    shard_by_name = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_by_name, dict) or any(Path(shard).name != shard for shard in shard_by_name.values()):
        raise InputError(f"{folder / INDEX_FILE} has no weight_map from tensor names to files of its folder")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shard_by_name.values())):
        tensors |= read_tensors(folder / shard, device)
    if lost := sorted(set(shard_by_name) - set(tensors)):
        raise InputError(f"{folder}: no shard holds {lost[0]}, which {INDEX_FILE} lists")
    return tensors


def write_model(folder: Path, kind: str, schema_version: int, tensors: Mapping[str, Tensor], **content: Any) -> None:
    """Write weights, then the config that names their hash: a folder cut short between the two is refused later."""
    folder = Path(folder)
    write_tensors(folder / WEIGHTS_FILE, tensors)
    made_by = {"weights_sha256": file_hash(folder / WEIGHTS_FILE)}
    write_manifest(folder / CONFIG_FILE, kind, schema_version, made_by, **content)


def read_model(
    folder: Path, kind: str, schema_version: int, device: torch.device | str = "cpu"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_model` wrote.

    Raises:
        InputError: no such folder, another kind or version, or weights that are not those the config was
            written with (truncated, swapped, half overwritten).
    """
    folder = Path(folder)
    content = read_manifest(folder / CONFIG_FILE, kind, schema_version)
    tensors = read_tensors(folder / WEIGHTS_FILE, device)
    if file_hash(folder / WEIGHTS_FILE) != content["made_by"].get("weights_sha256"):
        raise InputError(f"{folder / WEIGHTS_FILE} is not the file {CONFIG_FILE} was written with (its hash differs)")
    return content, tensors


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Assign ``tensors`` as the model's parameters; anything missing, left over or misshapen is refused by name."""
    check_tensors(model, tensors, source)
    model.load_state_dict(tensors, assign=True)


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path, prefix: str = "") -> None:
    """Whether ``tensors`` are the model's, all of them and no others; ``prefix`` stands before names in errors.

    Raises:
        InputError: one is missing, misshapen or left over.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{source} has no tensor {prefix}{name}")
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{source}: {prefix}{name} has shape {tuple(tensors[name].shape)}, expected {shape}")
    if left_over := sorted(set(tensors) - set(expected)):
        raise InputError(f"{source} has a tensor that the model has no place for: {prefix}{left_over[0]}")


def read_transformers_config(folder: Path) -> Any:
    """The transformers configuration of a model folder (``config.json``).

    Raises:
        InputError: missing, damaged, or of a model type transformers does not know.
    """
    from transformers import CONFIG_MAPPING

    path = Path(folder) / CONFIG_FILE
    content = read_json(path)
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(f"{path} is no transformers config (model_type {model_type!r})")
    try:
        return CONFIG_MAPPING[model_type].from_dict(content)
    except Exception as error:  # transformers' validation raises types of its own
        reason = json.dumps(str(error))[1:200]
        raise InputError(f"{path} is no valid {model_type} config: {reason}") from None
