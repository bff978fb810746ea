"""Zonos-v0.1-hybrid, the published hybrid that MamTra is compared with: a baseline, not a teacher.

46 layers of which every fourth, beginning with the first, is attention with an MLP and the others are Mamba-2
without one; nine DAC codebooks, summed at the input and scored by nine heads. Names and shapes are those of the
released ``model.safetensors`` (upstream ``zonos/model.py``, ``zonos/backbone``, ``zonos/conditioning.py``). The
prefix conditioner's parameters are there to be loaded and counted; turning text into phonemes (eSpeak) and sampling
the delayed codebooks is upstream's part.

Tensor letters: B batch, L length, D model width, H heads, P head width, K codebooks, V codes of a codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamtra_ray.artifacts import read_json
from mamtra_ray.errors import InputError
from mamtra_ray.models.attention import attend
from mamtra_ray.models.checkpoint import CONFIG_FILE, load_into, read_sharded_tensors
from mamtra_ray.models.mamba import causal_conv_silu, gated_rms_norm
from mamtra_ray.models.rope import Rope, rotate
from mamtra_ray.models.ssd import ssd_scan

NUM_CODEBOOKS = 9
EMBEDDING_ROWS, HEAD_ROWS = 1026, 1025
"""1,024 codes, the end (1024), and for inputs the mask (1025). In memory upstream pads both to a multiple of 8."""
PHONEME_ROWS = 189
ROTARY_BASE = 10_000.0

_FOURIER = {
    "emotion": 8,
    "fmax": 1,
    "pitch_std": 1,
    "speaking_rate": 1,
    "vqscore_8": 8,
    "ctc_loss": 1,
    "dnsmos_ovrl": 1,
}
_INTEGERS = {"language_id": 128, "speaker_noised": 2}
CONDITIONERS = (
    "espeak", "speaker", "emotion", "fmax", "pitch_std", "speaking_rate", "language_id", "vqscore_8", "ctc_loss",
    "dnsmos_ovrl", "speaker_noised",
)  # fmt: skip
"""Order of the prefix conditioner's parts; all but the first can be left out (a learned vector takes their place)."""


@dataclass(frozen=True)
class ZonosConfig:
    """Shape of the backbone; the defaults are the released hybrid's."""

    hidden_size: int = 2048
    num_layers: int = 46
    attention_layers: tuple[int, ...] = tuple(range(0, 46, 4))
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 128
    intermediate_size: int = 8192
    state_size: int = 128
    mamba_head_dim: int = 64
    speaker_size: int = 128
    norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ZonosConfig:
        """Read upstream's ``config.json``.

        Raises:
            InputError: a key is missing, or it is no hybrid of this kind (Zonos' transformer has no Mamba layers).
        """
        try:
            backbone = content["backbone"]
            attention = backbone["attn_cfg"]
            if not backbone.get("ssm_cfg"):
                raise InputError("this Zonos config has no Mamba layers: it is the transformer, not the hybrid")
            if attention.get("rotary_emb_interleaved") or backbone.get("rms_norm"):
                raise InputError("this Zonos config uses interleaved rotary embeddings or RMSNorm, the hybrid neither")
            return cls(
                hidden_size=backbone["d_model"],
                num_layers=backbone["n_layer"],
                attention_layers=tuple(backbone["attn_layer_idx"]),
                num_heads=attention["num_heads"],
                num_kv_heads=attention["num_heads_kv"],
                head_dim=attention["rotary_emb_dim"],
                intermediate_size=backbone["attn_mlp_d_intermediate"],
                state_size=backbone["ssm_cfg"].get("d_state", 128),
                mamba_head_dim=backbone["ssm_cfg"].get("headdim", 64),
                norm_eps=backbone.get("norm_epsilon", 1e-5),
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"this is no Zonos config: {error} is missing") from None


