"""CosyVoice 2's sound: features of the prompt against their definitions, the networks with random weights."""

import importlib.util
import types

import numpy as np
import pytest
import soundfile
import torch
from kaldi_features import fbank

from mamtra_ray.errors import InputError
from mamtra_ray.speech import cosyvoice_vocoder
from mamtra_ray.speech.cosyvoice_vocoder import CosyVoiceVocoder, load_cosyvoice_vocoder, prompt_mel, speaker_features
from mamtra_ray.speech.vocoders import vocoder_of_teacher
from mamtra_ray.speech.voice import Voice


def noise(seconds, rate, seed=0):
    return 0.1 * np.random.default_rng(seed).normal(size=int(seconds * rate)).astype(np.float32)


def slaney(frequency):
    """Hz to Slaney's mel: linear to 1 kHz, then logarithmic (Auditory Toolbox)."""
    linear = frequency / (200 / 3)
    return np.where(frequency < 1000, linear, 15 + np.log(np.maximum(frequency, 1) / 1000) / (np.log(6.4) / 27))


def test_prompt_mel_equals_its_definition():
    """Frame by frame: reflected edges, Hann window, |DFT|, triangles of equal area on Slaney's scale, log."""
    waveform = noise(0.2, 24_000)
    found = prompt_mel(waveform).numpy()
    padded = np.pad(waveform.astype(np.float64), 720, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1920) / 1920)
    frames = np.stack([padded[start : start + 1920] * window for start in range(0, len(padded) - 1919, 480)])
    magnitude = np.sqrt(np.abs(np.fft.rfft(frames)) ** 2 + 1e-9)
    grid = np.linspace(0, 24_000, 2_000_001)
    edges = np.interp(np.linspace(0, slaney(np.array(8000.0)), 82), slaney(grid), grid)
    bins = np.arange(961) * 24_000 / 1920
    filters = np.zeros((961, 80))
    for band, (low, top, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        triangle = np.minimum((bins - low) / (top - low), (high - bins) / (high - top)).clip(0)
        filters[:, band] = triangle * 2 / (high - low)
    expected = np.log(np.maximum(magnitude @ filters, 1e-5))
    assert found.shape == (10, 80)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_speaker_features_equal_kaldi_definition():
    waveform = noise(0.1, 16_000)
    expected = fbank(waveform)
    np.testing.assert_allclose(speaker_features(waveform).numpy(), expected - expected.mean(0), atol=2e-3)


class _Flow(torch.nn.Module):
    """Stands for the flow: notes its arguments; its mel is the token's number."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, token, token_len, prompt_feat, prompt_feat_len, embedding, streaming, finalize):
        self.seen = (token, token_len, prompt_feat, prompt_feat_len, embedding)
        mel = token.repeat_interleave(2, 1)[:, None].float().expand(-1, 80, -1)
        return mel, token_len * 2


def hift(speech_feat):
    return speech_feat[:, 0].repeat_interleave(480, 1), None


def encoder(seen):
    def run(_, inputs):
        seen.append(inputs["x"])
        return [np.full((1, 192), 2.0, np.float32)]

    return types.SimpleNamespace(get_inputs=lambda: [types.SimpleNamespace(name="x")], run=run)


def test_prompt_is_cut_from_the_sound(tmp_path):
    soundfile.write(tmp_path / "prompt.wav", noise(0.5, 16_000), 16_000, subtype="FLOAT")
    seen = []
    vocoder = CosyVoiceVocoder(_Flow().eval(), hift, encoder(seen), None)
    # Half a second is 25 frames or 12 tokens, so the last three of 15 are dropped.
    sound = vocoder.decode([7, 8, 9], Voice(np.arange(15, dtype=np.int32), tmp_path / "prompt.wav"))
    token, token_len, prompt, prompt_len, speaker = vocoder.flow.seen
    assert token.tolist() == [[*range(12), 7, 8, 9]] and token_len.tolist() == [15]
    assert prompt.shape == (1, 24, 80) and prompt_len.tolist() == [24]
    assert speaker.shape == (1, 192) and speaker[0, 0] == 2 and seen[0].shape == (1, 48, 80)
    assert sound.tolist() == [7.0] * 960 + [8.0] * 960 + [9.0] * 960


def test_without_a_prompt_the_default_speaker_speaks(tmp_path):
    vocoder = CosyVoiceVocoder(_Flow().eval(), hift, None, torch.ones(192))
    assert len(vocoder.decode([1, 2])) == 2 * 960
    assert vocoder.flow.seen[2].shape == (1, 0, 80) and vocoder.flow.seen[4].tolist() == [[1.0] * 192]
    with pytest.raises(InputError, match="needs the recording of a prompt"):
        CosyVoiceVocoder(_Flow(), hift, None, None).decode([1])
    with pytest.raises(InputError, match=r"needs campplus\.onnx"):
        vocoder.decode([1], Voice(np.arange(3), tmp_path / "prompt.wav"))
    for wrong in ([], [6561], [-1]):
        with pytest.raises(InputError, match="from 0 to 6560"):
            vocoder.decode(wrong)


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr(cosyvoice_vocoder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps minicpmo-utils"):
        vocoder_of_teacher("cosyvoice2", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("stepaudio2") is None, reason="minicpmo-utils is not installed")
def test_real_networks_with_random_weights(tmp_path):
    """The released shapes (112.5 M and 20.8 M parameters) load from files of upstream's names and speak."""
    flow_class, hift_class = cosyvoice_vocoder._network_classes()
    torch.manual_seed(0)
    flow, generator = flow_class(), hift_class()
    assert sum(parameter.numel() for parameter in flow.parameters()) == 112_549_360
    assert sum(parameter.numel() for parameter in generator.parameters()) == 20_821_295
    torch.save(flow.state_dict(), tmp_path / "flow.pt")
    torch.save({f"generator.{name}": value for name, value in generator.state_dict().items()}, tmp_path / "hift.pt")
    torch.save({"someone": {"embedding": torch.randn(1, 192)}}, tmp_path / "spk2info.pt")
    vocoder = load_cosyvoice_vocoder(tmp_path)
    sound = vocoder.decode(range(12))
    assert sound.dtype == np.float32 and len(sound) == 12 * 960 and np.abs(sound).max() > 0
    np.testing.assert_array_equal(sound, vocoder.decode(range(12)))
    (tmp_path / "hift.pt").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"hift\.pt is damaged"):
        load_cosyvoice_vocoder(tmp_path)
