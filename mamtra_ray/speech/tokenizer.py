"""Sound to speech tokens: 25 per second from one codebook of log-mel patches.

A patch is four log-mel frames (40 ms); its token is the nearest codebook vector. The codebook is fitted
on one voice and one domain by k-means (`fit_codebook`) and does not carry over to other speech.

Dimension letters: T mel frames, F frequency bins, M mel bands, S speech tokens, K codebook entries,
D values of a patch (frames x bands).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 16_000
FFT_SIZE = 1024
WINDOW_SIZE = 640
HOP_SIZE = 160
NUM_MELS = 64
FRAMES_PER_TOKEN = 4
TOKENS_PER_SECOND = SAMPLE_RATE / HOP_SIZE / FRAMES_PER_TOKEN
LOG_FLOOR = 1e-2
"""Mel magnitudes below this are inaudible in the demo voice; without a floor the codebook would model them."""


@cache
def mel_filters() -> Tensor:
    """Triangular mel filters (Slaney's scale, unnormalized), float32 (F, M)."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(FFT_SIZE // 2 + 1, NUM_MELS, 40.0, 7_800.0, SAMPLE_RATE, mel_scale="slaney")
    return torch.from_numpy(filters).float()


@cache
def analysis_window() -> Tensor:
    """The Hann window of analysis and synthesis."""
    return torch.hann_window(WINDOW_SIZE)


def stft(waveform: Tensor) -> Tensor:
    """Complex spectrogram (F, T) of a waveform (samples,); frame t is centered on sample t x HOP_SIZE."""
    return torch.stft(waveform, FFT_SIZE, HOP_SIZE, WINDOW_SIZE, analysis_window(), return_complex=True)


def log_mel(waveform: np.ndarray | Tensor) -> Tensor:
    """Log-mel magnitudes float32 (T, M), natural logarithm, of a 16 kHz waveform (samples,)."""
    magnitude_FT = stft(torch.as_tensor(waveform, dtype=torch.float32)).abs()
    return (magnitude_FT.T @ mel_filters()).clamp_min(LOG_FLOOR).log()


def patches(mel_TM: Tensor, phase: int = 0) -> Tensor:
    """Cut log-mel frames into patches (S, D), starting at frame `phase`; a last incomplete one is dropped."""
    mel_TM = mel_TM[phase:]
    num_tokens = len(mel_TM) // FRAMES_PER_TOKEN
    return mel_TM[: num_tokens * FRAMES_PER_TOKEN].reshape(num_tokens, -1)


@dataclass(frozen=True)
class Tokenizer:
    """The codebook float32 (K, D) and the nearest-neighbor search in it."""

    codebook_KD: Tensor

    def encode(self, waveform: np.ndarray, phase: int = 0) -> np.ndarray:
        """Speech tokens int32 (S,) of a 16 kHz waveform.

        Args:
            waveform: float samples, mono.
            phase: start of the 40 ms grid in 10 ms steps, 0 to 3. The four phases of one utterance are four
                valid token sequences of the same speech.
        """
        return self.encode_mel(log_mel(waveform), phase)

    def encode_mel(self, mel_TM: Tensor, phase: int = 0) -> np.ndarray:
        """As `encode`, from log-mel frames."""
        return nearest(patches(mel_TM, phase), self.codebook_KD).numpy().astype(np.int32)


def nearest(patch_SD: Tensor, codebook_KD: Tensor) -> Tensor:
    """Index of the nearest codebook vector (squared Euclidean distance), int64 (S,)."""
    half_norm_K = codebook_KD.square().sum(1) / 2
    return torch.cat([(part @ codebook_KD.T - half_norm_K).argmax(1) for part in patch_SD.split(8192)])


def fit_codebook(patch_ND: Tensor, size: int, seed: int, iterations: int = 40) -> Tensor:
    """K-means codebook (K, D) by Lloyd's algorithm; entries that lose all their patches restart.

    Args:
        patch_ND: training patches, more than `size` of them.
        size: codebook entries K.
        seed: seed of the start (distinct random patches) and of restarts.
        iterations: passes over the patches.
    """
    generator = torch.Generator().manual_seed(seed)
    codebook_KD = patch_ND[torch.randperm(len(patch_ND), generator=generator)[:size]].clone()
    for _ in range(iterations):
        index_N = nearest(patch_ND, codebook_KD)
        count_K = torch.bincount(index_N, minlength=size)
        sum_KD = torch.zeros_like(codebook_KD).index_add_(0, index_N, patch_ND)
        codebook_KD = sum_KD / count_K.clamp_min(1)[:, None]
        empty = (count_K == 0).nonzero().flatten()
        if len(empty):
            codebook_KD[empty] = patch_ND[torch.randint(len(patch_ND), (len(empty),), generator=generator)]
    return codebook_KD
