"""Weights and optimizer state of a sharded training on disk, by ``torch.distributed.checkpoint``.

Every process writes its part. Any number of processes can read it, and so can one that holds everything. Only what is
trained is written. A file's hash stands in the training's manifest.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mamtra_ray.artifacts import disk_full_is_said, file_hash
from mamtra_ray.errors import InputError
from mamtra_ray.runtime.sharding import part_like

_FOLDER = "shards-{step}"
_MOMENTS = ("exp_avg", "exp_avg_sq")

Trained = Mapping[str, Tensor]
"""The trained parameters by name: those of the optimizer."""


def write_shards(folder: Path, step: int, trained: Trained, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Write this process's part; all processes must call, with one folder for all or a folder for each.

    Returns:
        SHA-256 of every process's files, by path within ``folder``. They make up the state only together.

    Raises:
        DiskFullError: no space left for some process; in all of them.
    """
    shards = folder / _FOLDER.format(step=step)
    with disk_full_is_said(shards):
        try:
            dcp.save(_state(trained, optimizer), storage_writer=dcp.FileSystemWriter(shards))
        except dcp.CheckpointException as failure:
            # No Exception, but what it holds of every process that failed is.
            for error, _ in failure.failures.values():
                raise error from None
            raise
    rank = torch.distributed.get_rank()
    own = [*shards.glob(f"__{rank}_*"), *(shards.glob(".metadata") if rank == 0 else [])]
    hashes: list[dict[str, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    mine = {str(path.relative_to(folder)): file_hash(path) for path in own}
    torch.distributed.all_gather_object(hashes, mine)
    return {name: digest for part in hashes for name, digest in part.items()}


def remove_other_shards(folder: Path, step: int) -> None:
    """Remove those of other steps, once a manifest names this step's; all processes must call."""
    torch.distributed.barrier()
    for path in folder.glob(_FOLDER.format(step="*")):
        if path.name != _FOLDER.format(step=step):
            shutil.rmtree(path, ignore_errors=True)


def remove_shards(folder: Path) -> None:
    """Remove all of them: the training has ended."""
    for path in folder.glob(_FOLDER.format(step="*")):
        shutil.rmtree(path, ignore_errors=True)


def read_shards(
    folder: Path,
    step: int,
    files: Mapping[str, str],
    trained: Trained,
    optimizer: torch.optim.Optimizer,
    is_sharded: bool,
) -> None:
    """Fill parameters and optimizer with what any number of processes has written.

    Args:
        folder: with all the files.
        step: at which they were written.
        files: of :func:`write_shards`, as the manifest says.
        trained, optimizer: as made anew.
        is_sharded: whether the parameters are cut; then all processes must call, and each checks a part of the files.

    Raises:
        InputError: a file is missing or damaged; in all processes.
    """
    _check(folder, files, is_sharded)
    if step:
        _prepare(optimizer)
    state = _state(trained, optimizer)
    reader = dcp.FileSystemReader(folder / _FOLDER.format(step=step))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what no_dist asks for
            dcp.load(state, storage_reader=reader, no_dist=not is_sharded)
    except dcp.CheckpointException as failure:
        reasons = [error for error, _ in failure.failures.values()]
        raise InputError(f"{folder} holds no state of this training: {reasons[0]}") from None


def read_whole(
    weights: Mapping[str, Tensor],
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Fill sharded tensors and their optimizer with what a process that held all of them has written.

    Args:
        weights: by name, on the CPU.
        saved: the optimizer's ``state_dict()``, on the CPU.
        tensors, optimizer: as made anew.
    """
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(part_like(tensor, weights[name]))
        for index, parameter in enumerate(_parameters(optimizer)):
            if index in saved["state"]:
                of_one = saved["state"][index]
                moments = {name: part_like(parameter, of_one[name]) for name in _MOMENTS}
                optimizer.state[parameter] = {"step": of_one["step"].to(parameter.device), **moments}


def _state(trained: Trained, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    # Before the first step there are none; later there are some of every parameter.
    has_moments = any(optimizer.state.values())
    moments = {name: optimizer.state[parameter] for name, parameter in trained.items()} if has_moments else {}
    if any(not of_one for of_one in moments.values()):
        raise ValueError("a trained parameter has no optimizer state")
    return {"weights": {name: parameter.detach() for name, parameter in trained.items()}, "optimizer": moments}


def _prepare(optimizer: torch.optim.Optimizer) -> None:
    """What AdamW makes in its first step, for a checkpoint to fill."""
    for parameter in _parameters(optimizer):
        moments = {name: torch.zeros_like(parameter) for name in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _check(folder: Path, files: Mapping[str, str], is_sharded: bool) -> None:
    distributed = torch.distributed
    rank, count = (distributed.get_rank(), distributed.get_world_size()) if is_sharded else (0, 1)
    found: list[str | None] = [None] * count
    for name in sorted(files)[rank::count]:
        try:
            if file_hash(folder / name) != files[name]:
                found[rank] = f"{folder / name} is damaged, or not the file that its training's manifest describes"
        except InputError as error:
            found[rank] = str(error)
    if is_sharded:
        distributed.all_gather_object(found, found[rank])
    for reason in found:
        if reason is not None:
            raise InputError(reason)
