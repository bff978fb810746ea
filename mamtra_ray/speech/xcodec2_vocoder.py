"""XCodec2, the codec of Llasa, through transformers: 50 tokens a second, 16 kHz."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mamtra_ray.errors import InputError
from mamtra_ray.speech.codecs import Voice


@dataclass(frozen=True)
class Xcodec2Vocoder:
    """Both directions of the codec."""

    model: Any
    """A `transformers.Xcodec2Model` in evaluation mode."""
    feature_extractor: Any = None
    """Its feature extractor; only encoding needs it."""

    @property
    def sample_rate(self) -> int:
        return self.model.config.sampling_rate

    @property
    def num_tokens(self) -> int:
        """Size of the codebook: the product of the quantiser's levels."""
        return int(np.prod(self.model.config.quantization_levels))

    def decode(self, speech_tokens: Sequence[int] | np.ndarray, voice: Voice | None = None) -> np.ndarray:
        """Float32 waveform, 320 samples a token. The tokens carry the voice; ``voice`` is not used."""
        import torch

        tokens = np.asarray(speech_tokens, np.int64)
        if not len(tokens) or tokens.min() < 0 or tokens.max() >= self.num_tokens:
            raise InputError(f"XCodec2 decodes one or more tokens from 0 to {self.num_tokens - 1}")
        codes_BQS = torch.from_numpy(tokens)[None, None].to(self.model.device)
        with torch.inference_mode():
            audio = self.model.decode(codes_BQS).audio_values
        return audio.float().flatten().cpu().numpy()

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """Speech tokens int32 (S,) of a float32 mono waveform.

        Raises:
            InputError: the folder has no feature extractor.
        """
        import torch

        if self.feature_extractor is None:
            raise InputError("this Xcodec2 folder has no preprocessor_config.json, which encoding needs")
        inputs = self.feature_extractor(waveform, sampling_rate=self.sample_rate, return_tensors="pt")
        with torch.inference_mode():
            encoded = self.model.encode(**inputs.to(self.model.device))
        codes_S = encoded.audio_codes.flatten()
        if encoded.audio_codes_mask is not None:
            codes_S = codes_S[encoded.audio_codes_mask.flatten().bool()]
        return codes_S.cpu().numpy().astype(np.int32)


def load_xcodec2_vocoder(path: Path) -> Xcodec2Vocoder:
    """Read a folder of transformers' Xcodec2 (``HKUSTAudio/xcodec2-hf``); on the GPU if there is one.

    Raises:
        InputError: no such folder, or its weights are not Xcodec2's.
    """
    import torch
    from transformers import AutoFeatureExtractor, Xcodec2Model

    try:
        loaded: Any = Xcodec2Model.from_pretrained(path, local_files_only=True, output_loading_info=True)
        model, report = loaded
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no Xcodec2 folder of transformers: {reason}") from None
    if report["missing_keys"]:
        raise InputError(f"{path} is no whole Xcodec2 model: {sorted(report['missing_keys'])[0]} is missing")
    extractor = None
    if (path / "preprocessor_config.json").is_file():
        extractor = AutoFeatureExtractor.from_pretrained(path, local_files_only=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Xcodec2Vocoder(model.eval().to(device), extractor)
