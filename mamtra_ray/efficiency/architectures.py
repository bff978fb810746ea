"""The shapes from which efficiency figures follow: one description per speech model, none of its weights.

A layer is reduced to a :class:`LayerCost`: its parameters, its multiply-accumulates, and what it caches.
Everything in :mod:`mamtra_ray.efficiency` is a sum of those over a layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mamtra_ray.errors import InputError, nearest_name

StateSharing = Literal["per_query_head", "per_kv_head"]

QKV_BIAS_BY_MODEL_TYPE = {"qwen2": True, "qwen3": False, "llama": False, "mistral": False}
"""Decoders that convert; Qwen2 always has q/k/v biases, the others say so with ``attention_bias``."""


@dataclass(frozen=True)
class MambaShape:
    """A Mamba-2 layer: ``in_proj`` to [z | x | B | C | dt], a causal convolution over [x | B | C], the scan,
    an RMSNorm gated by z, and ``out_proj``."""

    inner_size: int
    """Width of z, of the scan's output and of the gated norm."""
    x_channels: int
    b_channels: int
    c_channels: int
    num_states: int
    """Heads that own a state, a decay A and a step size dt each."""
    head_dim: int
    state_size: int
    num_output_heads: int
    """Heads that read a state and have a skip D; more than ``num_states`` when query heads share a state."""
    conv_kernel: int = 4
    chunk_size: int = 32
    """Tokens of a chunk of the scan (our mixer's default); only the full count of FLOPs depends on it."""
    has_mlp: bool = True
    """False where a Mamba layer is the mixer alone (Zonos); True where it replaced attention in a decoder layer."""


@dataclass(frozen=True)
class Architecture:
    """A decoder-only speech model and the Mamba layer its attention can be replaced with."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mamba: MambaShape
    qkv_bias: bool = False
    o_bias: bool = False
    """Of attention's output projection, and of the mixer's that replaces it."""
    qk_norm: bool = False
    """Whether attention normalizes its queries and keys (Qwen3)."""
    norm_has_bias: bool = False
    """True for LayerNorm, False for RMSNorm."""
    table_parameters: int = 0
    """Embedding tables, heads and conditioners: all that no layout changes, apart from the final norm."""
    head_outputs: int = 0
    """Classes that one position is scored for, over all codebooks."""
    tables_counted: bool = False
    """Whether the published parameter count that ours is compared with includes the tables (Zonos: yes)."""
    scan_counted: bool = False
    """Whether the paper's TFLOP figure of this system includes the scan (Zonos 7.32: yes; MamTra's rows: no)."""


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs. Cache sizes are in stored values (multiply by the bytes of the type)."""

    parameters: int
    linear_macs_per_token: int
    conv_macs_per_token: int
    attention_width: int
    """Query heads x head size; attention over a context of c costs 4 c attention_width FLOPs per token."""
    cached_values_per_token: int
    ssm_values: int
    conv_values: int
    chunked_scan_flops_per_token: int


def attention_layer(architecture: Architecture) -> LayerCost:
    """A decoder layer with grouped-query attention: two norms, attention, gated MLP."""
    query_size = architecture.num_heads * architecture.head_dim
    kv_size = architecture.num_kv_heads * architecture.head_dim
    linear = architecture.hidden_size * (2 * query_size + 2 * kv_size) + _mlp_macs(architecture)
    biases = query_size + 2 * kv_size if architecture.qkv_bias else 0
    biases += architecture.hidden_size if architecture.o_bias else 0
    head_norms = 2 * architecture.head_dim if architecture.qk_norm else 0
    return LayerCost(
        parameters=linear + biases + head_norms + 2 * _norm_parameters(architecture),
        linear_macs_per_token=linear,
        conv_macs_per_token=0,
        attention_width=query_size,
        cached_values_per_token=2 * kv_size,
        ssm_values=0,
        conv_values=0,
        chunked_scan_flops_per_token=0,
    )


def mamba_layer(architecture: Architecture) -> LayerCost:
    """The layer with a Mamba mixer in the place of attention."""
    mamba = architecture.mamba
    conv_channels = mamba.x_channels + mamba.b_channels + mamba.c_channels
    projected = mamba.inner_size + conv_channels + mamba.num_states
    mixer = architecture.hidden_size * (projected + mamba.inner_size)
    linear = mixer + (_mlp_macs(architecture) if mamba.has_mlp else 0)
    conv = conv_channels * (mamba.conv_kernel + 1)
    norms = (2 if mamba.has_mlp else 1) * _norm_parameters(architecture)
    out_bias = architecture.hidden_size if architecture.o_bias else 0
    return LayerCost(
        parameters=linear + out_bias + conv + 2 * mamba.num_states + mamba.num_output_heads + mamba.inner_size + norms,
        linear_macs_per_token=linear,
        conv_macs_per_token=conv_channels * mamba.conv_kernel,
        attention_width=0,
        cached_values_per_token=0,
        ssm_values=mamba.num_states * mamba.head_dim * mamba.state_size,
        conv_values=conv_channels * mamba.conv_kernel,
        chunked_scan_flops_per_token=_chunked_scan_flops(mamba),
    )


def grouped_query_mamba(
    num_heads: int, num_kv_heads: int, head_dim: int, state_sharing: StateSharing = "per_query_head"
) -> MambaShape:
    """The mixer that takes attention's weights: C from Q, B from K, x from V (paper, section 2.3).

    With ``per_query_head`` the few x and B heads are repeated after the convolution, and every query head has
    a state of its own (the paper's mixer: its cache figures fit no other). With ``per_kv_head`` the query
    heads of a group read one state, which is smaller by ``num_heads / num_kv_heads``.
    """
    query_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    return MambaShape(
        inner_size=query_size,
        x_channels=kv_size,
        b_channels=kv_size,
        c_channels=query_size,
        num_states=num_heads if state_sharing == "per_query_head" else num_kv_heads,
        head_dim=head_dim,
        state_size=head_dim,
        num_output_heads=num_heads,
    )


