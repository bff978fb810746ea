"""CosyVoice 2's way from speech tokens to sound: flow matching to a mel spectrogram, HiFT to samples.

The networks are the pure PyTorch ones in the package minicpmo-utils, with the user's ``flow.pt`` and ``hift.pt``;
the voice of a prompt is prepared as upstream's front end does (``cosyvoice/cli/frontend.py``).

Tensor letters: B batch (1), S tokens, T mel frames (two per token), M mel bands, F frequency bins.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mamtra_ray.errors import InputError
from mamtra_ray.speech.resampling import read_audio, resampled
from mamtra_ray.speech.voice import Voice

SAMPLE_RATE = 24_000
NUM_CODES = 6561
FRAMES_PER_TOKEN = 2
NUM_MELS, FFT_SIZE, HOP_SIZE, MEL_TOP = 80, 1920, 480, 8_000.0
_INSTALL = "pip install --no-deps minicpmo-utils && pip install 'mamtra-ray[cosyvoice]'"


@dataclass(frozen=True)
class CosyVoiceVocoder:
    """Flow and HiFT with the user's weights, and what they need of a voice."""

    flow: Any
    hift: Any
    speaker_encoder: Any
    """An onnxruntime session of ``campplus.onnx``, or None."""
    default_speaker: Tensor | None
    """Embedding (192,) of the first speaker in ``spk2info.pt``, for utterances without a prompt."""
    sample_rate: int = SAMPLE_RATE

    def decode(self, speech_tokens: Sequence[int] | np.ndarray, voice: Voice | None = None) -> np.ndarray:
        """Float32 waveform, 960 samples per token, the same for equal arguments (its noise is seeded).

        Raises:
            InputError: no token, one outside the codebook, or neither a prompt's recording nor a default speaker.
        """
        tokens = np.asarray(speech_tokens, np.int64)
        if not len(tokens) or tokens.min() < 0 or tokens.max() >= NUM_CODES:
            raise InputError(f"CosyVoice 2 decodes one or more tokens from 0 to {NUM_CODES - 1}")
        device = next(self.flow.parameters()).device
        prompt_S, prompt_1TM, speaker_1E = self._voice(voice)
        token_BS = torch.cat([prompt_S, torch.from_numpy(tokens)])[None].to(device)
        with torch.inference_mode(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            mel_BMT, _ = self.flow(
                token_BS,
                torch.tensor([token_BS.shape[1]], device=device),
                prompt_1TM.to(device),
                torch.tensor([prompt_1TM.shape[1]], device=device),
                speaker_1E.to(device),
                streaming=False,
                finalize=True,
            )
            waveform, _ = self.hift(speech_feat=mel_BMT[:, :, prompt_1TM.shape[1] :])
        return waveform.float().flatten().cpu().numpy()

    def _voice(self, voice: Voice | None) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt tokens (S,), their mel frames (1, 2 S, M) and the speaker's embedding (1, 192)."""
        nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 0, NUM_MELS)
        if voice is None or voice.audio is None:
            if self.default_speaker is None:
                raise InputError("CosyVoice 2 needs the recording of a prompt (prompt_audio), or a spk2info.pt")
            return *nothing, self.default_speaker[None]
        if self.speaker_encoder is None:
            raise InputError("CosyVoice 2 needs campplus.onnx and onnxruntime for a prompt's voice")
        sound = read_audio(voice.audio, SAMPLE_RATE)
        bands_TM = speaker_features(resampled(sound, SAMPLE_RATE, 16_000))
        name = self.speaker_encoder.get_inputs()[0].name
        embedding = self.speaker_encoder.run(None, {name: bands_TM[None].numpy()})[0]
        speaker_1E = torch.from_numpy(np.asarray(embedding, np.float32)).reshape(1, -1)
        if not len(voice.speech_tokens):
            return *nothing, speaker_1E
        mel_TM = prompt_mel(sound)
        # Upstream cuts both to exactly two frames per token.
        count = min(len(mel_TM) // FRAMES_PER_TOKEN, len(voice.speech_tokens))
        prompt_S = torch.from_numpy(np.asarray(voice.speech_tokens[:count], np.int64))
        return prompt_S, mel_TM[None, : FRAMES_PER_TOKEN * count], speaker_1E


def load_cosyvoice_vocoder(folder: Path) -> CosyVoiceVocoder:
    """Read ``flow.pt``, ``hift.pt`` and, if they are there, ``campplus.onnx`` and ``spk2info.pt``.

    Raises:
        InputError: a package or file is missing, or weights do not fit.
    """
    flow_class, hift_class = _network_classes()
    from mamtra_ray.runtime.device import device_of_this_process

    device = device_of_this_process().type
    flow, hift = flow_class(), hift_class()
    _load_weights(flow, folder / "flow.pt")
    # Training saves HiFT as part of a GAN.
    _load_weights(hift, folder / "hift.pt", remove="generator.")
    speakers = folder / "spk2info.pt"
    default_speaker = None
    if speakers.is_file():
        content = torch.load(speakers, map_location="cpu", weights_only=True)
        default_speaker = next(iter(content.values()))["embedding"].float().flatten() if content else None
    return CosyVoiceVocoder(
        flow.to(device).eval(), hift.to(device).eval(), _speaker_encoder(folder / "campplus.onnx"), default_speaker
    )


def prompt_mel(waveform: np.ndarray) -> Tensor:
    """Natural-log mel magnitudes (T, 80) of a 24 kHz waveform, 50 frames per second, as the flow was trained on."""
    padding = (FFT_SIZE - HOP_SIZE) // 2
    padded = torch.nn.functional.pad(torch.from_numpy(waveform)[None, None], (padding, padding), mode="reflect")[0, 0]
    window = torch.hann_window(FFT_SIZE)
    spectrum_FT = torch.stft(padded, FFT_SIZE, HOP_SIZE, FFT_SIZE, window, center=False, return_complex=True)
    magnitude_FT = (spectrum_FT.abs().square() + 1e-9).sqrt()
    return (magnitude_FT.T @ _mel_filters()).clamp_min(1e-5).log()


def speaker_features(waveform: np.ndarray) -> Tensor:
    """Kaldi's log mel filter banks (T, 80) of a 16 kHz waveform, mean-subtracted, as campplus takes them."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    filters = mel_filter_bank(257, NUM_MELS, 20.0, 8_000.0, 16_000, mel_scale="kaldi", triangularize_in_mel_space=True)
    bands_MT = spectrogram(
        np.asarray(waveform, np.float64),
        window_function(400, "povey", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=float(np.finfo(np.float32).eps),
        remove_dc_offset=True,
    )
    bands_TM = torch.from_numpy(bands_MT.T.astype(np.float32))
    return bands_TM - bands_TM.mean(0)


@cache
def _mel_filters() -> Tensor:
    """Slaney's mel filters with his area normalization (librosa's default), float32 (F, M)."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(FFT_SIZE // 2 + 1, NUM_MELS, 0.0, MEL_TOP, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()


