"""Parameters, FLOPs and cache bytes in closed form, for every architecture and layout.

Two ways of counting FLOPs:

- *The paper's* (Table 3): a whole forward pass over ``length`` tokens, though the table calls it one token.
  Linear layers at 2 FLOPs per multiply-accumulate, attention over the full square (4 L^2 d per layer), no head,
  no convolution, and no scan, except for Zonos, whose 7.32 only comes out with 9 L d_inner N per Mamba layer.
- *Full*: linear layers, convolution, attention, the chunked scan, and the head at the one position that is
  sampled from. Elementwise work (norms, activations) is left out, as FLOP counters do.

Measured against the paper: Llasa-1B 4.535 TFLOP (4.53) and Zonos 7.326 (7.32) agree; the savings between the
MamTra rows agree (0.14, 0.21, 0.24, 0.26); all CosyVoice 2 rows come out 0.05 TFLOP above the published ones
(1.83 against 1.78), which we could not explain and do not correct.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mamtra_ray.efficiency.architectures import (
    Architecture,
    LayerCost,
    attention_layer,
    cosyvoice2,
    demo,
    from_hf_config,
    llasa_1b,
    mamba_layer,
    zonos_v0_1_hybrid,
)
from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.layouts import Layout, from_strategy

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "break_even_length",
    "cache_bytes",
    "decode_flops",
    "efficiency_rows",
    "from_hf_config",
    "parameters",
    "prefill_flops",
    "prefill_flops_full",
    "total_parameters",
]

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture for architecture in (cosyvoice2(), llasa_1b(), zonos_v0_1_hybrid(), demo())
}
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SCAN_FLOPS_PER_STATE_VALUE = 9
"""FLOPs of the scan per token and state value, as Mamba's authors' accounting has it (9 L d_inner N)."""


def parameters(architecture: Architecture, layout: Layout) -> int:
    """Parameters as published for this system.

    That is the decoder (layers and final norm), which is all a layout changes; for Zonos, of which only the
    whole checkpoint's size is published, everything. :func:`total_parameters` counts everything for all.
    """
    total = total_parameters(architecture, layout)
    return total if architecture.tables_counted else total - architecture.table_parameters


def total_parameters(architecture: Architecture, layout: Layout) -> int:
    """All parameters of the language model: decoder, embedding tables, heads, conditioners."""
    final_norm = architecture.hidden_size * (2 if architecture.norm_has_bias else 1)
    layers = _sum_over(architecture, layout, lambda layer: layer.parameters)
    return layers + final_norm + architecture.table_parameters


def prefill_flops(architecture: Architecture, layout: Layout, length: int, scan: bool | None = None) -> int:
    """FLOPs of one forward pass over ``length`` tokens in the paper's accounting (module docstring).

    Args:
        architecture: one of :data:`ARCHITECTURES`, or from :func:`from_hf_config`.
        layout: as many layers as the architecture.
        length: tokens.
        scan: count the scan of the Mamba layers (9 L d_inner N each); ``None`` does as the paper's row does.
    """
    linear = 2 * length * _sum_over(architecture, layout, lambda layer: layer.linear_macs_per_token)
    attention = 4 * length**2 * _sum_over(architecture, layout, lambda layer: layer.attention_width)
    counted = architecture.scan_counted if scan is None else scan
    return linear + attention + (length * _scan_flops_per_token(architecture, layout) if counted else 0)


def prefill_flops_full(architecture: Architecture, layout: Layout, length: int) -> int:
    """FLOPs of a prefill of ``length`` tokens, everything that FLOP counters count, head at the last position.

    Attention is the full square, of which a causal kernel skips up to half; the scan includes reading the empty
    state before the first chunk, which ours skips.
    """
    conv = 2 * length * _sum_over(architecture, layout, lambda layer: layer.conv_macs_per_token)
    scan = length * _sum_over(architecture, layout, lambda layer: layer.chunked_scan_flops_per_token)
    return prefill_flops(architecture, layout, length, scan=False) + conv + scan + _head_flops(architecture)


def decode_flops(architecture: Architecture, layout: Layout, context: int, scan: bool = False) -> int:
    """FLOPs of generating one token with ``context`` tokens in the cache: linear layers and attention.

    Neither the head (the same for every layout) nor, unless ``scan``, the state update is counted, so that
    the figure is the one-token counterpart of :func:`prefill_flops`.
    """
    linear = 2 * _sum_over(architecture, layout, lambda layer: layer.linear_macs_per_token)
    attention = 4 * context * _sum_over(architecture, layout, lambda layer: layer.attention_width)
    return linear + attention + (_scan_flops_per_token(architecture, layout) if scan else 0)


def cache_bytes(
    architecture: Architecture,
    layout: Layout,
    length: int,
    dtype: str = "float32",
    *,
    state_dtype: str | None = None,
    dummy_key_value: bool = False,
) -> int:
    """Bytes that one sequence of ``length`` tokens holds between decoding steps.

    Args:
        architecture: one of :data:`ARCHITECTURES`, or from :func:`from_hf_config`.
        layout: as many layers as the architecture.
        length: tokens in the cache.
        dtype: float32, float16 or bfloat16.
        state_dtype: type of the SSM state where it differs; many kernels keep it in float32.
        dummy_key_value: add the one-value key and value per token that the paper's Mamba layers left in the
            cache (an artifact of its code that Fig. 5 includes; ours have none).
    """
    value_bytes = _dtype_bytes(dtype)
    state_bytes = _dtype_bytes(state_dtype or dtype)
    ssm = _sum_over(architecture, layout, lambda layer: layer.ssm_values)
    conv = _sum_over(architecture, layout, lambda layer: layer.conv_values)
    per_token = _sum_over(architecture, layout, lambda layer: layer.cached_values_per_token)
    if dummy_key_value:
        per_token += 2 * len(layout.mamba_layers)
    return ssm * state_bytes + (conv + length * per_token) * value_bytes


def break_even_length(
    architecture: Architecture,
    layout: Layout,
    dtype: str = "float32",
    *,
    state_dtype: str | None = None,
    weights_for_sequences: int | None = None,
) -> int | None:
    """The context in tokens above which the hybrid's cache is smaller than the all-attention model's.

    Below it, the fixed Mamba states outweigh the keys and values they replace. The number is the same for
    every layout, since both sides scale with the number of Mamba layers. ``None`` without Mamba layers.

    Args:
        architecture: one of :data:`ARCHITECTURES`, or from :func:`from_hf_config`.
        layout: as many layers as the architecture.
        dtype: of cache and weights.
        state_dtype: type of the SSM state where it differs.
        weights_for_sequences: compare weights and cache together, for this many sequences of that context at
            once: a Mamba mixer has more parameters than the attention it replaces.
    """
    if not layout.mamba_layers:
        return None
    attention, mamba = attention_layer(architecture), mamba_layer(architecture)
    fixed = mamba.ssm_values * _dtype_bytes(state_dtype or dtype) + mamba.conv_values * _dtype_bytes(dtype)
    per_token, sequences = attention.cached_values_per_token * _dtype_bytes(dtype), weights_for_sequences or 1
    if weights_for_sequences:
        fixed = fixed * sequences + (mamba.parameters - attention.parameters) * _dtype_bytes(dtype)
    return max(0, fixed // (per_token * sequences))


def published_layouts(architecture: Architecture) -> list[tuple[str, Layout]]:
    """(ratio as published, layout) of every row of the table: the teacher, then ever fewer attention layers."""
    if architecture.name == "zonos_v0_1_hybrid":
        # 12 of 46 layers: the paper calls it 1:3 although 46 is no multiple of 4.
        return [("1:3", Layout.from_attention_layers(range(0, 46, 4), 46))]
    layers = architecture.num_layers
    mamba_per_attention = [n for n in (0, 1, 2, 3, 5, 7, 11, 15) if layers % (n + 1) == 0]
    if layers == 24:
        mamba_per_attention = [0, 1, 3, 5, 11]
    rows = [(f"1:{n}", from_strategy("block_beginning", layers, f"1:{n}")) for n in mamba_per_attention]
    if architecture.name == "cosyvoice2":
        by_wer = {"1:5": (0, 8, 11, 16), "1:11": (0, 16)}
        rows = [(r, Layout.from_attention_layers(by_wer[r], 24) if r in by_wer else layout) for r, layout in rows]
    return rows


def efficiency_rows(
    architecture: Architecture,
    layouts: list[tuple[str, Layout]] | None = None,
    *,
    length: int = 2048,
    dtype: str = "float32",
    state_dtype: str | None = None,
) -> list[dict[str, Any]]:
    """One plain row per layout; FLOPs and cache at ``length`` tokens (2,048: the paper's Table 3)."""
    return [
        {
            "system": architecture.name,
            "layout": str(layout),
            "ratio": ratio,
            "parameters": parameters(architecture, layout),
            "parameters_total": total_parameters(architecture, layout),
            "prefill_flops": prefill_flops(architecture, layout, length),
            "prefill_flops_full": prefill_flops_full(architecture, layout, length),
            "decode_flops": decode_flops(architecture, layout, length),
            "cache_bytes": cache_bytes(architecture, layout, length, dtype, state_dtype=state_dtype),
            "break_even_length": break_even_length(architecture, layout, dtype, state_dtype=state_dtype),
            "break_even_length_with_weights": break_even_length(
                architecture, layout, dtype, state_dtype=state_dtype, weights_for_sequences=1
            ),
            "length": length,
            "dtype": dtype,
        }
        for ratio, layout in layouts or published_layouts(architecture)
    ]


def _sum_over(architecture: Architecture, layout: Layout, of: Callable[[LayerCost], int]) -> int:
    if layout.num_layers != architecture.num_layers:
        raise InputError(
            f"layout {layout} has {layout.num_layers} layers, {architecture.name} has {architecture.num_layers}"
        )
    attention, mamba = layout.num_attention, layout.num_layers - layout.num_attention
    return attention * of(attention_layer(architecture)) + mamba * of(mamba_layer(architecture))


def _scan_flops_per_token(architecture: Architecture, layout: Layout) -> int:
    return SCAN_FLOPS_PER_STATE_VALUE * _sum_over(architecture, layout, lambda layer: layer.ssm_values)


def _head_flops(architecture: Architecture) -> int:
    return 2 * architecture.hidden_size * architecture.head_outputs


def _dtype_bytes(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise InputError(f"unknown dtype {dtype!r}: {nearest_name(dtype, DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]
