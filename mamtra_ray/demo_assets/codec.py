"""Second stage of the demo build: fit codebook and token decoder on the voice's training sentences."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mamtra_ray.speech.demo_codec import Codec, DecoderConfig, TokenDecoder
from mamtra_ray.speech.tokenizer import FRAMES_PER_TOKEN, Tokenizer, fit_codebook, log_mel, nearest, patches

NUM_PHASES = FRAMES_PER_TOKEN


@dataclass(frozen=True)
class CodecSettings:
    """What the codec depends on beside the sound."""

    codebook_size: int = 1024
    codebook_patches: int = 120_000
    codebook_iterations: int = 30
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    steps: int = 1_000
    batch_segments: int = 32
    segment_tokens: int = 48
    learning_rate: float = 2e-3
    seed: int = 0


def fit_codec(waveforms: Sequence[np.ndarray], settings: CodecSettings, made_by: dict[str, str]) -> Codec:
    """Fit the codebook by k-means and the decoder by L1 on log-mel frames, over all four phases.

    Args:
        waveforms: 16 kHz training sound.
        settings: sizes and training.
        made_by: what goes into the codec's description.

    Returns:
        The codec, rounded to half precision as it is stored, so that tokens made with it now equal
        tokens made with the file later.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    mels = [log_mel(waveform) for waveform in waveforms]
    codebook_KD = _fit_codebook(mels, settings, generator)
    decoder = _fit_decoder(mels, codebook_KD, settings, generator)
    return Codec(Tokenizer(codebook_KD), decoder.half().float().eval().requires_grad_(False), made_by)


def _fit_codebook(mels: Sequence[Tensor], settings: CodecSettings, generator: torch.Generator) -> Tensor:
    patch_ND = torch.cat([patches(mel, phase) for mel in mels for phase in range(NUM_PHASES)])
    chosen = torch.randperm(len(patch_ND), generator=generator)[: settings.codebook_patches]
    patch_ND = patch_ND[chosen]
    codebook_KD = fit_codebook(patch_ND, settings.codebook_size, settings.seed, settings.codebook_iterations)
    codebook_KD = codebook_KD.half().float()
    error = (patch_ND - codebook_KD[nearest(patch_ND, codebook_KD)]).abs().mean()
    print(f"codec: codebook of {len(codebook_KD)} on {len(patch_ND)} patches, L1 {error:.4f}", flush=True)
    return codebook_KD


def _fit_decoder(
    mels: Sequence[Tensor], codebook_KD: Tensor, settings: CodecSettings, generator: torch.Generator
) -> TokenDecoder:
    """AdamW with a cosine schedule; the average of the weights over the last steps is returned."""
    segment_frames = settings.segment_tokens * FRAMES_PER_TOKEN
    # Utterances follow each other as in one long recording; a segment may run over a seam, which is silence.
    mel_TM = torch.cat(list(mels))
    decoder = TokenDecoder(settings.decoder)
    averaged = copy.deepcopy(decoder)
    optimizer = torch.optim.AdamW(decoder.parameters(), settings.learning_rate, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.steps + 1, pct_start=0.1, cycle_momentum=False
    )
    started, running = time.monotonic(), 0.0
    for step in range(1, settings.steps + 1):
        start_B = torch.randint(len(mel_TM) - segment_frames, (settings.batch_segments,), generator=generator)
        target_BTM = torch.stack([mel_TM[start : start + segment_frames] for start in start_B.tolist()])
        patch_ND = target_BTM.reshape(-1, FRAMES_PER_TOKEN * target_BTM.shape[-1])
        quantised_ND = codebook_KD[nearest(patch_ND, codebook_KD)]
        decoded_BTM = decoder(quantised_ND.view(settings.batch_segments, settings.segment_tokens, -1))
        loss = (decoded_BTM - target_BTM).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += 0.02 * (loss.item() - running) if step > 1 else loss.item()
        with torch.no_grad():
            for average, value in zip(averaged.parameters(), decoder.parameters(), strict=True):
                average.lerp_(value, min(1.0, 10 / (step + 9)) if step < settings.steps // 2 else 0.01)
        if step % 100 == 0 or step == settings.steps:
            rest = (time.monotonic() - started) / step * (settings.steps - step)
            print(f"codec: step {step}/{settings.steps}, L1 {running:.4f}, about {rest / 60:.1f} min left", flush=True)
    return averaged
