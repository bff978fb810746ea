"""Whisper with the user's own weights, through transformers or faster-whisper; no weights are downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.speech.language import ENGLISH
from mamtra_ray.speech.recognizer import SAMPLE_RATE, WHISPER_WINDOW_SECONDS, Recognizer, load_recognizer

DEMO_WINDOW_SECONDS = 15
"""Encoder window of the demo recognizer in evaluations, which hear hundreds of short sentences."""

_KINDS = ("demo", "whisper", "faster-whisper")


def recognizer_from_name(name: str, num_threads: int = 1, language: str = ENGLISH) -> Recognizer:
    """The recognizer behind ``evaluate.recognizer``.

    Args:
        name: ``demo``, ``whisper:FOLDER`` (transformers) or ``faster-whisper:FOLDER`` (CTranslate2).
        num_threads: CPU threads of one transcription.
        language: what is spoken, as Whisper abbreviates it.

    Raises:
        InputError: unknown name, missing folder, a package that is not installed, or a model that does not hear the
            language.
    """
    kind, separator, folder = name.partition(":")
    if kind not in _KINDS or (kind == "demo") == bool(separator):  # the demo takes no folder, the others need one
        raise InputError(
            f"evaluate.recognizer is demo, whisper:FOLDER or faster-whisper:FOLDER, not {name!r}"
            + ("" if kind in _KINDS else f": {nearest_name(kind, _KINDS)}")
        )
    if kind == "demo":
        _check_language(language, [ENGLISH], name)
        return load_recognizer(num_threads=num_threads, window_seconds=DEMO_WINDOW_SECONDS)
    path = Path(folder)
    if not folder or not path.is_dir():
        raise InputError(f"evaluate.recognizer: {folder or 'no folder'} given, which is no folder with Whisper weights")
    return _load_transformers(path, language) if kind == "whisper" else _load_ctranslate2(path, num_threads, language)


def _check_language(language: str, heard: Sequence[str], name: str) -> None:
    if language not in heard:
        known = ", ".join(heard[:12]) + (", ..." if len(heard) > 12 else "")
        raise InputError(
            f"evaluate.recognizer={name} does not hear the sentences' language {language!r} (it hears {known}): give a "
            "multilingual Whisper, or set evaluate.language"
        )


@dataclass(frozen=True)
class WhisperTransformers:
    """Whisper as Seed-TTS-eval runs it: transformers' generate, greedy, no temperature fallback."""

    name: str
    model: Any
    """A `transformers.WhisperForConditionalGeneration` in evaluation mode."""
    processor: Any
    """Its `transformers.WhisperProcessor`."""
    language: str = ENGLISH
    batch_size: int = 8

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        """Text of every waveform (float32, 16 kHz, mono)."""
        texts = [""] * len(waveforms)
        window = WHISPER_WINDOW_SECONDS * SAMPLE_RATE
        short = [index for index, waveform in enumerate(waveforms) if len(waveform) <= window]
        for first in range(0, len(short), self.batch_size):
            batch = short[first : first + self.batch_size]
            for index, text in zip(batch, self._transcribe([waveforms[index] for index in batch]), strict=True):
                texts[index] = text
        for index in set(range(len(waveforms))) - set(short):
            # A model that does not stop speaks for longer than a window; cutting there would hide its insertions.
            texts[index] = self._transcribe([waveforms[index]], truncation=False, padding="longest")[0]
        return texts

    def _transcribe(self, waveforms: list[np.ndarray], **long_form: Any) -> list[str]:
        import torch

        inputs = self.processor(
            waveforms, sampling_rate=SAMPLE_RATE, return_tensors="pt", return_attention_mask=True, **long_form
        ).to(self.model.device)
        inputs["input_features"] = inputs["input_features"].to(self.model.dtype)
        settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "return_timestamps": bool(long_form)}
        if getattr(self.model.generation_config, "is_multilingual", False):
            settings |= {"language": self.language, "task": "transcribe"}
        with torch.inference_mode():
            ids = self.model.generate(**inputs, **settings)
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


def _load_transformers(path: Path, language: str) -> WhisperTransformers:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from mamtra_ray.runtime.device import device_of_this_process

    device = device_of_this_process().type
    try:
        model = WhisperForConditionalGeneration.from_pretrained(
            path, local_files_only=True, dtype=torch.float16 if device == "cuda" else torch.float32
        )
        processor = WhisperProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no Hugging Face Whisper folder: {' '.join(str(error).split())}") from None
    settings = model.generation_config
    names = getattr(settings, "lang_to_id", None) or {}
    heard = sorted(name.strip("<|>") for name in names) if getattr(settings, "is_multilingual", False) else [ENGLISH]
    _check_language(language, heard, f"whisper:{path}")
    name = f"whisper {path.name}, transformers, greedy"
    return WhisperTransformers(name, model.eval().to(device), processor, language)


@dataclass(frozen=True)
class WhisperFaster:
    """Whisper through faster-whisper with beam 5, its default, and without temperature fallback."""

    name: str
    model: Any
    """A `faster_whisper.WhisperModel`."""
    language: str = ENGLISH

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        """Text of every waveform (float32, 16 kHz, mono)."""
        texts = []
        for waveform in waveforms:
            segments, _ = self.model.transcribe(
                np.asarray(waveform, np.float32),
                language=self.language,
                beam_size=5,
                temperature=0.0,
                condition_on_previous_text=False,
            )
            texts.append(" ".join(segment.text.strip() for segment in segments))
        return texts


def _load_ctranslate2(path: Path, num_threads: int, language: str) -> WhisperFaster:
    try:
        from faster_whisper import WhisperModel
    except ImportError:
        raise InputError(
            "evaluate.recognizer=faster-whisper needs the package faster-whisper, which is not installed: "
            "pip install 'mamtra-ray[demo]'"
        ) from None
    if not (path / "model.bin").is_file():
        parts = sorted(part.name for part in path.glob("model.bin.part*"))
        joining = f"; join its parts in this folder: cat {' '.join(parts)} > model.bin" if parts else ""
        raise InputError(f"{path} is no CTranslate2 Whisper folder: model.bin is missing{joining}")
    model = WhisperModel(str(path), device="auto", cpu_threads=num_threads, local_files_only=True)
    _check_language(language, model.supported_languages, f"faster-whisper:{path}")
    return WhisperFaster(f"whisper {path.name}, faster-whisper, beam 5", model, language)
