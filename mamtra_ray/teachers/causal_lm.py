"""Any Llama or Qwen2 causal language model as a teacher of text: a Hugging Face folder, or a GGUF file.

All ids of its vocabulary are predicted, so all are "speech" ids to the classes that it shares with speech models, and
none is text: ``text_size`` is 0. A sequence is the id that begins a text, then a row of the corpus, see
:mod:`mamtra_ray.corpus.text`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mamtra_ray.artifacts import file_hash, read_json
from mamtra_ray.errors import InputError
from mamtra_ray.models.checkpoint import CONFIG_FILE, read_sharded_tensors
from mamtra_ray.models.gguf import read_gguf, read_gguf_tokens
from mamtra_ray.models.pretrained import read_decoder_config
from mamtra_ray.speech_lm.sequences import SequenceFormat, Vocabulary
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.teachers.huggingface import speech_lm_from_checkpoint
from mamtra_ray.teachers.teacher import Teacher

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""The first of them that a folder has says what its ids mean."""


@dataclass(frozen=True)
class TextTokens:
    """What a model's files say about its ids.

    Attributes:
        start: id that begins every sequence; the one that ends texts, for a model that has no other.
        ends: ids that end a text; the first one also stands between documents.
        tokenizer: that a corpus must name; None where the folder has no tokenizer.
    """

    start: int
    ends: tuple[int, ...]
    tokenizer: str | None


def load(path: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Teacher:
    """Read a folder (``config.json``, safetensors) or a ``.gguf`` file.

    Raises:
        InputError: a file is missing or damaged, of another architecture, or has an option or a tensor that our
            decoder has no place for.
    """
    tokens = text_tokens_of(path)
    if path.is_dir():
        config, tied = read_decoder_config(path)
        tensors = read_sharded_tensors(path, device)
    else:
        read = read_gguf(path)
        config, tied, tensors = read.config, read.tied, read.tensors
    if unknown := [token for token in (tokens.start, *tokens.ends) if token >= config.vocab_size]:
        raise InputError(f"{path}: bos_token_id or eos_token_id is {unknown[0]}, of {config.vocab_size} ids")
    vocabulary = Vocabulary(0, config.vocab_size, 0, eos_id=tokens.ends[0], stop_ids=tokens.ends)
    model: SpeechLM = speech_lm_from_checkpoint(config, vocabulary, tensors, tied, path).to(device, dtype)
    sequence = SequenceFormat(prefix=(tokens.start,), separator=(), vocabulary=vocabulary)
    resolved = path.resolve()
    return Teacher(
        name=resolved.name if resolved.is_dir() else resolved.stem,
        model=model,
        sequence=sequence,
        # Of the sequence too: the same weights may be a teacher of another kind.
        fingerprint=hashlib.sha256(f"{model.fingerprint()} {sequence}".encode()).hexdigest(),
        tokens_per_second=None,
        length_per_text_token=(0.0, 0.0),
        max_length=config.max_position_embeddings,
        tokenizer=tokens.tokenizer,
    )


def text_tokens_of(path: Path) -> TextTokens:
    """What the ids of a folder or GGUF file mean; weights are not read.

    Raises:
        InputError: the file is missing or damaged, or does not say which id ends a text.
    """
    if path.is_dir():
        content = read_json(path / CONFIG_FILE)
        bos, eos = (content.get(key) for key in ("bos_token_id", "eos_token_id"))
        names = [name for name in _TOKENIZER_FILES if (path / name).is_file()]
        tokenizer = f"{names[0]} {file_hash(path / names[0])[:16]}" if names else None
    else:
        read = read_gguf_tokens(path)
        bos, eos, tokenizer = read.bos_id, read.eos_id, f"gguf {read.tokenizer_hash[:16]}"
    starts, ends = _ids(path, "bos_token_id", bos), _ids(path, "eos_token_id", eos)
    if not ends:
        raise InputError(f"{path} does not say which id ends a text (eos_token_id)")
    return TextTokens((*starts, *ends)[0], ends, tokenizer)


def _ids(path: Path, key: str, value: Any) -> tuple[int, ...]:
    """An id, or a list of ids."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [one for one in ids if isinstance(one, bool) or not isinstance(one, int) or one < 0]:
        raise InputError(f"{path}: {key} = {wrong[0]!r} is no id")
    return tuple(ids)
