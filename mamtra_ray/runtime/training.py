"""What every training here shares: learning-rate schedule, position, autocast, a saved state with its identity.

Knows PyTorch but not Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mamtra_ray.artifacts import (
    check_made_by,
    file_hash,
    read_manifest,
    read_manifest_of,
    write_manifest,
    written_atomically,
)
from mamtra_ray.errors import InputError

STATE_MANIFEST = "training.json"
_KIND, _SCHEMA_VERSION = "training state", 3


@dataclass(frozen=True)
class Position:
    """How far a training is; enough to go on with the very next batch."""

    tokens: int = 0
    """Training tokens seen, over all workers."""
    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Passes over the corpus that are complete."""
    batch: int = 0
    """Batches of the current epoch that are done, per worker."""

    def after(self, tokens: int) -> Position:
        """One step of ``tokens`` later."""
        return Position(self.tokens + tokens, self.step + 1, self.epoch, self.batch + 1)

    def next_epoch(self) -> Position:
        """When the batches of an epoch are used up."""
        return Position(self.tokens, self.step, self.epoch + 1, 0)


def learning_rate_factor(done: float, step: float, warmup: float, schedule: str, final: float = 0.1) -> float:
    """Factor of the peak learning rate: linear warm-up, then ``constant``, or ``cosine`` down to ``final``.

    Args:
        done: part of the training that is done before the step.
        step: part that one step does. The warm-up is read in the middle of it, so that the first rate is not 0.
        warmup: part of the training over which the rate rises.
        schedule: ``constant`` or ``cosine``.
        final: factor at the end of ``cosine``.
    """
    done = min(done, 1.0)
    if done < warmup:
        return min((done + step / 2) / warmup, 1.0)
    if schedule == "constant":
        return 1.0
    progress = (done - warmup) / (1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def autocast(device: torch.device, precision: str) -> Any:
    """The context in which a forward pass runs: ``precision`` is float32 or bfloat16."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def sum_over_workers(tokens: int, world_size: int, device: torch.device) -> int:
    """Tokens of this step over all processes."""
    if world_size == 1:
        return tokens
    total = torch.tensor(tokens, device=device)
    torch.distributed.all_reduce(total)
    return int(total)


def save_state(
    folder: Path, state: Mapping[str, Any], position: Position, made_by: Mapping[str, Any], **content: Any
) -> None:
    """Write tensors (``training-<step>.pt``) and then what they are (``training.json``), each atomically.

    The manifest names the file of its tensors, so a kill between the two leaves the state before this one.

    Args:
        folder: is made if need be.
        state: nested dictionaries of tensors and plain values, as ``torch.save`` takes them.
        position: how far the training is.
        made_by: what the training depends on; :func:`read_state` of another training is refused.
        content: further JSON-ready values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"training-{position.step}.pt"
    with written_atomically(folder / name) as path:
        torch.save(dict(state), path)
    write_manifest(
        folder / STATE_MANIFEST,
        _KIND,
        _SCHEMA_VERSION,
        made_by,
        position=asdict(position),
        file=name,
        sha256=file_hash(folder / name),
        **content,
    )
    for path in _state_files(folder):
        if path.name != name:
            path.unlink()


def has_state(folder: Path) -> bool:
    """Whether there is a saved state to go on from."""
    return (folder / STATE_MANIFEST).exists()


def is_state_of(folder: Path, made_by: Mapping[str, Any]) -> bool:
    """Whether there is one of this very training."""
    return read_manifest_of(folder / STATE_MANIFEST, _KIND, _SCHEMA_VERSION, made_by) is not None


def remove_state(folder: Path) -> None:
    """Remove it: the training has ended."""
    for path in (folder / STATE_MANIFEST, *_state_files(folder)):
        path.unlink(missing_ok=True)


def _state_files(folder: Path) -> list[Path]:
    return list(folder.glob("training*.pt"))


def read_state(
    folder: Path, made_by: Mapping[str, Any], device: torch.device | str = "cpu"
) -> tuple[dict[str, Any], Position, dict[str, Any]]:
    """What :func:`save_state` wrote: tensors, position, and the manifest.

    Raises:
        InputError: a state of another training (the first difference is named), or a damaged one.
    """
    manifest = read_manifest(folder / STATE_MANIFEST, _KIND, _SCHEMA_VERSION)
    check_made_by(folder / STATE_MANIFEST, manifest["made_by"], made_by)
    file = folder / manifest["file"]
    if file_hash(file) != manifest["sha256"]:
        raise InputError(f"{file} is damaged, or not the file that {STATE_MANIFEST} describes")
    state = torch.load(file, weights_only=True, map_location=device)
    try:
        return state, Position(**manifest["position"]), manifest
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / STATE_MANIFEST} is no training state: {error}") from None
