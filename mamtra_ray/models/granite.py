"""Export to a GraniteMoeHybrid checkpoint that plain transformers loads, and reading it back.

Everything but one thing is represented exactly: the compact mixers are expanded (x and B repeated for every
query head, as rows of in_proj and channels of the convolution), missing attention biases become zeros, and the
head becomes the speech rows of ``lm_head``, whose other rows are 0.

``lm_head`` has no bias in GraniteMoeHybrid, and no weights can stand in for one: what it is applied to has unit
mean square, so no feature of it is constant. The head's bias (CosyVoice 2 has one) and the restriction to speech
ids are therefore in ``generation_config.json``, as the ``sequence_bias`` of single tokens: the bias for speech
ids, -1e9 for all others. ``model.generate`` applies both. Who calls the model's ``forward`` gets the logits
without the head's bias, and 0 for ids that are not speech; who runs another engine passes the same numbers as
its logit bias. CosyVoice's repetition-aware sampling is no option of ``generate`` either. A layout without any
attention layer is exported with ``use_cache`` off, because transformers' cache cannot count its positions then.

Tensor letters: D model width, V unified vocabulary, S speech vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from mamtra_ray.artifacts import content_hash, file_hash, read_json, write_json, write_text
from mamtra_ray.errors import InputError
from mamtra_ray.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_tensors, write_tensors
from mamtra_ray.models.hybrid import HybridConfig, granite_config
from mamtra_ray.models.mamba import MixerConfig

SCHEMA_VERSION = 2
GENERATION_FILE = "generation_config.json"
SECTION = "mamtra_ray"
"""Key of ``config.json`` under which the compact model is described, for :func:`read_granite`."""

NEVER = -1e9
"""Logit bias of ids that must not be generated; JSON has no infinity."""


def write_granite(
    folder: Path,
    config: HybridConfig,
    tensors: Mapping[str, Tensor],
    vocabulary: Mapping[str, Any],
) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``generation_config.json``.

    Args:
        folder: made if missing.
        config: of the hybrid.
        tensors: the SpeechLM's state (``body.*``, ``head.*``).
        vocabulary: the fields of :class:`~mamtra_ray.teachers.base.Vocabulary`.
    """
    folder = Path(folder)
    expanded = {f"model.{name}": tensor for name, tensor in _expanded_body(config, tensors).items()}
    speech = slice(vocabulary["text_size"], vocabulary["text_size"] + vocabulary["speech_size"])
    head_SD, bias_S = tensors["head.weight"], tensors.get("head.bias")
    lm_head_VD = head_SD.new_zeros(config.vocab_size, config.hidden_size)
    lm_head_VD[speech] = head_SD
    write_tensors(folder / WEIGHTS_FILE, expanded | {"lm_head.weight": lm_head_VD})

    stop_ids = [speech.start + stop_id for stop_id in vocabulary["stop_ids"]]
    # transformers asks the cache for its length, which one of Mamba layers alone cannot tell (5.23: ValueError).
    use_cache = bool(config.layout.attention_layers)
    granite = granite_config(config, eos_token_id=stop_ids, pad_token_id=stop_ids[0], use_cache=use_cache)
    granite.architectures = ["GraniteMoeHybridForCausalLM"]
    granite.dtype = head_SD.dtype
    section = {
        "schema_version": SCHEMA_VERSION,
        "weights_sha256": file_hash(folder / WEIGHTS_FILE),
        # Not of the whole generation config, whose other settings are the user's to change.
        "head_bias": None if bias_S is None else content_hash(bias_S.tolist()),
        "model": config.to_dict(),
        "vocabulary": dict(vocabulary),
    }
    token_bias = dict.fromkeys([*range(speech.start), *range(speech.stop, config.vocab_size)], NEVER)
    if bias_S is not None:
        token_bias |= dict(enumerate(bias_S.tolist(), speech.start))
    generation = GenerationConfig(
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
        use_cache=use_cache,
        sequence_bias=[[[token], bias] for token, bias in sorted(token_bias.items())],
    )
    # Compact, because it is thousands of short lists.
    write_text(folder / GENERATION_FILE, json.dumps(generation.to_diff_dict(), allow_nan=False))
    # Last, because it names the hash of the weights.
    write_json(folder / CONFIG_FILE, json.loads(granite.to_json_string()) | {SECTION: section})


