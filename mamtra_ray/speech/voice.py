"""What every decoder from speech tokens to sound is, and the voice that it continues."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Voice:
    """The prompt whose voice is continued, as codecs need it that separate voice and content."""

    speech_tokens: np.ndarray
    """int32 (S,), in the codec's vocabulary."""
    audio: Path | None = None
    """Recording of the prompt."""


class Vocoder(Protocol):
    """Anything that turns speech tokens into sound."""

    @property
    def sample_rate(self) -> int:
        """Samples per second of what :meth:`decode` returns."""
        ...

    def decode(self, speech_tokens: Sequence[int] | np.ndarray, voice: Voice | None = None) -> np.ndarray:
        """Float32 waveform (samples,) in [-1, 1] of one utterance's tokens; ``voice`` if it continues a prompt.

        Raises:
            InputError: no token, a token outside the codebook, or a needed prompt is missing.
        """
        ...


@runtime_checkable
class StreamingVocoder(Protocol):
    """A vocoder that need not wait for the end of an utterance."""

    def decode_stream(self, speech_tokens: Iterable[int], voice: Voice | None = None) -> Iterator[np.ndarray]:
        """Float32 waveforms of one utterance's tokens, each as soon as it is final; arguments as in ``decode``.

        Raises:
            InputError: as ``decode``.
        """
        ...
