"""What scan and step do to their arguments on every device: matching head counts, step sizes, padding.

Letters as in :mod:`mamtra_ray.models.ssd`: B batch, L length, H heads, X whatever a head holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(t: Tensor) -> torch.dtype:
    """What decays, states and norms are computed in: float32, float64 for float64 tensors."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def repeat_heads(t: Tensor, heads: int, dim: int) -> Tensor:
    """Every head repeated for the consecutive heads that share it."""
    return t if t.shape[dim] == heads else t.repeat_interleave(heads // t.shape[dim], dim)


def state_and_output_heads(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, head_dim: int) -> tuple[int, int]:
    """(states, heads of y), after checking that the head counts fit."""
    counts = {"x": x.shape[head_dim], "dt": dt.shape[head_dim], "B": B.shape[head_dim], "C": C.shape[head_dim]}
    states = max(counts["x"], counts["dt"], counts["B"])
    heads = max(states, counts["C"])
    if any(heads % n for n in counts.values()) or any(states % counts[name] for name in ("x", "dt", "B")):
        raise ValueError(f"each head count must divide the larger ones, got {counts}")
    if heads % states:
        raise ValueError(f"the {states} states cannot be shared evenly by {heads} heads ({counts})")
    return states, heads


def softplus_dt(
    dt_BLH: Tensor, dt_bias_H: Tensor | None, mask_BL: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """softplus(dt + dt_bias), zero where the mask is 0: such a position leaves the state untouched."""
    dt_BLH = dt_BLH.to(dtype)
    if mask_BL is not None:  # softplus(-inf) = 0, and its gradient is 0 whatever was there
        dt_BLH = dt_BLH.masked_fill(~mask_BL.bool()[..., None], -torch.inf)
    if dt_bias_H is not None:
        dt_BLH = dt_BLH + dt_bias_H.to(dtype)
    # threshold 40: torch's default of 20 would return its argument 2e-9 too small, visible in float64.
    return F.softplus(dt_BLH, threshold=40.0)


def without_padding(t_BLHX: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Zeros at padded positions: their values may be anything, and dt = 0 does not remove a NaN."""
    return t_BLHX if mask_BL is None else t_BLHX.masked_fill(~mask_BL.bool()[..., None, None], 0)
