"""Export to a GraniteMoeHybrid checkpoint that plain transformers loads, and reading it back.

Everything but one thing is represented exactly: the compact mixers are expanded (x and B repeated for every
query head, as rows of in_proj and channels of the convolution), missing attention biases become zeros, and the
head becomes the speech rows of ``lm_head``, whose other rows are 0 (or stays tied to the table, where it equals that).

``lm_head`` has no bias in GraniteMoeHybrid, and no weights can stand in for one: what it is applied to has unit
mean square, so no feature of it is constant. The head's bias (CosyVoice 2 has one) and the restriction to speech
ids are therefore in ``generation_config.json``, as the ``sequence_bias`` of single tokens: the bias for speech
ids, -1e9 for all others. ``model.generate`` applies both. The model's ``forward`` gives the logits without
the head's bias, and 0 for ids that are not speech; what another engine does about that is in docs/engines.md.
CosyVoice's repetition-aware sampling is no option of ``generate`` either. A layout without any
attention layer is exported with ``use_cache`` off, because transformers' cache cannot count its positions then.

Tensor letters: D model width, V unified vocabulary, S speech vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mamtra_ray.artifacts import (
    check_checksum,
    content_hash,
    file_hash,
    read_json,
    with_checksum,
    write_json,
    write_text,
)
from mamtra_ray.errors import InputError
from mamtra_ray.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_tensors, write_tensors
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.models.granite_mixer import compact_parameter, expanded_parameter

if TYPE_CHECKING:
    from transformers import GenerationConfig, GraniteMoeHybridConfig

SCHEMA_VERSION = 3
GENERATION_FILE = "generation_config.json"
SECTION = "mamtra_ray"
"""Key of ``config.json`` under which the compact model is described, for :func:`read_granite`."""

NEVER = -1e9
"""Logit bias of ids that must not be generated; JSON has no infinity."""

LAYER_TYPES = {"A": "attention", "M": "mamba"}
"""In ``config.json``. transformers from 5.13 on renames them to full_attention and linear_attention when it reads them;
older ones, and what other engines read the file with, know these only."""


def obstacle(config: DecoderConfig) -> str | None:
    """Why GraniteMoeHybrid cannot take hybrids of this shape, as a clause; None if it can."""
    if config.qk_norm:
        return "transformers' GraniteMoeHybrid has no norms of queries and keys, which this model's attention has"
    if (config.num_heads * config.head_dim) % config.hidden_size:
        return (
            f"{config.num_heads} heads of width {config.head_dim} do not make a multiple of the model width"
            f" {config.hidden_size}, and transformers' GraniteMoeHybrid has no such Mamba layers"
        )
    return None


def check_representable(config: DecoderConfig) -> None:
    """Refuse what GraniteMoeHybrid cannot take.

    Raises:
        InputError: says what, and what else can be written.
    """
    if problem := obstacle(config):
        raise InputError(f"{problem}: only this project's own form can be written (export --format native)")


def granite_config(
    config: DecoderConfig,
    eos_token_id: list[int] | None = None,
    pad_token_id: int | None = None,
    use_cache: bool = True,
    tied: bool = False,
) -> GraniteMoeHybridConfig:
    """The GraniteMoeHybrid configuration with the same function; its mixers are the expanded ones.

    x, B and C of every head are separate groups there (``mamba_n_groups`` = heads).
    """
    from transformers import GraniteMoeHybridConfig

    check_representable(config)
    return GraniteMoeHybridConfig(  # type: ignore[call-arg]  # head_dim, see below
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        # No field of this configuration, but read by its attention, as in all of transformers' decoders.
        head_dim=config.head_dim,
        layer_types=[LAYER_TYPES[letter] for letter in str(config.layout)],
        # No experts: each layer is its mixer and the shared MLP, as in a dense decoder.
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=config.intermediate_size,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=config.rms_norm_eps,
        attention_bias=config.qkv_bias or config.o_bias,
        attention_multiplier=config.head_dim**-0.5,
        position_embedding_type="rope",
        rope_parameters=dict(config.rope_parameters),
        max_position_embeddings=config.max_position_embeddings,
        mamba_n_heads=config.num_heads,
        mamba_n_groups=config.num_heads,
        mamba_d_state=config.head_dim,
        mamba_d_head=config.head_dim,
        mamba_expand=config.num_heads * config.head_dim // config.hidden_size,
        mamba_d_conv=config.conv_kernel,
        mamba_chunk_size=config.chunk_size,
        mamba_conv_bias=True,
        mamba_proj_bias=config.o_bias,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        use_cache=use_cache,
    )


def write_granite(
    folder: Path,
    config: DecoderConfig,
    tensors: Mapping[str, Tensor],
    vocabulary: Mapping[str, Any],
) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``generation_config.json``.

    Args:
        folder: made if missing.
        config: of the hybrid.
        tensors: the SpeechLM's state (``body.*``, ``head.*``).
        vocabulary: the fields of :class:`~mamtra_ray.speech_lm.speech_lm.Vocabulary`.
    """
    folder = Path(folder)
    expanded = {f"model.{name}": tensor for name, tensor in _expanded_body(config, tensors).items()}
    head_VD = expanded_head(config, tensors, vocabulary)
    if head_VD is not None:
        expanded["lm_head.weight"] = head_VD
    write_tensors(folder / WEIGHTS_FILE, expanded)

    generation = write_generation_config(folder, config, tensors, vocabulary)
    granite = granite_config(
        config,
        eos_token_id=generation.eos_token_id,
        pad_token_id=generation.pad_token_id,
        use_cache=generation.use_cache,
        tied=head_VD is None,
    )
    granite.architectures = ["GraniteMoeHybridForCausalLM"]
    granite.dtype = tensors["head.weight"].dtype
    bias_S = tensors.get("head.bias")
    section = {
        "schema_version": SCHEMA_VERSION,
        "weights_sha256": file_hash(folder / WEIGHTS_FILE),
        # Not of the whole generation config, whose other settings are the user's to change.
        "head_bias": None if bias_S is None else content_hash(bias_S.tolist()),
        "model": config.to_dict(),
        "vocabulary": dict(vocabulary),
    }
    # Last, because it names the hash of the weights.
    content = json.loads(granite.to_json_string()) | _older_names(config)
    write_json(folder / CONFIG_FILE, content | {SECTION: with_checksum(section)})


