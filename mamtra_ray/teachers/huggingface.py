"""Any Qwen2 or Llama causal language model over a unified vocabulary, as a teacher.

A folder with the usual ``config.json`` and safetensors weights, and ``speech_lm.json`` beside them, which says
what the ids mean::

    {"kind": "speech_lm_format", "schema_version": 1, "made_by": {...},
     "vocabulary": {"text_size": 70, "speech_size": 1025, "control_size": 2, "eos_id": 1024, "stop_ids": [1024]},
     "sequence": {"prefix": [1095], "separator": [1096]},
     "tokens_per_second": 25.0, "length_per_text_token": [2.0, 20.0], "max_length": null, "sampling": {}}

The embedding table may have more rows than the vocabulary has ids (padding to a round number), which are
dropped. The rows of ``lm_head`` for the speech ids become the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamtra_ray.artifacts import read_manifest, write_manifest
from mamtra_ray.errors import InputError
from mamtra_ray.models.checkpoint import read_sharded_tensors
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.models.pretrained import head_weight, read_decoder_config, split_checkpoint
from mamtra_ray.speech_lm.sequences import SequenceFormat, Vocabulary
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.teachers.teacher import Teacher

FORMAT_FILE = "speech_lm.json"
SCHEMA_VERSION = 1


def load(path: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Teacher:
    """Read a model folder and its ``speech_lm.json``.

    Raises:
        InputError: a file is missing, damaged, of another kind, or does not fit the others.
    """
    content = read_format(path)
    sequence = SequenceFormat(**content["sequence"], vocabulary=Vocabulary(**content["vocabulary"]))
    config, tied = read_decoder_config(path)
    model = speech_lm_from_checkpoint(config, sequence.vocabulary, read_sharded_tensors(path, device), tied, path)
    model = model.to(device, dtype)
    return Teacher(
        name=path.resolve().name,
        model=model,
        sequence=sequence,
        fingerprint=model.fingerprint(),
        tokens_per_second=content["tokens_per_second"],
        length_per_text_token=tuple(content["length_per_text_token"]),
        max_length=content["max_length"],
        sampling=content["sampling"],
    )


def speech_lm_from_checkpoint(
    config: DecoderConfig, vocabulary: Vocabulary, checkpoint: Mapping[str, Tensor], tied: bool, source: Path | str
) -> SpeechLM:
    """A SpeechLM of a Qwen2/Llama checkpoint whose embedding table is the unified one.

    Args:
        config: shape of the body; its ``vocab_size`` is that of the checkpoint.
        vocabulary: of the first ``vocabulary.size`` rows.
        checkpoint: tensors under Hugging Face's names.
        tied: the head is the embedding table (``tie_word_embeddings``).
        source: named in errors.

    Raises:
        InputError: a tensor is missing, misshapen, of a quantized type or without a place in the model.
    """
    if config.vocab_size < vocabulary.size:
        raise InputError(
            f"{source}: {config.vocab_size} embeddings are fewer than the vocabulary's {vocabulary.size} ids"
        )
    decoder, others = split_checkpoint(checkpoint, config, "model.", source)
    embedding_VD = decoder["embed_tokens.weight"]
    head_VD, bias_V = head_weight(others, embedding_VD, tied, source), others.pop("lm_head.bias", None)
    if others:
        raise InputError(f"{source} has a tensor that the model has no place for: {min(others)}")
    tensors = {f"body.{name}": tensor for name, tensor in decoder.items()}
    # Cloned, so that the rows do not keep the whole matrix alive.
    tensors["body.embed_tokens.weight"] = embedding_VD[: vocabulary.size].clone()
    speech_rows = slice(vocabulary.speech_offset, vocabulary.control_offset)
    tensors["head.weight"] = head_VD[speech_rows].clone()
    if bias_V is not None:
        tensors["head.bias"] = bias_V[speech_rows].clone()
    return SpeechLM.from_tensors(dataclasses.replace(config, vocab_size=vocabulary.size), vocabulary, tensors, source)


def read_format(folder: Path) -> dict[str, Any]:
    """The checked content of ``speech_lm.json``, optional keys filled in."""
    path = Path(folder) / FORMAT_FILE
    content = read_manifest(path, "speech_lm_format", SCHEMA_VERSION, by_hand=True)
    expected = {
        "vocabulary": {field.name for field in dataclasses.fields(Vocabulary)},
        "sequence": {"prefix", "separator"},
    }
    for section, keys in expected.items():
        found = content.get(section)
        if not isinstance(found, dict) or set(found) != keys:
            raise InputError(f"{path}: {section} must be an object with {', '.join(sorted(keys))}")
    if "tokens_per_second" not in content or len(content.get("length_per_text_token", ())) != 2:
        raise InputError(f"{path} must give tokens_per_second and length_per_text_token ([fewest, most])")
    return {"max_length": None, "sampling": {}} | content


def write_format(
    folder: Path,
    sequence: SequenceFormat,
    tokens_per_second: float,
    length_per_text_token: tuple[float, float],
    made_by: Mapping[str, Any],
    max_length: int | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write ``speech_lm.json`` beside a model, for :func:`load`."""
    write_manifest(
        Path(folder) / FORMAT_FILE,
        "speech_lm_format",
        SCHEMA_VERSION,
        made_by,
        vocabulary=dataclasses.asdict(sequence.vocabulary),
        sequence={"prefix": list(sequence.prefix), "separator": list(sequence.separator)},
        tokens_per_second=tokens_per_second,
        length_per_text_token=list(length_per_text_token),
        max_length=max_length,
        sampling=dict(sampling or {}),
    )
