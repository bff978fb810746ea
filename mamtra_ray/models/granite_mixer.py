"""A compact mixer's parameters in the expanded form, with one group of x, B and C for every query head, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from mamtra_ray.models.mamba import MixerConfig


def _row_blocks(config: MixerConfig, parameter: str) -> list[tuple[int, int, int]]:
    """How a parameter's rows expand: (groups, rows of a group, times each group is repeated), in row order."""
    groups, heads, width = config.num_kv_heads, config.num_heads, config.head_dim
    shared = (groups, width, heads // groups)
    own = (heads, width, 1)
    per_state = (config.num_states, 1, heads // config.num_states)
    if parameter == "in_proj.weight":
        return [own, shared, shared, own, per_state]
    if parameter.startswith("conv1d."):
        return [shared, shared, own]
    return [per_state] if parameter in ("dt_bias", "A_log") else []


def expanded_parameter(config: MixerConfig, parameter: str, tensor: Tensor) -> Tensor:
    """One compact parameter -> the expanded Granite mixer's (unchanged if it has no shared rows)."""
    blocks = _row_blocks(config, parameter)
    parts = tensor.split([groups * rows for groups, rows, _ in blocks]) if blocks else [tensor]
    expanded = [
        part.unflatten(0, (groups, rows)).repeat_interleave(repeats, 0).flatten(0, 1)
        for part, (groups, rows, repeats) in zip(parts, blocks, strict=False)
    ]
    return torch.cat(expanded) if blocks else tensor


def compact_parameter(config: MixerConfig, parameter: str, tensor: Tensor) -> Tensor:
    """Inverse of :func:`expanded_parameter`: the first of each group's repeated copies."""
    blocks = _row_blocks(config, parameter)
    if not blocks:
        return tensor
    parts = tensor.split([groups * rows * repeats for groups, rows, repeats in blocks])
    return torch.cat(
        [
            part.unflatten(0, (groups, repeats, rows))[:, 0].flatten(0, 1)
            for part, (groups, rows, repeats) in zip(parts, blocks, strict=True)
        ]
    )