def write_generation_config(
    folder: Path, config: DecoderConfig, tensors: Mapping[str, Tensor], vocabulary: Mapping[str, Any]
) -> GenerationConfig:
    """Write ``generation_config.json``: stop ids, and what is added to every id's logit; arguments as above."""
    from transformers import GenerationConfig

    speech, bias_S = _speech_ids(vocabulary), tensors.get("head.bias")
    stop_ids = [speech.start + stop_id for stop_id in vocabulary["stop_ids"]]
    token_bias = dict.fromkeys([*range(speech.start), *range(speech.stop, config.vocab_size)], NEVER)
    if bias_S is not None:
        token_bias |= dict(enumerate(bias_S.tolist(), speech.start))
    generation = GenerationConfig(
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
        # transformers asks the cache for its length, which one of Mamba layers alone cannot tell (5.23: ValueError).
        use_cache=bool(config.layout.attention_layers),
        # None where all ids may be said, as in a model of text: an empty list is refused.
        sequence_bias=[[[token], bias] for token, bias in sorted(token_bias.items())] or None,
    )
    # Compact, because it is thousands of short lists.
    write_text(folder / GENERATION_FILE, json.dumps(generation.to_diff_dict(), allow_nan=False))
    return generation


def expanded_head(config: DecoderConfig, tensors: Mapping[str, Tensor], vocabulary: Mapping[str, Any]) -> Tensor | None:
    """The head (V, D) of all ids, zeros for those that are not speech; None where it is the embedding table.

    It is that in a model of text alone.
    """
    head_SD = tensors["head.weight"]
    if torch.equal(head_SD, tensors["body.embed_tokens.weight"]):
        return None
    head_VD = head_SD.new_zeros(config.vocab_size, config.hidden_size)
    head_VD[_speech_ids(vocabulary)] = head_SD
    return head_VD


