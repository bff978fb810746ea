"""The hybrid decoder body: transformers' GraniteMoeHybridModel with our compact Mamba mixers.

GraniteMoeHybrid (dense, without experts) computes exactly what Qwen2 and Llama decoders compute, and adds a
choice of mixer per layer, the hybrid cache and its masks. We take all of that from transformers and put
:class:`~mamtra_ray.models.mamba.MambaMixer` into the Mamba slots, which keeps one copy of x and B per
key-value head where transformers' own layer would store one per query head.

Tensor letters: B batch, L new positions, T past and new positions, D model width, V unified vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GraniteMoeHybridConfig, PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridModel,
    GraniteMoeHybridRotaryEmbedding,
)

from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.models.cache import mixer_state, past_length, store_mixer_state
from mamtra_ray.models.mamba import MambaMixer, MixerConfig, StateSharing

LAYER_TYPES = {"A": "full_attention", "M": "linear_attention"}


@dataclass(frozen=True)
class HybridConfig:
    """Shape of a hybrid decoder; everything needed to build it but the weights.

    Attributes:
        layout: attention and Mamba layers; all attention for a teacher.
        vocab_size: rows of the (unified) embedding table.
        rope_parameters: transformers' ``rope_parameters`` (``rope_type``, ``rope_theta`` and scaling).
        qkv_bias: q, k and v projections have biases (Qwen2).
        o_bias: so has the attention's output projection.
        state_sharing: whether query heads share a Mamba state, see :class:`MixerConfig`.
    """

    layout: Layout
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]
    max_position_embeddings: int
    qkv_bias: bool
    o_bias: bool = False
    state_sharing: StateSharing = "per_query_head"
    conv_kernel: int = 4
    chunk_size: int = 32

    @property
    def num_layers(self) -> int:
        return self.layout.num_layers

    @property
    def mixer(self) -> MixerConfig:
        """The shape of every Mamba mixer of this decoder."""
        return MixerConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            conv_kernel=self.conv_kernel,
            state_sharing=self.state_sharing,
            norm_eps=self.rms_norm_eps,
            chunk_size=self.chunk_size,
            out_bias=self.o_bias,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the layout becomes its letters."""
        return dataclasses.asdict(self) | {
            "layout": str(self.layout),
            "rope_parameters": dict(self.rope_parameters),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> HybridConfig:
        """Inverse of :meth:`to_dict`; raises :class:`InputError` for keys missing, unknown or not valid."""
        known = {field.name for field in dataclasses.fields(cls)}
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        for problem, keys in (("lacks", required - set(content)), ("has the unknown key", set(content) - known)):
            if keys:
                raise InputError(f"the model config {problem} {', '.join(sorted(keys))}")
        for key, value in content.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise InputError(f"the model config is not valid: {key} = {value} must be positive")
        try:
            config = cls(**{**content, "layout": Layout.from_string(content["layout"])})
            GraniteMoeHybridRotaryEmbedding(granite_config(config))
            config.mixer  # noqa: B018 (checks its sizes)
        except InputError:
            raise
        except Exception as error:  # transformers' validation raises types of its own
            raise InputError(f"the model config is not valid: {' '.join(str(error).split())[-200:]}") from None
        return config

    @classmethod
    def from_transformers(cls, config: PretrainedConfig) -> HybridConfig:
        """The all-attention shape of a Qwen2 or Llama model.

        Raises:
            InputError: another architecture, or an option GraniteMoeHybrid cannot represent.
        """
        if config.model_type not in ("qwen2", "llama"):
            raise InputError(f"model type {config.model_type!r} cannot be a teacher body: expected qwen2 or llama")
        unsupported = {
            "sliding-window attention": getattr(config, "use_sliding_window", False),
            "biases in the MLP": getattr(config, "mlp_bias", False),
            f"activation {config.hidden_act!r} (only silu)": config.hidden_act != "silu",
        }
        for feature, present in unsupported.items():
            if present:
                raise InputError(f"this {config.model_type} model uses {feature}, which the hybrid body lacks")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if (config.num_attention_heads * head_dim) % config.hidden_size:
            raise InputError(
                f"{config.num_attention_heads} heads of width {head_dim} do not make a multiple of the model width"
                f" {config.hidden_size}, which the mixer needs"
            )
        llama_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            layout=Layout("A" * config.num_hidden_layers),
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=dict(config.rope_parameters),
            max_position_embeddings=config.max_position_embeddings,
            qkv_bias=config.model_type == "qwen2" or llama_bias,
            o_bias=config.model_type == "llama" and llama_bias,
        )