def read_granite(
    folder: Path, device: torch.device | str = "cpu"
) -> tuple[HybridConfig, dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint of :func:`write_granite` back into the compact form, bit for bit.

    Returns:
        The hybrid's config, the vocabulary's fields and the SpeechLM's tensors.

    Raises:
        InputError: files missing, truncated or damaged, not made by :func:`write_granite`, of two different exports,
            or with mixers trained in the expanded form, whose repeated rows have become different.
    """
    folder = Path(folder)
    content = read_json(folder / CONFIG_FILE)
    section = content.get(SECTION) if isinstance(content, dict) else None
    if not isinstance(section, dict) or section.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{folder / CONFIG_FILE} is no export of this project (no {SECTION!r} of version {SCHEMA_VERSION})"
        )
    granite = read_tensors(folder / WEIGHTS_FILE, device)
    if file_hash(folder / WEIGHTS_FILE) != section.get("weights_sha256"):
        raise InputError(f"{folder / WEIGHTS_FILE} is not the file {CONFIG_FILE} was written with (its hash differs)")
    try:
        config, vocabulary = HybridConfig.from_dict(section["model"]), dict(section["vocabulary"])
        speech = slice(vocabulary["text_size"], vocabulary["text_size"] + vocabulary["speech_size"])
        lm_head_VD, bias_hash = granite.pop("lm_head.weight"), section["head_bias"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG_FILE} is incomplete or altered: {error}") from None
    body = {name.removeprefix("model."): tensor for name, tensor in granite.items()}
    tensors = {f"body.{name}": tensor for name, tensor in _compact_body(config, body, folder).items()}
    tensors["head.weight"] = lm_head_VD[speech].clone()
    if bias_hash is not None:
        bias = _head_bias(folder, speech)
        if content_hash(bias) != bias_hash:
            raise InputError(f"{folder / GENERATION_FILE} has not the head's bias {CONFIG_FILE} was written with")
        tensors["head.bias"] = torch.tensor(bias, dtype=lm_head_VD.dtype, device=device)
    return config, vocabulary, tensors


def _head_bias(folder: Path, speech: slice) -> list[float]:
    """The bias of every speech id, from ``sequence_bias``."""
    content = read_json(folder / GENERATION_FILE)
    try:
        bias_by_token = {token: float(bias) for (token,), bias in content["sequence_bias"]}
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{folder / GENERATION_FILE} has no sequence_bias of single tokens") from None
    return [bias_by_token.get(token, 0.0) for token in range(speech.start, speech.stop)]


def _expanded_body(config: HybridConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    body = {name.removeprefix("body."): tensor for name, tensor in tensors.items() if name.startswith("body.")}
    expanded: dict[str, Tensor] = {}
    for name, tensor in body.items():
        layer, found, parameter = name.partition(".mamba.mixer.")
        if found:
            expanded[f"{layer}.mamba.{parameter}"] = _expand(config.mixer, parameter, tensor)
        else:
            expanded[name] = tensor
    for index in config.layout.attention_layers:
        # Granite has biases on all four projections or none.
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj") if config.qkv_bias or config.o_bias else ():
            name = f"layers.{index}.self_attn.{projection}"
            if f"{name}.bias" not in expanded:
                weight = expanded[f"{name}.weight"]
                expanded[f"{name}.bias"] = weight.new_zeros(weight.shape[0])
    for index in config.layout.mamba_layers if config.o_bias else ():
        # mamba_proj_bias switches the biases of both projections.
        in_proj = expanded[f"layers.{index}.mamba.in_proj.weight"]
        expanded[f"layers.{index}.mamba.in_proj.bias"] = in_proj.new_zeros(in_proj.shape[0])
    return expanded


def _compact_body(config: HybridConfig, body: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    compact: dict[str, Tensor] = {}
    for name, tensor in body.items():
        layer, found, parameter = name.partition(".mamba.")
        if not found:
            if not (name.endswith("self_attn.o_proj.bias") and not config.o_bias):
                compact[name] = tensor
        elif parameter != "in_proj.bias":
            smaller = _compact(config.mixer, parameter, tensor)
            if not torch.equal(_expand(config.mixer, parameter, smaller), tensor):
                raise InputError(f"{source}: {name} is not an expanded compact mixer (was it trained further?)")
            compact[f"{layer}.mamba.mixer.{parameter}"] = smaller
    return compact


def _row_blocks(config: MixerConfig, parameter: str) -> list[tuple[int, int, int]]:
    """How a parameter's rows expand: (groups, rows of a group, times each group is repeated), in row order."""
    groups, heads, width = config.num_kv_heads, config.num_heads, config.head_dim
    shared = (groups, width, heads // groups)
    own = (heads, width, 1)
    per_state = (config.num_states, 1, heads // config.num_states)
    if parameter == "in_proj.weight":
        return [own, shared, shared, own, per_state]
    if parameter.startswith("conv1d."):
        return [shared, shared, own]
    return [per_state] if parameter in ("dt_bias", "A_log") else []


def _expand(config: MixerConfig, parameter: str, tensor: Tensor) -> Tensor:
    """One compact parameter -> the expanded Granite mixer's (unchanged if it has no shared rows)."""
    blocks = _row_blocks(config, parameter)
    parts = tensor.split([groups * rows for groups, rows, _ in blocks]) if blocks else [tensor]
    expanded = [
        part.unflatten(0, (groups, rows)).repeat_interleave(repeats, 0).flatten(0, 1)
        for part, (groups, rows, repeats) in zip(parts, blocks, strict=False)
    ]
    return torch.cat(expanded) if blocks else tensor


def _compact(config: MixerConfig, parameter: str, tensor: Tensor) -> Tensor:
    """Inverse of :func:`_expand`: the first of each group's repeated copies."""
    blocks = _row_blocks(config, parameter)
    if not blocks:
        return tensor
    parts = tensor.split([groups * rows * repeats for groups, rows, repeats in blocks])
    return torch.cat(
        [
            part.unflatten(0, (groups, repeats, rows))[:, 0].flatten(0, 1)
            for part, (groups, rows, repeats) in zip(parts, blocks, strict=True)
        ]
    )