def _speech_ids(vocabulary: Mapping[str, Any]) -> slice:
    return slice(vocabulary["text_size"], vocabulary["text_size"] + vocabulary["speech_size"])


def read_granite(
    folder: Path, device: torch.device | str = "cpu"
) -> tuple[DecoderConfig, dict[str, Any], dict[str, Tensor]]:
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
    check_checksum(section, f"{folder / CONFIG_FILE}, {SECTION},")
    granite = read_tensors(folder / WEIGHTS_FILE, device)
    if file_hash(folder / WEIGHTS_FILE) != section.get("weights_sha256"):
        raise InputError(f"{folder / WEIGHTS_FILE} is not the file {CONFIG_FILE} was written with (its hash differs)")
    try:
        config, vocabulary = DecoderConfig.from_dict(section["model"]), dict(section["vocabulary"])
        speech = _speech_ids(vocabulary)
        tied, bias_hash = content.get("tie_word_embeddings"), section["head_bias"]
        lm_head_VD = granite["model.embed_tokens.weight"] if tied else granite.pop("lm_head.weight")
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


def _older_names(config: DecoderConfig) -> dict[str, Any]:
    """Keys of ``config.json`` that readers older than transformers 5 look for; newer ones read both forms alike."""
    rope = dict(config.rope_parameters)
    older: dict[str, Any] = {
        "layer_types": [LAYER_TYPES[letter] for letter in str(config.layout)],
        "rope_theta": rope.pop("rope_theta"),
    }
    return older if rope["rope_type"] == "default" else older | {"rope_scaling": rope}


def _head_bias(folder: Path, speech: slice) -> list[float]:
    """The bias of every speech id, from ``sequence_bias``."""
    content = read_json(folder / GENERATION_FILE)
    try:
        bias_by_token = {token: float(bias) for (token,), bias in content["sequence_bias"]}
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{folder / GENERATION_FILE} has no sequence_bias of single tokens") from None
    return [bias_by_token.get(token, 0.0) for token in range(speech.start, speech.stop)]


def _expanded_body(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our decoder's tensors (``body.*``) -> those of GraniteMoeHybrid below ``model.``."""
    body = {name.removeprefix("body."): tensor for name, tensor in tensors.items() if name.startswith("body.")}
    expanded: dict[str, Tensor] = {}
    for name, tensor in body.items():
        if ".mamba." in name:
            expanded[name] = expanded_parameter(config.mixer, name.partition(".mamba.")[2], tensor)
        elif name.endswith("mlp.gate_proj.weight"):
            up = body[name.replace("gate_proj", "up_proj")]
            expanded[name.replace("mlp.gate_proj", "shared_mlp.input_linear")] = torch.cat([tensor, up])
        elif name.endswith("mlp.down_proj.weight"):
            expanded[name.replace("mlp.down_proj", "shared_mlp.output_linear")] = tensor
        elif not name.endswith("mlp.up_proj.weight"):  # it went with the gate
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


def _compact_body(config: DecoderConfig, body: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Inverse of :func:`_expanded_body`."""
    compact: dict[str, Tensor] = {}
    for name, tensor in body.items():
        parameter = name.partition(".mamba.")[2]
        if name.endswith(".shared_mlp.input_linear.weight"):
            mlp = name.removesuffix("shared_mlp.input_linear.weight") + "mlp."
            gate, up = tensor.chunk(2)
            compact |= {f"{mlp}gate_proj.weight": gate.clone(), f"{mlp}up_proj.weight": up.clone()}
        elif name.endswith(".shared_mlp.output_linear.weight"):
            compact[name.replace("shared_mlp.output_linear", "mlp.down_proj")] = tensor
        elif not parameter:
            if not (name.endswith("self_attn.o_proj.bias") and not config.o_bias):
                compact[name] = tensor
        elif parameter != "in_proj.bias":
            smaller = compact_parameter(config.mixer, parameter, tensor)
            if not torch.equal(expanded_parameter(config.mixer, parameter, smaller), tensor):
                raise InputError(f"{source}: {name} is not an expanded compact mixer (was it trained further?)")
            compact[name] = smaller
    return compact
