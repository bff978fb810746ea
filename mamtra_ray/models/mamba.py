"""The Mamba-2 mixer in grouped-query form, which takes the place of an attention layer.

It is the layer of MambaInLlama (arXiv 2408.15237) that the MamTra paper (arXiv 2603.12342) builds on:

    z, x, B, C, dt = in_proj(hidden)                       x, B: key-value heads; z, C: query heads
    x, B, C        = silu(causal depthwise conv([x|B|C]))
    y              = SSD scan(x, dt, A, B, C) + D x        (``ssd``)
    out            = out_proj(RMSNorm(y silu(z)))          norm over each head's channels

Query, key and value of an attention head become C, B and x, so head dim and state size are equal. With hidden size 896,
14 query and 2 key-value heads of 64 (CosyVoice 2) in_proj has 896 + 128 + 128 + 896 + 14 = 2062 rows.

Letters: B batch, L length, D model width, H query heads, G key-value heads, S states, P head dim, N state size (= P),
C convolved channels, K taps of the convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamtra_ray.models import ssd_cuda
from mamtra_ray.models.linear import Conv1d, Linear
from mamtra_ray.models.ssd import ssd_scan, ssd_step
from mamtra_ray.models.ssd_inputs import compute_dtype

StateSharing = Literal["per_query_head", "per_kv_head"]


@dataclass(frozen=True)
class MixerConfig:
    """Sizes of a mixer.

    ``state_sharing``: x and B are the same for all query heads of a key-value head, and only dt and A tell their
    states apart. ``per_query_head`` gives every query head its own dt, A and state, as the paper does;
    ``per_kv_head`` one dt, A and state for each key-value head, a state num_heads / num_kv_heads times smaller.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    conv_kernel: int = 4
    state_sharing: StateSharing = "per_query_head"
    norm_eps: float = 1e-6
    chunk_size: int = 32
    out_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.state_sharing not in ("per_query_head", "per_kv_head"):
            raise ValueError(f"state_sharing {self.state_sharing!r}: expected per_query_head or per_kv_head")

    @property
    def inner_size(self) -> int:
        """Channels of z, C and y."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of x and of B."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_states(self) -> int:
        return self.num_heads if self.state_sharing == "per_query_head" else self.num_kv_heads

    @property
    def conv_channels(self) -> int:
        return 2 * self.kv_size + self.inner_size

    @property
    def in_proj_rows(self) -> int:
        return self.inner_size + self.conv_channels + self.num_states

    def in_proj_slices(self) -> dict[str, slice]:
        """Rows of in_proj.weight by name: z, x, B, C, dt."""
        sizes = {"z": self.inner_size, **_conv_sizes(self), "dt": self.num_states}
        return _slices(sizes)

    def conv_slices(self) -> dict[str, slice]:
        """Channels of conv1d by name: x, B, C."""
        return _slices(_conv_sizes(self))


def _conv_sizes(config: MixerConfig) -> dict[str, int]:
    return {"x": config.kv_size, "B": config.kv_size, "C": config.inner_size}


def _slices(sizes: dict[str, int]) -> dict[str, slice]:
    slices, start = {}, 0
    for name, size in sizes.items():
        slices[name] = slice(start, start + size)
        start += size
    return slices


@dataclass(frozen=True)
class MixerState:
    """What a mixer remembers of the past: its size does not depend on the length.

    ``conv_BCK`` holds the last K inputs of the convolution (type of the activations), ``ssm_BHPN`` the scan's states
    [B, states, P, N] (float32).
    """

    conv_BCK: Tensor
    ssm_BHPN: Tensor

    def rows(self, row_B: Tensor) -> MixerState:
        """The states of these batch rows (int64 indices), in this order."""
        return MixerState(self.conv_BCK.index_select(0, row_B), self.ssm_BHPN.index_select(0, row_B))


def initial_state(
    config: MixerConfig, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> MixerState:
    """The state before the first position. ``dtype`` is that of the activations."""
    P = config.head_dim
    return MixerState(
        torch.zeros(batch, config.conv_channels, config.conv_kernel, dtype=dtype, device=device),
        torch.zeros(batch, config.num_states, P, P, dtype=torch.float32, device=device),
    )


def state_bytes(
    config: MixerConfig, batch: int = 1, dtype: torch.dtype = torch.float32, ssm_dtype: torch.dtype = torch.float32
) -> int:
    """Bytes of the state of one layer for ``batch`` sequences of any length.

    ``dtype`` is that of the activations (convolution inputs), ``ssm_dtype`` that of the scan's states: we keep them in
    float32. With float32 for both this is the paper's figure (247,808 bytes for CosyVoice 2, per_query_head).
    """
    conv = config.conv_channels * config.conv_kernel * dtype.itemsize
    ssm = config.num_states * config.head_dim**2 * ssm_dtype.itemsize
    return batch * (conv + ssm)


def parameter_count(config: MixerConfig) -> int:
    """Numbers in a mixer: 2,657,066 for CosyVoice 2 (its attention has 1,836,160)."""
    projections = config.hidden_size * (config.in_proj_rows + config.inner_size)
    conv = config.conv_channels * (config.conv_kernel + 1)
    heads = 2 * config.num_states + config.num_heads
    return projections + conv + heads + config.inner_size + config.out_bias * config.hidden_size


def causal_conv_silu(u_BLC: Tensor, weight_C1K: Tensor, bias_C: Tensor, before_BCK: Tensor | None = None) -> Tensor:
    """silu(causal depthwise convolution), [B, L, C]. ``before_BCK``: the K inputs that came before, else zeros.

    On the CPU as K shifted products: nn.Conv1d takes 2.6 times as long there.
    """
    taps = weight_C1K.shape[-1]
    weight_CK = weight_C1K[:, 0].to(u_BLC.dtype)
    if before_BCK is None:
        padded_BLC = F.pad(u_BLC, (0, 0, taps - 1, 0))
    else:
        padded_BLC = torch.cat([before_BCK[..., 1:].transpose(1, 2).to(u_BLC.dtype), u_BLC], 1)
    if u_BLC.is_cuda:
        conv_BCL = F.conv1d(
            padded_BLC.transpose(1, 2), weight_CK[:, None], bias_C.to(u_BLC.dtype), groups=weight_CK.shape[0]
        )
        return F.silu(conv_BCL.transpose(1, 2))
    length = u_BLC.shape[1]
    out_BLC = bias_C.to(u_BLC.dtype)
    for k in range(taps):
        out_BLC = torch.addcmul(out_BLC, padded_BLC[:, k : k + length], weight_CK[:, k])
    return F.silu(out_BLC)


def gated_rms_norm(y_BLHP: Tensor, z_BLHP: Tensor, weight_HP: Tensor, eps: float) -> Tensor:
    """RMSNorm(y silu(z)) over each head's P channels, times the weight; in float32 (float64 for a float64 z), returned
    in the type of z.

    mamba-ssm's RMSNormGated with norm_before_gate=False and group_size=P.
    """
    if ssd_cuda.takes(y_BLHP):
        return ssd_cuda.gated_rms_norm(y_BLHP, z_BLHP, weight_HP, eps)
    dtype = compute_dtype(z_BLHP)
    gated_BLHP = y_BLHP.to(dtype) * F.silu(z_BLHP.to(dtype))
    scale_BLH1 = torch.rsqrt(gated_BLHP.square().mean(-1, keepdim=True) + eps)
    return (gated_BLHP * scale_BLH1 * weight_HP.to(dtype)).to(z_BLHP.dtype)


class MambaMixer(nn.Module):
    """The mixer of this module's head; parameters are named as in mamba-ssm."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config
        self.in_proj = Linear(config.hidden_size, config.in_proj_rows, bias=False)
        # Holds weight [C, 1, K] and bias under the usual names; causal_conv_silu does the work.
        self.conv1d = Conv1d(
            config.conv_channels, config.conv_channels, config.conv_kernel, groups=config.conv_channels
        )
        self.dt_bias = nn.Parameter(torch.empty(config.num_states))
        self.A_log = nn.Parameter(torch.empty(config.num_states))
        self.D = nn.Parameter(torch.empty(config.num_heads))
        self.norm = nn.RMSNorm(config.inner_size, eps=config.norm_eps)
        self.out_proj = Linear(config.inner_size, config.hidden_size, bias=config.out_bias)
        self.scan = ssd_scan
        """What :func:`~mamtra_ray.distill.compilation.compile_layers` keeps out of its graphs."""
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]  # the mark that mamba-ssm's recipes read
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh values, by Mamba-2's recipe: dt log-uniform in [1e-3, 1e-1], A uniform in [1, 16], D = 1.

        Linear layers and the convolution as PyTorch does; never zeros for z: silu(0) = 0 would go into the norm, whose
        gradient there is 1 / sqrt(eps).
        """
        for module in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            module.reset_parameters()
        if self.D.is_meta:
            return  # values are loaded, see :mod:`mamtra_ray.models.linear`
        with torch.no_grad():
            dt_S = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            self.dt_bias.copy_(dt_S + torch.log(-torch.expm1(-dt_S)))  # inverse of softplus
            self.A_log.uniform_(1, 16).log_()
            self.D.fill_(1)

    def forward(
        self,
        hidden_BLD: Tensor,
        attention_mask_BL: Tensor | None = None,
        state: MixerState | None = None,
        return_state: bool = False,
        in_place: bool = False,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """Mix a sequence, or continue one.

        Args:
            hidden_BLD: input, [B, L, D].
            attention_mask_BL: 1 at real positions, padding on either side; a longer mask (with the past) is cut to its
                last L columns. Padded positions change neither states nor other positions.
            state: from an earlier call, to go on from there. With L = 1 this is one decoding step.
            return_state: also return the state after the last real position.
            in_place: with L = 1 and ``return_state``: overwrite ``state`` and return it. Without gradients only.
        """
        config, length = self.config, hidden_BLD.shape[1]
        mask_BL = None if attention_mask_BL is None else attention_mask_BL[:, -length:].bool()
        if mask_BL is not None:
            hidden_BLD = hidden_BLD.masked_fill(~mask_BL[..., None], 0)
        z_BLI, u_BLC, dt_BLS = self.in_proj(hidden_BLD).split(
            [config.inner_size, config.conv_channels, config.num_states], -1
        )
        before_BCK = None if state is None else state.conv_BCK
        assert self.conv1d.bias is not None
        conv_BLC = causal_conv_silu(u_BLC, self.conv1d.weight, self.conv1d.bias, before_BCK)
        x_BLGP, B_BLGN, C_BLHN = (
            conv_BLC[..., part].unflatten(-1, (-1, config.head_dim)) for part in config.conv_slices().values()
        )
        A_S = -torch.exp(self.A_log.to(compute_dtype(self.A_log)))
        if length == 1 and state is not None:
            if mask_BL is not None:
                dt_BLS = dt_BLS.masked_fill(~mask_BL[..., None], -torch.inf)
            y_BHP, ssm_BHPN = ssd_step(
                state.ssm_BHPN, x_BLGP[:, 0], dt_BLS[:, 0], A_S, B_BLGN[:, 0], C_BLHN[:, 0], self.D, self.dt_bias,
                in_place=in_place,
            )  # fmt: skip
            y_BLHP = y_BHP[:, None]
        else:
            y_BLHP, ssm_BHPN = self.scan(
                x_BLGP, dt_BLS, A_S, B_BLGN, C_BLHN, D_H=self.D, dt_bias_H=self.dt_bias,
                initial_state_BHPN=None if state is None else state.ssm_BHPN,
                mask_BL=mask_BL, chunk_size=config.chunk_size, return_final_state=True,
            )  # fmt: skip
        heads = (config.num_heads, config.head_dim)
        normed_BLHP = gated_rms_norm(y_BLHP, z_BLI.unflatten(-1, heads), self.norm.weight.view(heads), config.norm_eps)
        out_BLD = self.out_proj(normed_BLHP.flatten(2))
        if not return_state:
            return out_BLD
        conv_BCK = _last_inputs(u_BLC, before_BCK, mask_BL, config.conv_kernel)
        if in_place and state is not None:
            state.conv_BCK.copy_(conv_BCK)
            return out_BLD, state
        return out_BLD, MixerState(conv_BCK, ssm_BHPN)


def _last_inputs(u_BLC: Tensor, before_BCK: Tensor | None, mask_BL: Tensor | None, taps: int) -> Tensor:
    """The last K inputs up to each row's last real position, [B, C, K]."""
    batch, length, channels = u_BLC.shape
    if before_BCK is None:
        before_BCK = u_BLC.new_zeros(batch, channels, taps)
    if mask_BL is None:
        recent_BCL = u_BLC[:, -taps:].transpose(1, 2)
        return torch.cat([before_BCK[..., recent_BCL.shape[-1] :].to(u_BLC.dtype), recent_BCL], -1)
    all_BLC = torch.cat([before_BCK.transpose(1, 2).to(u_BLC.dtype), u_BLC], 1)
    position_L = torch.arange(1, length + 1, device=u_BLC.device)
    end_B = (mask_BL * position_L).amax(1)  # real positions, counted from the row's start
    index_BK = end_B[:, None] + torch.arange(taps, device=u_BLC.device)
    return all_BLC.gather(1, index_BK[..., None].expand(-1, -1, channels)).transpose(1, 2)
