"""Llasa: a Llama whose vocabulary goes on with 65,536 speech codes (``<|s_0|>`` ...), spoken by XCodec2.

Text and speech share one table already, so ids stay as they are. What ends an utterance,
``<|SPEECH_GENERATION_END|>``, stands among the text's special tokens; the unified vocabulary repeats its row behind
the codes, so that the head scores it too.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from mamtra_ray.errors import InputError
from mamtra_ray.models.checkpoint import read_sharded_tensors
from mamtra_ray.models.pretrained import read_decoder_config
from mamtra_ray.speech_lm.sequences import SequenceFormat, Vocabulary
from mamtra_ray.teachers.huggingface import speech_lm_from_checkpoint
from mamtra_ray.teachers.teacher import Teacher

TOKENS_PER_SECOND = 50.0
MAX_LENGTH = 2048
"""Text and speech together; the model was trained on windows of this length (LLaSA_training, issue 8)."""

INSTRUCTION = "Convert the text to speech:"
TEXT_START, TEXT_END = "<|TEXT_UNDERSTANDING_START|>", "<|TEXT_UNDERSTANDING_END|>"
SPEECH_START, SPEECH_END = "<|SPEECH_GENERATION_START|>", "<|SPEECH_GENERATION_END|>"
FIRST_CODE = "<|s_0|>"

# The model card samples with temperature 0.8 and top-p 1 through transformers' generate, whose top-k was 50 unless
# told otherwise when it was written.
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 1.0}

# Llama 3.2's chat template writes today's date into the prompt. A fixed one (the template's own fallback) keeps
# training sequences, caches and results the same from day to day.
_DATE = "26 Jul 2024"


def load(path: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Teacher:
    """Read a Llasa folder: config, safetensors (tied or not), tokenizer with its chat template.

    Raises:
        InputError: a file is missing or damaged, or the vocabulary is not Llasa's.
    """
    config, tied = read_decoder_config(path)
    tokenizer = load_tokenizer(path)
    first_code, end = _id_of(tokenizer, FIRST_CODE, path), _id_of(tokenizer, SPEECH_END, path)
    num_codes = config.vocab_size - first_code
    last_code = f"<|s_{num_codes - 1}|>"
    if _id_of(tokenizer, last_code, path) != config.vocab_size - 1 or not end < first_code:
        raise InputError(f"{path}: the speech codes are not the last {num_codes} of the {config.vocab_size} ids")
    vocabulary = Vocabulary(first_code, num_codes + 1, 0, eos_id=num_codes, stop_ids=(num_codes,))
    checkpoint = read_sharded_tensors(path, device)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in checkpoint:
            table = checkpoint[name]
            if len(table) != config.vocab_size:
                raise InputError(f"{path}: {name} has {len(table)} rows, the config {config.vocab_size} ids")
            checkpoint[name] = torch.cat([table, table[end : end + 1]])
    config = dataclasses.replace(config, vocab_size=vocabulary.size)
    model = speech_lm_from_checkpoint(config, vocabulary, checkpoint, tied, path).to(device, dtype)
    return Teacher(
        name=path.resolve().name,
        model=model,
        sequence=sequence_of(tokenizer, vocabulary, path),
        fingerprint=model.fingerprint(),
        tokens_per_second=TOKENS_PER_SECOND,
        # Upstream bounds the whole sequence only.
        length_per_text_token=(0.0, float(MAX_LENGTH)),
        max_length=MAX_LENGTH,
        sampling=SAMPLING,
    )


def load_tokenizer(path: Path) -> Any:
    """The folder's tokenizer; text for training and prompts goes through it without special tokens."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} has no tokenizer: {reason}") from None


def sequence_of(tokenizer: Any, vocabulary: Vocabulary, path: Path | str = "Llasa") -> SequenceFormat:
    """Llasa's chat: the user's instruction around the text, the assistant's turn begun with speech.

    The text stands between two special tokens, so it is tokenized the same with and without its surroundings.
    """
    chat = [
        {"role": "user", "content": f"{INSTRUCTION}{TEXT_START}{TEXT_END}"},
        {"role": "assistant", "content": SPEECH_START},
    ]
    ids = tokenizer.apply_chat_template(
        chat, tokenize=True, continue_final_message=True, return_dict=False, date_string=_DATE
    )
    end = _id_of(tokenizer, TEXT_END, path)
    if ids.count(end) != 1 or ids[-1] != _id_of(tokenizer, SPEECH_START, path):
        raise InputError(f"{path}: the chat template does not keep the text and the start of speech apart")
    return SequenceFormat(tuple(ids[: ids.index(end)]), tuple(ids[ids.index(end) :]), vocabulary)


def _id_of(tokenizer: Any, token: str, path: Path | str) -> int:
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        raise InputError(f"{path} is no Llasa model: its tokenizer has no {token}")
    return token_id