def granite_config(config: HybridConfig, **overrides: Any) -> GraniteMoeHybridConfig:
    """The GraniteMoeHybrid configuration with the same function; its mixers are the expanded ones.

    x, B and C of every head are separate groups there (``mamba_n_groups`` = heads).
    """
    return GraniteMoeHybridConfig(
        **{
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "layer_types": [LAYER_TYPES[letter] for letter in str(config.layout)],
            # No experts: each layer is its mixer and the shared MLP, as in a dense decoder.
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": config.intermediate_size,
            "intermediate_size": config.intermediate_size,
            "rms_norm_eps": config.rms_norm_eps,
            "attention_bias": config.qkv_bias or config.o_bias,
            "attention_multiplier": config.head_dim**-0.5,
            "position_embedding_type": "rope",
            "rope_parameters": dict(config.rope_parameters),
            "max_position_embeddings": config.max_position_embeddings,
            "mamba_n_heads": config.num_heads,
            "mamba_n_groups": config.num_heads,
            "mamba_d_state": config.head_dim,
            "mamba_d_head": config.head_dim,
            "mamba_expand": config.num_heads * config.head_dim // config.hidden_size,
            "mamba_d_conv": config.conv_kernel,
            "mamba_chunk_size": config.chunk_size,
            "mamba_conv_bias": True,
            "mamba_proj_bias": config.o_bias,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            **overrides,
        }
    )


class ExactRotaryEmbedding(GraniteMoeHybridRotaryEmbedding):
    """RoPE whose frequencies stay float32: ``model.bfloat16()`` would round them, and positions drift apart."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class ContiguousSiLU(nn.SiLU):
    """SiLU of a contiguous copy, so that the MLP equals the teacher's bit for bit.

    Granite's gate is one half of a wider product, a strided view. PyTorch's CPU kernel computes the end of a row
    with other instructions, which round otherwise (seen with AVX-512, widths that 64 does not divide). A GPU computes
    every element alike and needs no copy.
    """

    def forward(self, gate: Tensor) -> Tensor:
        """Any shape, which is kept."""
        return super().forward(gate if gate.is_cuda else gate.contiguous())


class CachedMixer(nn.Module):
    """A :class:`MambaMixer` in a decoder layer's Mamba slot, keeping its state in transformers' hybrid cache."""

    def __init__(self, mixer: MambaMixer, layer: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer = layer

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The call GraniteMoeHybrid's decoder layer makes; shapes (B, L, D) -> (B, L, D)."""
        if cache_params is None:
            return self.mixer(hidden_states, attention_mask)
        state = mixer_state(cache_params, self.layer)
        output_BLD, state = self.mixer(hidden_states, attention_mask, state, return_state=True)
        store_mixer_state(cache_params, self.layer, state)
        return output_BLD


def empty_body(config: HybridConfig) -> GraniteMoeHybridModel:
    """The decoder with its parameters on the ``meta`` device: load them with ``load_state_dict(assign=True)``.

    Nothing is allocated or drawn, so building costs milliseconds and tensors may be shared between bodies.
    """
    granite = granite_config(config)
    with torch.device("meta"):
        body = GraniteMoeHybridModel(granite)
        for index, layer in enumerate(body.layers):
            cast(nn.Module, layer.shared_mlp).activation = ContiguousSiLU()
            if layer.mamba is not None:
                layer.mamba = CachedMixer(MambaMixer(config.mixer), index)
                continue
            # Granite has biases on all four projections or none; Qwen2 has them on three.
            for name, biased in _attention_biases(config).items():
                if not biased:
                    getattr(layer.self_attn, name).register_parameter("bias", None)
    # Its frequencies are computed, not loaded.
    body.rotary_emb = ExactRotaryEmbedding(granite)
    return body


