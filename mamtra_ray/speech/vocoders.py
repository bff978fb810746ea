"""The decoders from speech tokens to sound, by kind of teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mamtra_ray.assets import PACKAGED
from mamtra_ray.errors import InputError
from mamtra_ray.speech.demo_codec import Codec, load_codec
from mamtra_ray.speech.demo_stream import decode_stream
from mamtra_ray.speech.recognizer import SAMPLE_RATE
from mamtra_ray.speech.voice import Vocoder, Voice


@dataclass(frozen=True)
class _DemoVocoder:
    codec: Codec
    sample_rate: int = SAMPLE_RATE

    def decode(self, speech_tokens: Sequence[int] | np.ndarray, voice: Voice | None = None) -> np.ndarray:
        return self.codec.decode(speech_tokens)

    def decode_stream(self, speech_tokens: Iterable[int], voice: Voice | None = None) -> Iterator[np.ndarray]:
        return decode_stream(self.codec, speech_tokens)


def vocoder_of_teacher(kind: str, teacher_path: Path | None, codec_path: Path | None = None) -> Vocoder:
    """The decoder of a teacher's speech tokens.

    Args:
        kind: ``teacher.kind``.
        teacher_path: the teacher's folder; CosyVoice 2's holds its flow and vocoder too.
        codec_path: ``evaluate.codec``: a folder in place of the default, needed where the teacher has none.

    Raises:
        InputError: no decoder is known for this kind, or its files or packages are missing.
    """
    if kind == "cosyvoice2" or (codec_path and (codec_path / "flow.pt").is_file()):
        from mamtra_ray.speech.cosyvoice_vocoder import load_cosyvoice_vocoder

        return load_cosyvoice_vocoder(codec_path or _required(teacher_path, kind))
    if kind == "llasa" or (codec_path and (codec_path / "config.json").is_file()):
        from mamtra_ray.speech.xcodec2_vocoder import load_xcodec2_vocoder

        return load_xcodec2_vocoder(_required(codec_path, kind))
    if kind in PACKAGED or codec_path:
        return _DemoVocoder(load_codec(codec_path))
    raise InputError(
        f"teacher {kind!r} does not say how its tokens sound: give evaluate.codec "
        "(a CosyVoice 2 folder, an Xcodec2 folder, or a demo codec file), or evaluate.sentences=0 for no WER"
    )


def _required(path: Path | None, kind: str) -> Path:
    if path is None:
        raise InputError(f"the WER of a {kind} model needs its codec: give evaluate.codec=FOLDER")
    return path
