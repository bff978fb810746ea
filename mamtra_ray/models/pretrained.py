"""Checkpoints of Qwen2, Qwen3 and Llama models: their configuration, and a place for every one of their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamtra_ray.artifacts import read_json
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.models.checkpoint import CONFIG_FILE, check_tensors, read_transformers_config
from mamtra_ray.models.decoder import Decoder
from mamtra_ray.models.decoder_config import DecoderConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters", "max_position_embeddings"),
    "tie_word_embeddings",
)
"""What must stand in a config.json for it to need no defaults; files written by transformers 5 have them all."""
_STORED_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FREQUENCIES = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


def read_decoder_config(folder: Path) -> tuple[DecoderConfig, bool]:
    """The shape in a Qwen2, Qwen3 or Llama folder's ``config.json``, and whether its head is the embedding table.

    Raises:
        InputError: the file is missing or damaged, or describes a model that our decoder does not compute.
    """
    content = read_json(Path(folder) / CONFIG_FILE)
    if isinstance(content, dict) and all(content.get(key) is not None for key in _KEYS):
        # Nothing to fill in: transformers, whose import takes every worker process longer than all the rest, would
        # read the same.
        return decoder_config(SimpleNamespace(**content)), content["tie_word_embeddings"] is True
    config = read_transformers_config(Path(folder))
    return decoder_config(config), bool(config.tie_word_embeddings)


def decoder_config(config: PretrainedConfig | SimpleNamespace) -> DecoderConfig:
    """The all-attention shape of transformers' configuration of such a model, or of a complete config.json.

    Raises:
        InputError: another architecture, or an option that our decoder has not.
    """
    kind = config.model_type
    if kind not in ("qwen2", "qwen3", "llama"):
        raise InputError(f"model type {kind!r} cannot be a teacher body: expected qwen2, qwen3 or llama")
    quantization = getattr(config, "quantization_config", None)
    unsupported = {
        "sliding-window attention": getattr(config, "use_sliding_window", False)
        or set(getattr(config, "layer_types", None) or ()) - {"full_attention"},
        "biases in the MLP": getattr(config, "mlp_bias", False),
        f"activation {config.hidden_act!r} (only silu)": config.hidden_act != "silu",
        "quantized weights (quantization_config): dequantize the checkpoint first": quantization is not None,
    }
    for feature, present in unsupported.items():
        if present:
            raise InputError(f"this {kind} model uses {feature}, which the decoder lacks")
    if isinstance(config.num_hidden_layers, bool) or not isinstance(config.num_hidden_layers, int):
        raise InputError(f"num_hidden_layers = {config.num_hidden_layers!r} is no whole number")
    bias = bool(getattr(config, "attention_bias", False))
    return DecoderConfig(
        layout=Layout.all_attention(config.num_hidden_layers),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=config.rope_parameters,
        max_position_embeddings=config.max_position_embeddings,
        # Qwen2 has them whatever its configuration says, and never at the output.
        qkv_bias=kind == "qwen2" or bias,
        o_bias=kind != "qwen2" and bias,
        qk_norm=kind == "qwen3",
    )


def split_checkpoint(
    checkpoint: Mapping[str, Tensor], config: DecoderConfig, prefix: str, source: Path | str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The decoder's tensors (names without ``prefix``), and all that stand outside it under their own names.

    Rotary frequencies, which older checkpoints store, are compared with those that the config gives, and left out.

    Args:
        checkpoint: tensors under Hugging Face's names, e.g. ``model.layers.0.self_attn.q_proj.weight``.
        config: the shape.
        prefix: what stands before ``layers`` in the names.
        source: named in errors.

    Raises:
        InputError: a tensor of the decoder that is missing, misshapen or unknown; one stored as something else than
            plain floating-point numbers (a quantized checkpoint); or frequencies other than the config's.
    """
    decoder: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in checkpoint.items():
        if tensor.dtype not in _STORED_TYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{source}: {name} is stored as {kind}; expected float32, float16 or bfloat16"
                " (dequantize the checkpoint first)"
            )
        if _FREQUENCIES.fullmatch(name):
            _check_frequencies(tensor, config, f"{source}: {name}")
        elif name.startswith(prefix):
            decoder[name.removeprefix(prefix)] = tensor
        else:
            others[name] = tensor
    check_tensors(Decoder(config), decoder, source, prefix)
    return decoder, others


def head_weight(others: dict[str, Tensor], embedding_VD: Tensor, tied: bool, source: Path | str) -> Tensor:
    """Take ``lm_head.weight`` out of ``others``; the embedding table where the config ties the two.

    Raises:
        InputError: tied, but the file has another head; or not tied, and it has none.
    """
    head_VD = others.pop("lm_head.weight", None)
    if tied:
        if head_VD is not None and not torch.equal(head_VD, embedding_VD):
            raise InputError(
                f"{source}: tie_word_embeddings is true, but lm_head.weight is not embed_tokens.weight: set it to false"
                " in config.json, or remove lm_head.weight"
            )
        return embedding_VD
    if head_VD is None:
        raise InputError(f"{source} has no tensor lm_head.weight, and config.json does not set tie_word_embeddings")
    if head_VD.shape != embedding_VD.shape:
        raise InputError(f"{source}: lm_head.weight has shape {tuple(head_VD.shape)}, not {tuple(embedding_VD.shape)}")
    return head_VD


def _check_frequencies(stored_F: Tensor, config: DecoderConfig, where: str) -> None:
    expected_F, _ = config.rope.frequencies()
    if stored_F.shape != expected_F.shape or not torch.allclose(stored_F.float().cpu(), expected_F, rtol=1e-2):
        raise InputError(f"{where} are not the rotary frequencies that config.json describes")