def _network_classes() -> tuple[Any, Any]:
    """The flow and HiFT classes of minicpmo-utils."""
    spec = importlib.util.find_spec("stepaudio2")
    if spec is None or spec.submodule_search_locations is None:
        raise InputError(f"CosyVoice 2's sound needs the package minicpmo-utils, which is not installed: {_INSTALL}")
    if "stepaudio2" not in sys.modules:
        # Its __init__ imports an engine for CUDA only, with dependencies of its own; the networks need none of it.
        package = types.ModuleType("stepaudio2")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["stepaudio2"] = package
    try:
        from stepaudio2.flashcosyvoice.modules.flow import CausalMaskedDiffWithXvec
        from stepaudio2.flashcosyvoice.modules.hifigan import HiFTGenerator
    except ImportError as error:
        raise InputError(f"minicpmo-utils lacks a dependency ({error}): {_INSTALL}") from None
    return CausalMaskedDiffWithXvec, HiFTGenerator


def _load_weights(network: torch.nn.Module, path: Path, remove: str = "") -> None:
    if not path.is_file():
        raise InputError(f"{path} does not exist; CosyVoice 2's sound needs flow.pt and hift.pt")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({name.replace(remove, ""): tensor for name, tensor in tensors.items()}, strict=True)
    except Exception as error:  # pickle, zip and torch errors of many types
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is damaged or not CosyVoice 2's: {reason}") from None


def _speaker_encoder(path: Path) -> Any:
    if not path.is_file() or importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"{path} is damaged or no onnx file: {' '.join(str(error).split())[:200]}") from None
