"""The state-space scan of Mamba-2 (SSD): plain recurrence, chunked scan, one step.

For every head, with dt = softplus(dt_raw + dt_bias) and A < 0 (Dao and Gu 2024, arXiv 2405.21060):

    S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T          S is [P, N]
    y_t = S_t C_t + D x_t

Argument order, signs and the softplus follow mamba-ssm's ``mamba_chunk_scan_combined``. The head counts may differ:
x, dt, B and C each have a number of heads, every one divides the largest (H, the heads of y), and a head is shared by
consecutive heads of y, as in grouped-query attention. There are as many states as the largest of the head counts of
x, dt and B. So in grouped-query form x and B have G key-value heads and C has H query heads; with H values of dt every
query head has a state of its own, with G values the query heads of a group share one.

On CUDA tensors the same functions call mamba-ssm (``ssd_cuda``) where it is installed.

Letters: B batch, L length, H heads, G groups, S states, P head dim, N state size. A letter of a head axis names what
the usual case has there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamtra_ray.models import ssd_cuda
from mamtra_ray.models.ssd_chunked import ChunkedScan, without_autocast
from mamtra_ray.models.ssd_inputs import (
    compute_dtype,
    repeat_heads,
    softplus_dt,
    state_and_output_heads,
    without_padding,
)


@without_autocast
def ssd_scan_reference(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    mask_BL: Tensor | None = None,
    chunk_size: int = 32,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence as it is written, one position after the other, in the type of x (any floating type).

    Same arguments and results as :func:`ssd_scan`, differentiable by autograd; ``chunk_size`` is not used.
    """
    del chunk_size
    states, heads = state_and_output_heads(x_BLHP, dt_BLH, B_BLGN, C_BLHN, 2)
    dtype = x_BLHP.dtype
    dt_BLS = repeat_heads(softplus_dt(dt_BLH, dt_bias_H, mask_BL, dtype), states, 2)
    A_S = repeat_heads(A_H.to(dtype), states, 0)
    x_BLSP = repeat_heads(without_padding(x_BLHP, mask_BL), states, 2)
    B_BLSN = repeat_heads(without_padding(B_BLGN, mask_BL).to(dtype), states, 2)
    C_BLHN = repeat_heads(C_BLHN.to(dtype), heads, 2)
    batch, length, _, P = x_BLSP.shape
    if initial_state_BHPN is None:
        state_BSPN = x_BLSP.new_zeros(batch, states, P, B_BLSN.shape[-1])
    else:
        state_BSPN = initial_state_BHPN.to(dtype)
    outputs = []
    for t in range(length):
        decay_BS = torch.exp(dt_BLS[:, t] * A_S)
        inflow_BSPN = (dt_BLS[:, t, :, None] * x_BLSP[:, t])[..., None] * B_BLSN[:, t, :, None]
        state_BSPN = decay_BS[..., None, None] * state_BSPN + inflow_BSPN
        y_BHP = (repeat_heads(state_BSPN, heads, 1) @ C_BLHN[:, t, :, :, None]).squeeze(-1)
        if D_H is not None:
            y_BHP = y_BHP + repeat_heads(D_H.to(dtype), heads, 0)[:, None] * repeat_heads(x_BLHP[:, t], heads, 1)
        outputs.append(y_BHP)
    y_BLHP = torch.stack(outputs, 1)
    return (y_BLHP, state_BSPN) if return_final_state else y_BLHP