def _attention_biases(config: HybridConfig) -> dict[str, bool]:
    return {"q_proj": config.qkv_bias, "k_proj": config.qkv_bias, "v_proj": config.qkv_bias, "o_proj": config.o_bias}


def mixers(body: GraniteMoeHybridModel) -> dict[int, MambaMixer]:
    """The Mamba mixers of a body by 0-based layer."""
    slots = {index: layer.mamba for index, layer in enumerate(body.layers)}
    return {index: slot.mixer for index, slot in slots.items() if isinstance(slot, CachedMixer)}


def body_tensors(checkpoint: Mapping[str, Tensor], num_layers: int, prefix: str = "model.") -> dict[str, Tensor]:
    """Rename a Qwen2 or Llama checkpoint's tensors to those of :func:`empty_body` (all attention).

    Args:
        checkpoint: tensors under Hugging Face's names, e.g. ``model.layers.0.self_attn.q_proj.weight``.
        num_layers: decoder layers.
        prefix: what stands before ``layers`` in the names.

    Raises:
        InputError: a tensor of the decoder is missing.
    """

    def tensor(name: str) -> Tensor:
        if prefix + name not in checkpoint:
            raise InputError(f"the checkpoint has no tensor {prefix + name}")
        return checkpoint[prefix + name]

    renamed = {name: tensor(name) for name in ("embed_tokens.weight", "norm.weight")}
    for index in range(num_layers):
        layer = f"layers.{index}."
        attention = layer + "self_attn."
        copied = [layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight"]
        copied += [f"{attention}{name}_proj.weight" for name in "qkvo"]
        # Which biases must be there is checked when the body loads these tensors.
        copied += [bias for name in "qkvo" if prefix + (bias := f"{attention}{name}_proj.bias") in checkpoint]
        renamed |= {name: tensor(name) for name in copied}
        gate_and_up = (tensor(layer + "mlp.gate_proj.weight"), tensor(layer + "mlp.up_proj.weight"))
        renamed[layer + "shared_mlp.input_linear.weight"] = torch.cat(gate_and_up)
        renamed[layer + "shared_mlp.output_linear.weight"] = tensor(layer + "mlp.down_proj.weight")
    return renamed


def run_body(
    body: GraniteMoeHybridModel,
    inputs_embeds_BLD: Tensor,
    attention_mask_BT: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """One forward pass; returns the post-norm hidden states (B, L, D).

    Masks and positions are made here: transformers asks the cache for its length, which a cache without
    attention layers cannot answer, and left-padded rows must count positions from their first real token.

    Args:
        body: from :func:`empty_body`, with its tensors loaded.
        inputs_embeds_BLD: embeddings of the new positions.
        attention_mask_BT: true for real tokens, over *all* positions so far (past and new), as in
            transformers. None if nothing is padded. Right-padded rows need no mask where only real positions
            are read and no cache is kept (training): every mixer is causal, so padding on the right is never
            seen, and attention then runs its faster unmasked kernel.
        cache: past states, updated in place.

    Raises:
        ValueError: the mask's length fits neither past nor new positions.
    """
    past = past_length(cache)
    length = inputs_embeds_BLD.shape[1]
    if attention_mask_BT is not None and past is not None and attention_mask_BT.shape[1] != past + length:
        raise ValueError(
            f"the attention mask covers {attention_mask_BT.shape[1]} positions,"
            f" but there are {past} past and {length} new ones"
        )
    if attention_mask_BT is None:
        positions_BL = torch.arange(length, device=inputs_embeds_BLD.device)[None] + (past or 0)
    else:
        positions_BL = (attention_mask_BT.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
    mask_arguments: dict[str, Any] = {
        "config": body.config,
        "inputs_embeds": inputs_embeds_BLD,
        "attention_mask": attention_mask_BT,
        "past_key_values": cache,
    }
    masks: dict[str, Any] = {"linear_attention": create_recurrent_attention_mask(**mask_arguments)}
    if past is not None:
        masks["full_attention"] = create_causal_mask(**mask_arguments)
    return body(
        inputs_embeds=inputs_embeds_BLD,
        attention_mask=masks,
        position_ids=positions_BL,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
