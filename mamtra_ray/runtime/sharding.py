"""Tensors of which every process of a training holds a part (``DTensor``): put together, and cut."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(fully_shard: bool, world_size: int) -> bool:
    """Whether the processes of a training share its weights: one alone has nobody to share with."""
    return fully_shard and world_size > 1


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, put together on every process's device where it is cut; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, whole_tensor: Tensor) -> Tensor:
    """Of ``whole_tensor``, the same in all processes: what a process holds if ``tensor`` is its part."""
    if not isinstance(tensor, DTensor):
        return whole_tensor.to(tensor.device)
    return distribute_tensor(whole_tensor, tensor.device_mesh, tensor.placements, src_data_rank=None)
