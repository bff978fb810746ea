"""XCodec2, the codec of Llasa, through transformers: 50 tokens per second, 16 kHz."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mamtra_ray.errors import InputError
from mamtra_ray.speech.voice import Voice


@dataclass(frozen=True)
class Xcodec2Vocoder:
    """Both directions of the codec."""

    model: Any
    """A `transformers.Xcodec2Model` in evaluation mode."""

    @property
    def sample_rate(self) -> int:
        return self.model.config.sampling_rate

    @property
    def num_tokens(self) -> int:
        """Size of the codebook: the product of the quantizer's levels."""
        return int(np.prod(self.model.config.quantization_levels))

    def decode(self, speech_tokens: Sequence[int] | np.ndarray, voice: Voice | None = None) -> np.ndarray:
        """Float32 waveform, 320 samples per token. The tokens carry the voice; ``voice`` is not used."""
        import torch

        tokens = np.asarray(speech_tokens, np.int64)
        if not len(tokens) or tokens.min() < 0 or tokens.max() >= self.num_tokens:
            raise InputError(f"XCodec2 decodes one or more tokens from 0 to {self.num_tokens - 1}")
        codes_BQS = torch.from_numpy(tokens)[None, None].to(self.model.device)
        with torch.inference_mode():
            audio = self.model.decode(codes_BQS).audio_values
        return audio.float().flatten().cpu().numpy()

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """Speech tokens int32 (S,) of a float32 mono waveform; a last token that is not full is left out.

        What the codec is given, and how many tokens it gives, is as with transformers' Xcodec2FeatureExtractor.
        """
        import torch

        hop = self.model.config.hop_length
        # At least one sample of padding, as upstream.
        padded = np.pad(np.asarray(waveform, np.float32), (0, hop - len(waveform) % hop))
        features_1TF = _feature_extractor()(
            np.pad(padded, hop // 2), sampling_rate=self.sample_rate, return_tensors="pt"
        ).input_features
        with torch.inference_mode():
            codes_1QS = self.model.encode(
                input_values=torch.from_numpy(padded)[None, None].to(self.model.device, self.model.dtype),
                input_features=features_1TF.to(self.model.device, self.model.dtype),
            ).audio_codes
        return codes_1QS.flatten()[: (len(waveform) + 1) // hop].cpu().numpy().astype(np.int32)


@cache
def _feature_extractor() -> Any:
    """Features of w2v-BERT, XCodec2's semantic encoder (its own extractor in upstream's code).

    transformers' Xcodec2FeatureExtractor computes the same through torchaudio, which has no release for every torch.
    """
    from transformers import SeamlessM4TFeatureExtractor

    return SeamlessM4TFeatureExtractor()


def load_xcodec2_vocoder(path: Path) -> Xcodec2Vocoder:
    """Read a folder of transformers' Xcodec2 (``HKUSTAudio/xcodec2-hf``); on the GPU if there is one.

    Raises:
        InputError: no such folder, or its weights are not Xcodec2's.
    """
    from transformers import Xcodec2Model

    try:
        loaded: Any = Xcodec2Model.from_pretrained(path, local_files_only=True, output_loading_info=True)
        model, report = loaded
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no Xcodec2 folder of transformers: {reason}") from None
    if report["missing_keys"]:
        raise InputError(f"{path} is no whole Xcodec2 model: {sorted(report['missing_keys'])[0]} is missing")
    from mamtra_ray.runtime.device import device_of_this_process

    device = device_of_this_process().type
    return Xcodec2Vocoder(model.eval().to(device))