def decoder_architecture(
    name: str,
    *,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    qkv_bias: bool,
    table_parameters: int,
    head_outputs: int,
    o_bias: bool = False,
    qk_norm: bool = False,
    state_sharing: StateSharing = "per_query_head",
) -> Architecture:
    """A Qwen- or Llama-shaped decoder whose attention converts to the grouped-query Mamba mixer."""
    return Architecture(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mamba=grouped_query_mamba(num_heads, num_kv_heads, head_dim, state_sharing),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=qk_norm,
        table_parameters=table_parameters,
        head_outputs=head_outputs,
    )


def from_hf_config(
    config: Mapping[str, Any], name: str = "model", state_sharing: StateSharing = "per_query_head"
) -> Architecture:
    """The architecture of a Hugging Face decoder, from its ``config.json`` (or ``PretrainedConfig.to_dict()``).

    Raises:
        InputError: another ``model_type`` than Qwen2, Qwen3, Llama or Mistral, or a size that is missing.
    """
    model_type = config.get("model_type", "")
    if model_type not in QKV_BIAS_BY_MODEL_TYPE:
        hint = nearest_name(str(model_type), QKV_BIAS_BY_MODEL_TYPE)
        raise InputError(f"no efficiency figures for model_type {model_type!r}: {hint}")
    try:
        hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
        num_layers, intermediate_size = config["num_hidden_layers"], config["intermediate_size"]
        vocabulary_size = config["vocab_size"]
    except KeyError as missing:
        raise InputError(f"the model config has no {missing.args[0]!r}") from None
    tied = config.get("tie_word_embeddings", False)
    return decoder_architecture(
        name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or hidden_size // num_heads,
        qkv_bias=QKV_BIAS_BY_MODEL_TYPE[model_type] or bool(config.get("attention_bias", False)),
        o_bias=model_type in ("llama", "qwen3") and bool(config.get("attention_bias", False)),
        qk_norm=model_type == "qwen3",
        table_parameters=vocabulary_size * hidden_size * (1 if tied else 2),
        head_outputs=vocabulary_size,
        state_sharing=state_sharing,
    )


def cosyvoice2(state_sharing: StateSharing = "per_query_head") -> Architecture:
    """CosyVoice 2's language model (Qwen2.5-0.5B body, 6,561 speech codes + 3 ids, 2 control embeddings)."""
    return decoder_architecture(
        "cosyvoice2",
        num_layers=24,
        hidden_size=896,
        intermediate_size=4864,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        qkv_bias=True,
        table_parameters=(151_936 + 6_564 + 2 + 6_564) * 896 + 6_564,
        head_outputs=6_564,
        state_sharing=state_sharing,
    )


def llasa_1b(state_sharing: StateSharing = "per_query_head") -> Architecture:
    """Llasa-1B: Llama-3.2-1B with 65,536 codes and 8 control tokens more; embedding and head are tied."""
    return decoder_architecture(
        "llasa_1b",
        num_layers=16,
        hidden_size=2048,
        intermediate_size=8192,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        qkv_bias=False,
        table_parameters=193_800 * 2048,
        head_outputs=193_800,
        state_sharing=state_sharing,
    )


def zonos_v0_1_hybrid() -> Architecture:
    """Zonos-v0.1-hybrid: 12 attention layers (with MLP) and 34 Mamba-2 layers (without), 9 codebooks."""
    return Architecture(
        name="zonos_v0_1_hybrid",
        num_layers=46,
        hidden_size=2048,
        intermediate_size=8192,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        mamba=MambaShape(
            inner_size=4096,
            x_channels=4096,
            b_channels=128,
            c_channels=128,
            num_states=64,
            head_dim=64,
            state_size=128,
            num_output_heads=64,
            chunk_size=256,
            has_mlp=False,
        ),
        norm_has_bias=True,
        # 9 embedding tables of 1026 rows and 9 heads of 1025, and the prefix conditioner.
        table_parameters=9 * (1026 + 1025) * 2048 + 5_138_432,
        head_outputs=9 * 1025,
        tables_counted=True,
        scan_counted=True,
    )


def demo(state_sharing: StateSharing = "per_query_head") -> Architecture:
    """The packaged demo teacher's shape; its text vocabulary is small enough not to matter."""
    return decoder_architecture(
        "demo",
        num_layers=12,
        hidden_size=128,
        intermediate_size=336,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        qkv_bias=True,
        table_parameters=2 * 1028 * 128,
        head_outputs=1028,
        state_sharing=state_sharing,
    )


def _norm_parameters(architecture: Architecture) -> int:
    return architecture.hidden_size * (2 if architecture.norm_has_bias else 1)


def _mlp_macs(architecture: Architecture) -> int:
    return 3 * architecture.hidden_size * architecture.intermediate_size


def _chunked_scan_flops(mamba: MambaShape) -> int:
    """Matrix products of the chunked scan, per token: C B^T once per group of heads and its product with x
    inside the chunk, the chunk's own state, and the output read from the incoming state."""
    groups = mamba.c_channels // mamba.state_size
    scores = 2 * mamba.chunk_size * mamba.state_size
    within = 2 * mamba.chunk_size * mamba.head_dim
    state = 2 * mamba.state_size * mamba.head_dim
    return groups * scores + mamba.num_output_heads * (within + state) + mamba.num_states * state