class ZonosHybrid(nn.Module):
    """Codebook tables and heads around the hybrid backbone. Build under ``torch.device("meta")`` to count only."""

    def __init__(self, config: ZonosConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embeddings = nn.ModuleList(nn.Embedding(EMBEDDING_ROWS, width) for _ in range(NUM_CODEBOOKS))
        self.backbone = _Backbone(config)
        self.heads = nn.ModuleList(nn.Linear(width, HEAD_ROWS, bias=False) for _ in range(NUM_CODEBOOKS))
        self.prefix_conditioner = _PrefixConditioner(config)

    def embed_codes(self, codes_BKL: Tensor) -> Tensor:
        """Sum of the codebooks' embeddings (B, L, D)."""
        tables = enumerate(self.embeddings)
        return torch.stack([table(codes_BKL[:, book]) for book, table in tables]).sum(0)

    def forward(self, prefix_BLD: Tensor, codes_BKL: Tensor) -> Tensor:
        """Scores (B, K, L, V) of every codebook after each code position.

        Args:
            prefix_BLD: the conditioning (text, speaker, ...), any length.
            codes_BKL: codes so far, in the delay pattern (codebook k is k + 1 steps late).
        """
        hidden_BLD = self.backbone(torch.cat([prefix_BLD, self.embed_codes(codes_BKL)], dim=1))
        hidden_BLD = hidden_BLD[:, prefix_BLD.shape[1] :]
        return torch.stack([head(hidden_BLD) for head in self.heads], dim=1)


def load_zonos(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> ZonosHybrid:
    """Read ``config.json`` and ``model.safetensors`` of Zonos-v0.1-hybrid.

    Raises:
        InputError: a file is missing or damaged, or a tensor is missing, unknown or misshapen.
    """
    config = ZonosConfig.from_json(read_json(Path(folder) / CONFIG_FILE))
    with torch.device("meta"):
        model = ZonosHybrid(config)
    load_into(model, read_sharded_tensors(Path(folder), device), folder)
    return model.to(dtype).eval()


class _Backbone(nn.Module):
    def __init__(self, config: ZonosConfig) -> None:
        super().__init__()
        kinds = [
            _AttentionLayer if index in config.attention_layers else _MambaLayer for index in range(config.num_layers)
        ]
        self.layers = nn.ModuleList(kind(config) for kind in kinds)
        self.norm_f = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_BLD = layer(hidden_BLD)
        return self.norm_f(hidden_BLD)


class _MambaLayer(nn.Module):
    def __init__(self, config: ZonosConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = _Mamba2(config)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        return hidden_BLD + self.mixer(self.norm(hidden_BLD))


class _Mamba2(nn.Module):
    """Mamba-2 as published (arXiv 2405.21060), twice the model's width: all heads share one B and one C, and the gated
    norm is over all channels. Parameters are named as in mamba-ssm."""

    def __init__(self, config: ZonosConfig) -> None:
        super().__init__()
        self.config = config
        self.inner_size = 2 * config.hidden_size
        self.num_heads = self.inner_size // config.mamba_head_dim
        channels = self.inner_size + 2 * config.state_size
        self.in_proj = nn.Linear(config.hidden_size, self.inner_size + channels + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, 4, groups=channels, padding=3)
        self.dt_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = nn.RMSNorm(self.inner_size, eps=config.norm_eps)
        self.out_proj = nn.Linear(self.inner_size, config.hidden_size, bias=False)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        inner, state, P = self.inner_size, self.config.state_size, self.config.mamba_head_dim
        z_BLI, u_BLC, dt_BLH = self.in_proj(hidden_BLD).split([inner, inner + 2 * state, self.num_heads], -1)
        assert self.conv1d.bias is not None
        conv_BLC = causal_conv_silu(u_BLC, self.conv1d.weight, self.conv1d.bias)
        x_BLI, B_BLN, C_BLN = conv_BLC.split([inner, state, state], -1)
        y_BLHP = ssd_scan(
            x_BLI.unflatten(-1, (-1, P)), dt_BLH, -torch.exp(self.A_log.float()), B_BLN[:, :, None], C_BLN[:, :, None],
            D_H=self.D, dt_bias_H=self.dt_bias,
        )  # fmt: skip
        assert isinstance(y_BLHP, Tensor)
        # One "head" of all channels.
        normed_BL1I = gated_rms_norm(
            y_BLHP.flatten(2)[:, :, None], z_BLI[:, :, None], self.norm.weight[None], self.config.norm_eps
        )
        return self.out_proj(normed_BL1I[:, :, 0])


class _AttentionLayer(nn.Module):
    def __init__(self, config: ZonosConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = _Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = _GatedMLP(config)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        hidden_BLD = hidden_BLD + self.mixer(self.norm(hidden_BLD))
        return hidden_BLD + self.mlp(self.norm2(hidden_BLD))


class _Attention(nn.Module):
    """Rotary grouped-query attention with one projection for q, k and v, as mamba-ssm's ``MHA``."""

    def __init__(self, config: ZonosConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = Rope({"rope_type": "default", "rope_theta": ROTARY_BASE}, config.head_dim, 1)
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.in_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.out_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        config = self.config
        heads_BLHP = self.in_proj(hidden_BLD).unflatten(-1, (-1, config.head_dim))
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q_BHLP, k_BGLP, v_BGLP = (part.transpose(1, 2) for part in heads_BLHP.split(sizes, dim=2))
        position_1L = torch.arange(hidden_BLD.shape[1], device=hidden_BLD.device)[None]
        cos_1LP, sin_1LP = self.rope.cos_sin(position_1L, hidden_BLD.dtype)
        q_BHLP, k_BGLP = (rotate(heads, cos_1LP, sin_1LP) for heads in (q_BHLP, k_BGLP))
        mixed_BHLP = attend(q_BHLP, k_BGLP, v_BGLP, is_causal=True)
        return self.out_proj(mixed_BHLP.transpose(1, 2).flatten(2))


class _GatedMLP(nn.Module):
    def __init__(self, config: ZonosConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        # The gate is the second half here, the first one in Llama.
        value, gate = self.fc1(hidden_BLD).chunk(2, dim=-1)
        return self.fc2(value * functional.silu(gate))


class _PrefixConditioner(nn.Module):
    def __init__(self, config: ZonosConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.project = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.conditioners = nn.ModuleList(_Conditioner(name, config) for name in CONDITIONERS)


class _Conditioner(nn.Module):
    """One condition's parameters; what stands in its place when it is not given; Fourier frequencies are fixed."""

    def __init__(self, name: str, config: ZonosConfig) -> None:
        super().__init__()
        width = config.hidden_size
        if name == "espeak":
            self.phoneme_embedder = nn.Embedding(PHONEME_ROWS, width)
            return
        self.uncond_vector = nn.Parameter(torch.zeros(width))
        if name == "speaker":
            self.project = nn.Linear(config.speaker_size, width)
        elif name in _INTEGERS:
            self.int_embedder = nn.Embedding(_INTEGERS[name], width)
        else:
            self.register_buffer("weight", torch.zeros(width // 2, _FOURIER[name]))
