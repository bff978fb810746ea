"""Sound to the speech tokens of each kind of teacher."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mamtra_ray.assets import PACKAGED
from mamtra_ray.errors import InputError
from mamtra_ray.speech.recognizer import SAMPLE_RATE


class SpeechTokenizer(Protocol):
    """Anything that turns sound into speech tokens."""

    @property
    def sample_rate(self) -> int:
        """Samples per second of what :meth:`encode` takes."""
        ...

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Speech tokens int32 (S,) of each float32 mono waveform."""
        ...


def speech_tokenizer_of_teacher(kind: str, teacher_path: Path | None, path: Path | None = None) -> SpeechTokenizer:
    """The tokenizer whose codes a teacher speaks.

    Args:
        kind: ``teacher.kind``.
        teacher_path: the teacher's folder; CosyVoice 2's holds ``speech_tokenizer_v2.onnx``.
        path: the tokenizer itself: an ``.onnx`` file of CosyVoice 2, an Xcodec2 folder, or a demo codec.

    Raises:
        InputError: none is known for this kind, or its file or package is missing.
    """
    if kind in PACKAGED or (path and path.suffix == ".safetensors"):
        from mamtra_ray.speech.demo_codec import load_codec

        return DemoTokenizer(load_codec(path))
    if kind == "cosyvoice2" or (path and path.suffix == ".onnx"):
        if path is None and teacher_path is not None:
            path = teacher_path / "speech_tokenizer_v2.onnx"
        return load_s3_tokenizer(path)
    if path is None:
        raise InputError(f"a {kind} model's folder holds no speech tokenizer: give it with --speech-tokenizer")
    from mamtra_ray.speech.xcodec2_vocoder import load_xcodec2_vocoder

    return Xcodec2Tokenizer(load_xcodec2_vocoder(path))


@dataclass(frozen=True)
class DemoTokenizer:
    """The packaged demo codec."""

    codec: Any
    sample_rate: int = SAMPLE_RATE

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Speech tokens int32 (S,) of each waveform."""
        return [self.codec.encode(waveform) for waveform in waveforms]


@dataclass(frozen=True)
class Xcodec2Tokenizer:
    """Llasa's codec through transformers."""

    codec: Any

    @property
    def sample_rate(self) -> int:
        return self.codec.sample_rate

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Speech tokens int32 (S,) of each waveform, one at a time: padding would reach its semantic encoder."""
        return [self.codec.encode(waveform) for waveform in waveforms]


@dataclass(frozen=True)
class S3Tokenizer:
    """CosyVoice 2's speech tokenizer (25 tokens per second, 6,561 codes) in the package s3tokenizer."""

    package: Any
    model: Any
    device: str
    sample_rate: int = SAMPLE_RATE

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Speech tokens int32 (S,) of each waveform, as one padded and masked batch."""
        import torch

        sounds = [torch.from_numpy(np.asarray(waveform, np.float32)) for waveform in waveforms]
        mels = [self.package.log_mel_spectrogram(sound) for sound in sounds]
        mel_BMT, length_B = self.package.padding(mels)
        code_BS, code_length_B = self.model.quantize(mel_BMT.to(self.device), length_B.to(self.device))
        lengths = zip(code_BS.cpu().numpy(), code_length_B.tolist(), strict=True)
        return [codes[:length].astype(np.int32) for codes, length in lengths]


def load_s3_tokenizer(path: Path | None) -> S3Tokenizer:
    """Read the user's ``speech_tokenizer_v2.onnx``; on the GPU if there is one.

    Raises:
        InputError: the package or the file is missing, or the file is another tokenizer's.
    """

    if path is None or not path.is_file():
        raise InputError(f"{path or 'no file'} is no speech tokenizer: expected CosyVoice 2's speech_tokenizer_v2.onnx")
    s3tokenizer = _s3_package()
    # The class is named here: s3tokenizer.load_model guesses it from the file's name.
    model = s3tokenizer.S3TokenizerV2("speech_tokenizer_v2_25hz")
    try:
        model.init_from_onnx(str(path))
    except Exception as error:  # onnx, protobuf and torch errors of many types
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is damaged or no speech tokenizer of CosyVoice 2: {reason}") from None
    from mamtra_ray.runtime.device import device_of_this_process

    device = device_of_this_process().type
    return S3Tokenizer(s3tokenizer, model.eval().to(device), device)


def _s3_package() -> Any:
    """The module s3tokenizer, also where torchaudio is missing.

    It imports torchaudio for reading files only, which we do ourselves, and torchaudio has no release for every torch.
    """
    stand_in = importlib.util.find_spec("torchaudio") is None and "s3tokenizer" not in sys.modules
    if stand_in:
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    try:
        import s3tokenizer
    except ImportError as error:
        raise InputError(
            f"CosyVoice 2's speech tokens need the package s3tokenizer ({error.name} is not installed): "
            "pip install --no-deps s3tokenizer && pip install 'mamtra-ray[cosyvoice]'"
        ) from None
    finally:
        if stand_in:
            del sys.modules["torchaudio"]
    return s3tokenizer
