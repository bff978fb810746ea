"""Log-mel frames, patches and the codebook against brute force."""

import numpy as np
import pytest
import torch

from mamtra_ray.speech.tokenizer import (
    FRAMES_PER_TOKEN,
    HOP_SIZE,
    NUM_MELS,
    SAMPLE_RATE,
    TOKENS_PER_SECOND,
    Tokenizer,
    fit_codebook,
    log_mel,
    mel_filters,
    nearest,
    patches,
)


def tone(frequency: float, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


@pytest.mark.parametrize("frequency", [250.0, 1000.0, 4000.0])
def test_a_tone_is_loudest_in_the_band_around_it(frequency):
    mel_TM = log_mel(tone(frequency))
    centre_M = mel_filters().argmax(0) * SAMPLE_RATE / 1024
    loudest = mel_TM[len(mel_TM) // 2].argmax()
    spacing = float((centre_M[1:] - centre_M[:-1])[max(0, int(loudest) - 1)]) + 16
    assert abs(float(centre_M[loudest]) - frequency) <= spacing


def test_twenty_five_tokens_a_second():
    codebook_KD = torch.randn(8, FRAMES_PER_TOKEN * NUM_MELS)
    tokens = Tokenizer(codebook_KD).encode(tone(440, seconds=4.0))
    assert TOKENS_PER_SECOND == 25
    assert abs(len(tokens) - 100) <= 1
    assert tokens.dtype == np.int32


def test_a_phase_is_the_same_sound_ten_milliseconds_later():
    sound = np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32) * 0.1
    tokenizer = Tokenizer(torch.randn(16, FRAMES_PER_TOKEN * NUM_MELS, generator=torch.Generator().manual_seed(0)))
    for phase in range(1, FRAMES_PER_TOKEN):
        later = tokenizer.encode(sound[phase * HOP_SIZE :])
        # The analysis window of the first frames sees the cut; after them the two are one sequence.
        assert np.array_equal(tokenizer.encode(sound, phase)[2:], later[2:])


def test_patches_are_consecutive_frames():
    mel_TM = torch.arange(11 * NUM_MELS).view(11, NUM_MELS)
    cut = patches(mel_TM, phase=2)
    assert cut.shape == (2, 4 * NUM_MELS)
    assert torch.equal(cut[1].view(4, NUM_MELS), mel_TM[6:10])


def test_nearest_is_the_smallest_distance():
    generator = torch.Generator().manual_seed(0)
    patch_SD, codebook_KD = torch.randn(50, 6, generator=generator), torch.randn(9, 6, generator=generator)
    assert torch.equal(nearest(patch_SD, codebook_KD), torch.cdist(patch_SD, codebook_KD).argmin(1))


def test_codebook_finds_separate_clusters_and_is_seeded():
    generator = torch.Generator().manual_seed(0)
    centre_KD = torch.randn(5, 8, generator=generator) * 10
    patch_ND = centre_KD.repeat(100, 1) + 0.1 * torch.randn(500, 8, generator=generator)
    fitted = [fit_codebook(patch_ND, 16, seed) for seed in (3, 3)]
    assert torch.equal(*fitted)
    error = (patch_ND - fitted[0][nearest(patch_ND, fitted[0])]).norm(dim=1)
    assert error.mean() < 0.5
