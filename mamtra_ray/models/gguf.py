"""GGUF files (llama.cpp's format) of Llama, Qwen2 and Qwen3: dequantized to float32, under Hugging Face's names.

What the file holds is taken as it is: a model quantized to four bits is, as a teacher, the model that its dequantized
weights are. Reading, names and dequantization are the public functions of the package ``gguf``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.models.decoder import Decoder
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.models.pretrained import decoder_config

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""``general.architecture`` of the files that can be read; for these it is transformers' model type too."""

_TOKENIZER = "tokenizer.ggml."
_BOS, _EOS = f"{_TOKENIZER}bos_token_id", f"{_TOKENIZER}eos_token_id"
_SCALINGS = {
    "linear": {"factor": "scaling.factor"},
    "yarn": {"factor": "scaling.factor", "original_max_position_embeddings": "scaling.original_context_length"},
}


@dataclass(frozen=True)
class GGUFModel:
    """A file, read.

    Attributes:
        config: shape of the decoder.
        tied: whether the head is the embedding table.
        tensors: float32, under Hugging Face's names (``model.layers.0.self_attn.q_proj.weight``).
    """

    config: DecoderConfig
    tied: bool
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class GGUFTokens:
    """What a file says about its ids.

    Attributes:
        bos_id, eos_id: that begin and end a text; None where the file does not say.
        tokenizer_hash: of the tokenizer in it, not of the weights: all quantizations of a model have the same.
    """

    bos_id: int | None
    eos_id: int | None
    tokenizer_hash: str


def read_gguf(path: Path) -> GGUFModel:
    """Read a GGUF file.

    Raises:
        InputError: the package ``gguf`` is missing; the file is missing, damaged or truncated; another architecture,
            an option or a tensor that our decoder has no place for, or a type that cannot be dequantized.
    """
    reader = _open(path)
    # Without the tokenizer's lists, which take seconds to unpack.
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(_TOKENIZER)}
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise InputError(f"{path} holds a model of architecture {kind!r}: {nearest_name(str(kind), ARCHITECTURES)}")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if "rope_freqs.weight" in stored:
        raise InputError(
            f"{path} has rope_freqs.weight, rotary factors of Llama 3.1 that GGUF gives as numbers only: load this "
            "model from its Hugging Face folder"
        )
    config = _config(path, kind, fields, stored)
    tied = "output.weight" not in stored
    names = _names(kind, config, tied)
    if unknown := sorted(set(stored) - set(names)):
        raise InputError(f"{path} has a tensor that the model has no place for: {unknown[0]}")
    if missing := [name for name in names if name not in stored]:
        raise InputError(f"{path} has no tensor {missing[0]}")
    tensors = {}
    for name, hf_name in names.items():
        tensor = _dequantized(path, stored[name])
        # llama.cpp rotates neighbors, elements 2 i and 2 i + 1 of a head, in its Llama; Hugging Face i and i + P / 2.
        if kind == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = config.num_heads if ".attn_q." in name else config.num_kv_heads
            _check_rows(path, name, tensor, heads * config.head_dim)
            tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        tensors[hf_name] = tensor
    return GGUFModel(config, tied, tensors)


def read_gguf_tokens(path: Path) -> GGUFTokens:
    """Read what the ids of a GGUF file mean.

    Raises:
        InputError: as :func:`read_gguf`, without looking at the tensors.
    """
    fields = {name: field for name, field in _open(path).fields.items() if name.startswith(_TOKENIZER)}
    digest = hashlib.sha256()
    for name, field in sorted(fields.items()):
        digest.update(f"\0{name}".encode())
        for part in field.data:
            digest.update(b"\0" + field.parts[part].tobytes())
    bos, eos = (fields[name].contents() if name in fields else None for name in (_BOS, _EOS))
    return GGUFTokens(bos, eos, digest.hexdigest())


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise InputError(f"reading {path} needs the package {error.name}: pip install 'mamtra-ray[gguf]'") from None
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, TypeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} is truncated, damaged or no GGUF file: {reason}") from None


def _config(path: Path, kind: str, fields: Mapping[str, Any], stored: Mapping[str, Any]) -> DecoderConfig:
    def value(key: str, default: Any = None) -> Any:
        found = fields.get(f"{kind}.{key}", default)
        if found is None:
            raise InputError(f"{path} does not say {kind}.{key}")
        return found

    heads, width = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", width // heads)
    if value("attention.value_length", head_dim) != head_dim or value("rope.dimension_count", head_dim) != head_dim:
        raise InputError(
            f"{path}: values, or the rotated part of keys, are not as wide as keys, which the decoder lacks"
        )
    if "token_embd.weight" not in stored:
        raise InputError(f"{path} has no tensor token_embd.weight")
    return decoder_config(
        SimpleNamespace(
            model_type=kind,
            vocab_size=int(stored["token_embd.weight"].shape[-1]),
            hidden_size=width,
            intermediate_size=value("feed_forward_length"),
            num_hidden_layers=value("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=value("attention.head_count_kv", heads),
            head_dim=head_dim,
            hidden_act="silu",
            rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
            rope_parameters=_rope(path, kind, fields),
            max_position_embeddings=value("context_length"),
            attention_bias="blk.0.attn_q.bias" in stored,
        )
    )


def _rope(path: Path, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{kind}.rope."
    scaling = fields.get(f"{prefix}scaling.type", "none")
    # llama.cpp's default, where a file does not say.
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.get(f"{prefix}freq_base", 10_000.0)}
    if scaling == "none":
        return rope
    if scaling not in _SCALINGS:
        raise InputError(f"{path}: RoPE scaling {scaling!r} is not supported: {nearest_name(scaling, _SCALINGS)}")
    rope["rope_type"] = scaling
    for key, field in _SCALINGS[scaling].items():
        if prefix + field not in fields:
            raise InputError(f"{path} does not say {prefix}{field}")
        rope[key] = fields[prefix + field]
    return rope


def _names(kind: str, config: DecoderConfig, tied: bool) -> dict[str, str]:
    """Names of all tensors of the model in a GGUF file -> in a Hugging Face checkpoint."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    table = gguf.get_tensor_name_map(architecture, config.num_layers)
    hf_names = [f"model.{name}" for name in Decoder(config).state_dict()] + ([] if tied else ["lm_head.weight"])
    return {str(table.get_name(name, try_suffixes=(".weight", ".bias"))): name for name in hf_names}


def _dequantized(path: Path, tensor: Any) -> Tensor:
    from gguf import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise InputError(
            f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which gguf cannot read"
        ) from None
    except (ValueError, AssertionError) as error:
        raise InputError(f"{path}: {tensor.name} is damaged: {' '.join(str(error).split())}") from None
    result = torch.tensor(values, dtype=torch.float32)
    if not bool(torch.isfinite(result).all()):
        raise InputError(f"{path}: {tensor.name} has values that are not finite: the file is damaged")
    return result


def _check_rows(path: Path, name: str, tensor: Tensor, rows: int) -> None:
    if tensor.shape[0] != rows:
        raise InputError(f"{path}: {name} has {tensor.shape[0]} rows, expected {rows}")