def ssd_scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    mask_BL: Tensor | None = None,
    chunk_size: int = 32,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan over a whole sequence, from parts of ``chunk_size`` positions.

    Args:
        x_BLHP: values, [B, L, heads, P]; may be bfloat16 or float16 like B and C.
        dt_BLH: step sizes before bias and softplus, [B, L, heads].
        A_H: negative decay rates, one for each head of dt.
        B_BLGN: keys, [B, L, heads, N].
        C_BLHN: queries, [B, L, heads, N].
        D_H: weight of the skip from x, one for each head of y (or a divisor of that).
        dt_bias_H: added to dt before the softplus.
        initial_state_BHPN: state before the first position, [B, states, P, N]; zeros if None.
        mask_BL: 1 (True) at real positions. A padded position, on either side, leaves the state as it is and takes
            no gradient; y there is finite but means nothing.
        chunk_size: positions worked on as one matrix product; any length is allowed. Changes only speed, memory and
            rounding: the backward keeps one state for each chunk. mamba-ssm's kernels use their own.
        return_final_state: also return the state after the last position, [B, states, P, N].

    Returns:
        y [B, L, H, P] in the type of x, and with ``return_final_state`` the state in float32 (float64 for a float64 x).

    dt, A, D and the state are kept in float32 (float64 for a float64 x). Gradients reach every tensor argument.
    """
    states, heads = state_and_output_heads(x_BLHP, dt_BLH, B_BLGN, C_BLHN, 2)
    if ssd_cuda.takes(x_BLHP):
        return ssd_cuda.scan(
            x_BLHP, dt_BLH, A_H, B_BLGN, C_BLHN, D_H=D_H, dt_bias_H=dt_bias_H,
            initial_state_BHPN=initial_state_BHPN, mask_BL=mask_BL, return_final_state=return_final_state,
        )  # fmt: skip
    dtype = compute_dtype(x_BLHP)
    groups = max(x_BLHP.shape[2], B_BLGN.shape[2])
    x_BLGP = repeat_heads(without_padding(x_BLHP, mask_BL), groups, 2)
    B_BLGN = repeat_heads(without_padding(B_BLGN, mask_BL), groups, 2)
    dt_BLS = repeat_heads(softplus_dt(dt_BLH, dt_bias_H, mask_BL, dtype), states, 2)
    A_S = repeat_heads(A_H.to(dtype), states, 0)
    C_BLHN = repeat_heads(C_BLHN, heads, 2)
    per_group = (groups, states // groups)
    per_state = (*per_group, heads // states)
    y_BGELJP, final_BGEPN = ChunkedScan.apply(
        x_BLGP.transpose(1, 2),
        dt_BLS.unflatten(2, per_group).permute(0, 2, 3, 1),
        A_S.view(per_group),
        B_BLGN.transpose(1, 2),
        C_BLHN.unflatten(2, per_state).permute(0, 2, 3, 1, 4, 5),
        None if D_H is None else repeat_heads(D_H.to(dtype), heads, 0).view(per_state),
        None if initial_state_BHPN is None else initial_state_BHPN.to(dtype).unflatten(1, per_group),
        chunk_size,
        return_final_state,
    )
    y_BLHP = y_BGELJP.permute(0, 3, 1, 2, 4, 5).flatten(2, 4)
    return (y_BLHP, final_BGEPN.flatten(1, 2)) if return_final_state else y_BLHP


@without_autocast
def ssd_step(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """One position: (y [B, H, P] in the type of x, the new state [B, states, P, N] in the type of the old one).

    Head counts as in :func:`ssd_scan`. The old state is not changed, or with ``in_place`` it becomes the new one.
    """
    states, heads = state_and_output_heads(x_BHP, dt_BH, B_BGN, C_BHN, 1)
    if ssd_cuda.takes(x_BHP):
        return ssd_cuda.step(state_BHPN, x_BHP, dt_BH, A_H, B_BGN, C_BHN, D_H, dt_bias_H, in_place=in_place)
    dtype = state_BHPN.dtype
    dt_BS = repeat_heads(softplus_dt(dt_BH, dt_bias_H, None, dtype), states, 1)
    decay_BS = torch.exp(dt_BS * repeat_heads(A_H.to(dtype), states, 0))
    x_BSP = repeat_heads(x_BHP.to(dtype), states, 1)
    B_BSN = repeat_heads(B_BGN.to(dtype), states, 1)
    decay_BS11 = decay_BS[..., None, None]
    state_BSPN = state_BHPN.mul_(decay_BS11) if in_place else state_BHPN * decay_BS11
    state_BSPN = state_BSPN.addcmul_((dt_BS[..., None] * x_BSP)[..., None], B_BSN[:, :, None])
    C_BSNJ = repeat_heads(C_BHN.to(dtype), heads, 1).unflatten(1, (states, heads // states)).transpose(2, 3)
    y_BHP = (state_BSPN @ C_BSNJ).transpose(2, 3).flatten(1, 2)
    if D_H is not None:
        y_BHP = y_BHP + repeat_heads(D_H.to(dtype), heads, 0)[:, None] * repeat_heads(x_BHP.to(dtype), heads, 1)
    return y_BHP.to(x_BHP.dtype), state_BSPN
