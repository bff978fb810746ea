"""The scan, the step and the gated norm on CUDA: mamba-ssm's Triton kernels behind our signatures.

``pip install mamtra-ray[cuda]`` brings mamba-ssm. Its kernels want x and dt for every head of y, and as many heads of
B as of C, so shared heads are repeated first, as MambaInLlama does; a state shared by query heads is then computed for
each of them and read off once. (What the kernels can share is B *and* C, by heads with an x each: Mamba-2's grouping,
the other way round than ours.) They read through strides, so where one head serves all others a view with stride 0
is enough; that of several groups is no strided view, and is copied.
Without mamba-ssm CUDA tensors take the same PyTorch operations as the CPU's.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from mamtra_ray.models.ssd_inputs import repeat_heads, softplus_dt, state_and_output_heads, without_padding

# mamba-ssm's own default, right for its kernels; ssd_scan's chunk_size is tuned for a CPU cache.
CHUNK_SIZE = 256


def takes(x: Tensor) -> bool:
    """Whether this module's functions are the ones for ``x``: on CUDA, of a type the kernels know, mamba-ssm there."""
    return x.is_cuda and x.dtype != torch.float64 and _installed()


@functools.cache
def _installed() -> bool:
    if importlib.util.find_spec("mamba_ssm") is not None:
        return True
    warnings.warn(
        "mamba-ssm is not installed, so Mamba layers run on the GPU without its kernels, which is slower:"
        " pip install 'mamtra-ray[cuda]'",
        stacklevel=2,
    )
    return False


def _heads_of_kernel(t: Tensor, heads: int, dim: int) -> Tensor:
    """Shared heads for every head that reads them: a view where there is only one, else a copy."""
    if t.shape[dim] != 1:
        return repeat_heads(t, heads, dim)
    sizes = list(t.shape)
    sizes[dim] = heads
    return t.expand(sizes)


def scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    *,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    mask_BL: Tensor | None,
    return_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`mamtra_ray.models.ssd.ssd_scan`."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    states, heads = state_and_output_heads(x_BLHP, dt_BLH, B_BLGN, C_BLHN, 2)
    groups = max(B_BLGN.shape[2], C_BLHN.shape[2])
    if initial_state_BHPN is not None:
        initial_state_BHPN = repeat_heads(initial_state_BHPN, heads, 1).contiguous()
    y_BLHP, final_BHPN = mamba_chunk_scan_combined(
        _heads_of_kernel(without_padding(x_BLHP, mask_BL), heads, 2),
        repeat_heads(softplus_dt(dt_BLH, dt_bias_H, mask_BL), heads, 2),
        repeat_heads(A_H.float(), heads, 0),
        _heads_of_kernel(without_padding(B_BLGN, mask_BL), groups, 2),
        _heads_of_kernel(C_BLHN, groups, 2),
        chunk_size=CHUNK_SIZE,
        D=None if D_H is None else repeat_heads(D_H.float(), heads, 0),
        initial_states=initial_state_BHPN,
        return_final_states=True,
    )
    return (y_BLHP, final_BHPN[:, :: heads // states]) if return_final_state else y_BLHP


def step(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`mamtra_ray.models.ssd.ssd_step`."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    states, heads = state_and_output_heads(x_BHP, dt_BH, B_BGN, C_BHN, 1)
    groups = max(B_BGN.shape[1], C_BHN.shape[1])
    P, N = state_BHPN.shape[2:]
    # The kernel changes the state it is given: a copy, unless that is wanted.
    old_BSPN, state_BHPN = state_BHPN, repeat_heads(state_BHPN, heads, 1)
    if state_BHPN is old_BSPN and not in_place:
        state_BHPN = state_BHPN.clone(memory_format=torch.contiguous_format)
    dt_BH = repeat_heads(softplus_dt(dt_BH, dt_bias_H, None), heads, 1)
    # Expanded, not repeated: strides of 0 tell the kernel that A and dt are one number for a head.
    y_BHP = selective_state_update(
        state_BHPN,
        _heads_of_kernel(x_BHP, heads, 1),
        dt_BH[..., None].expand(-1, -1, P),
        repeat_heads(A_H.float(), heads, 0)[:, None, None].expand(-1, P, N),
        _heads_of_kernel(B_BGN, groups, 1),
        _heads_of_kernel(C_BHN, groups, 1),
        D=None if D_H is None else repeat_heads(D_H.float(), heads, 0)[:, None].expand(-1, P),
        # 2.3.2 asks for the strides of dt_bias also where there is none; ours is in dt already.
        dt_bias=A_H.new_zeros(heads, 1).expand(-1, P),
    )
    new_BSPN = state_BHPN[:, :: heads // states]
    if in_place and new_BSPN.data_ptr() != old_BSPN.data_ptr():
        new_BSPN = old_BSPN.copy_(new_BSPN)
    return y_BHP, new_BSPN


def gated_rms_norm(y_BLHP: Tensor, z_BLHP: Tensor, weight_HP: Tensor, eps: float) -> Tensor:
    """See :func:`mamtra_ray.models.mamba.gated_rms_norm`."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    normed_BLI = rmsnorm_fn(
        y_BLHP.flatten(2),
        weight_HP.flatten(),
        None,
        z=z_BLHP.flatten(2),
        eps=eps,
        group_size=weight_HP.shape[-1],
        norm_before_gate=False,
    )
    return normed_BLI.to(z_BLHP.dtype).view(z_BLHP.shape)
