"""Grouped-query attention with rotary positions: the layers that a hybrid keeps.

Parameters have the names of Hugging Face's Qwen2, Qwen3 and Llama. Letters: see :mod:`mamtra_ray.models`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.models.linear import Linear
from mamtra_ray.models.norm import RMSNorm
from mamtra_ray.models.pass_inputs import PassInputs
from mamtra_ray.models.rope import rotate


class Attention(nn.Module):
    """Causal self-attention: H query heads, of which H / G share the keys and values of one of G heads."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.num_kv_heads = config.num_kv_heads
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, hidden_BLD: Tensor, inputs: PassInputs) -> Tensor:
        """Mix the positions of a sequence, or of its continuation: [B, L, D] -> [B, L, D]."""
        q_BHLP, k_BGLP, v_BGLP = (
            projection(hidden_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BHLP, k_BGLP = self.q_norm(q_BHLP), self.k_norm(k_BGLP)
        q_BHLP = rotate(q_BHLP, inputs.cos_BLP, inputs.sin_BLP)
        k_BGLP = rotate(k_BGLP, inputs.cos_BLP, inputs.sin_BLP)
        k_BGTP, v_BGTP = k_BGLP, v_BGLP
        if inputs.cache is not None:
            k_BGTP, v_BGTP = inputs.cache.append(self.layer, k_BGLP, v_BGLP)
        mixed_BHLP = attend(q_BHLP, k_BGTP, v_BGTP, inputs.seen_B1LT, inputs.is_causal)
        return self.o_proj(mixed_BHLP.transpose(1, 2).flatten(2))


def attend(
    q_BHLP: Tensor, k_BGTP: Tensor, v_BGTP: Tensor, seen_B1LT: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(P)) v by PyTorch's fused kernels, [B, H, L, P].

    Args:
        q_BHLP: queries.
        k_BGTP: keys; every one of G heads serves H / G consecutive query heads.
        v_BGTP: values.
        seen_B1LT: true where a query sees a key; None if every query sees every key, or ``is_causal``.
        is_causal: queries and keys are the same positions (L = T), and each sees itself and those before.
    """
    heads, groups, scale = q_BHLP.shape[1], k_BGTP.shape[1], q_BHLP.shape[-1] ** -0.5
    if q_BHLP.shape[2] == 1 and heads > groups:
        # One position: its heads of a group become the rows of one product, so that the kernel reads the group's keys
        # and values once and not once for each of them. That is what decoding spends its time on (benchmarks/generate).
        q_BGRP = q_BHLP.reshape(q_BHLP.shape[0], groups, heads // groups, -1)
        mixed_BGRP = F.scaled_dot_product_attention(q_BGRP, k_BGTP, v_BGTP, attn_mask=seen_B1LT, scale=scale)
        return mixed_BGRP.reshape(q_BHLP.shape)
    if seen_B1LT is not None and heads > groups:
        # PyTorch's fast CUDA kernels take shared heads or a mask, not both.
        k_BGTP, v_BGTP = (t.repeat_interleave(heads // groups, 1) for t in (k_BGTP, v_BGTP))
    return F.scaled_dot_product_attention(
        q_BHLP, k_BGTP, v_BGTP, attn_mask=seen_B1LT, is_causal=is_causal, scale=scale, enable_gqa=heads > groups
    )
