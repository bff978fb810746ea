"""The voice to continue: an utterance of the corpus, a speaker of it, or a recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mamtra_ray.config import Config
from mamtra_ray.corpus.table import Utterance, read_corpus, utterances
from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.speech.voice import Voice


@dataclass(frozen=True)
class Prompt:
    """What stands before the text and its speech; empty for a model's own voice."""

    text_tokens: Sequence[int] = ()
    speech_tokens: Sequence[int] = ()
    voice: Voice | None = None
    """For codecs that separate voice and content."""


NO_PROMPT = Prompt()


def prompt_of_utterance(config: Config, utterance_id: str) -> Prompt:
    """The prompt of a row of the evaluation's corpus or of the corpus; of one without a prompt, the row itself.

    Raises:
        InputError: no such row, or one that was never spoken.
    """
    for path in dict.fromkeys([config.evaluate.corpus or config.corpus.path, config.corpus.path]):
        table = read_corpus(path)
        if len(rows := table.filter(pc.equal(table["utterance_id"], utterance_id))):
            return _prompt_of(utterances(rows.slice(0, 1))[0])
    raise InputError(f"no utterance is called {utterance_id!r} in {path or 'the demo corpus'}")


def prompt_of_speaker(config: Config, speaker: str) -> Prompt:
    """The first utterance of a speaker in the corpus.

    Raises:
        InputError: the corpus names no speakers, or others.
    """
    table: pa.Table = read_corpus(config.corpus.path)
    where = config.corpus.path or "the demo corpus"
    if "speaker" not in table.column_names:
        raise InputError(f"{where} names no speakers (it has no column speaker): --prompt takes an utterance's id")
    known = [name for name in pc.unique(table["speaker"]).to_pylist() if name]
    if speaker not in known:
        raise InputError(f"no speaker {speaker!r} in {where}: {nearest_name(speaker, known)[:200]}")
    spoken = pc.greater(pc.list_value_length(table["speech_tokens"]), 0)
    rows = table.filter(pc.and_(pc.equal(table["speaker"], speaker), spoken))
    if not len(rows):
        raise InputError(f"{where} has no speech of {speaker!r}")
    return _prompt_of(utterances(rows.slice(0, 1))[0])


def prompt_of_recording(config: Config, recording: Path, text: str, text_tokens: Sequence[int]) -> Prompt:
    """A recording and its transcript (``text``, tokenized); needs the package soundfile and a speech tokenizer.

    Raises:
        InputError: the file, a package or the tokenizer's weights are missing.
    """
    from mamtra_ray.speech.resampling import read_audio
    from mamtra_ray.speech.speech_tokenizers import speech_tokenizer_of_teacher

    source, codec = config.teacher, config.evaluate.codec
    path = Path(codec) if codec and source.kind != "cosyvoice2" else None
    if path is not None and (path / "flow.pt").is_file():
        path = path / "speech_tokenizer_v2.onnx"
    tokenizer = speech_tokenizer_of_teacher(source.kind, Path(source.path) if source.path else None, path)
    (tokens,) = tokenizer.encode([read_audio(recording, tokenizer.sample_rate)])
    if not len(tokens) or not text.strip():
        raise InputError(f"{recording} is too short, or its transcript is empty: a prompt needs both")
    return Prompt(list(text_tokens), tokens.tolist(), Voice(tokens, recording))


def _prompt_of(row: Utterance) -> Prompt:
    audio = Path(row.prompt_audio) if row.prompt_audio else None
    if row.prompt_speech_tokens is not None or audio is not None:
        text, speech = row.prompt_text_tokens, row.prompt_speech_tokens
    elif len(row.speech_tokens):
        text, speech = row.text_tokens, row.speech_tokens
    else:
        raise InputError(f"utterance {row.utterance_id!r} has neither a prompt nor speech of its own")
    tokens = np.zeros(0, np.int32) if speech is None else speech
    return Prompt([] if text is None else text.tolist(), tokens.tolist(), Voice(tokens, audio))
