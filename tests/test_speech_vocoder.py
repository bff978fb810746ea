"""The codec file, its decoder and Griffin-Lim."""

import wave

import numpy as np
import pytest
import torch

from mamtra_ray.errors import InputError
from mamtra_ray.speech.demo_codec import Codec, DecoderConfig, TokenDecoder, griffin_lim, load_codec, write_wav
from mamtra_ray.speech.tokenizer import FRAMES_PER_TOKEN, NUM_MELS, SAMPLE_RATE, Tokenizer, log_mel


@pytest.fixture
def codec() -> Codec:
    torch.manual_seed(0)
    codebook_KD = torch.randn(12, FRAMES_PER_TOKEN * NUM_MELS).half().float()
    return Codec(Tokenizer(codebook_KD), TokenDecoder(DecoderConfig(16, 2, 3)).half().float().eval(), {"voice": "test"})


def test_untrained_decoder_gives_the_centroids(codec):
    tokens = [3, 1, 4, 1]
    expected = codec.tokenizer.codebook_KD[tokens].view(-1, NUM_MELS)
    assert torch.allclose(codec.decode_mel(tokens), expected)


def test_saved_codec_decodes_and_encodes_alike(codec, tmp_path):
    with torch.no_grad():
        codec.decoder.write.weight.normal_(std=0.1).copy_(codec.decoder.write.weight.half())
    codec.save(tmp_path / "codec.safetensors")
    loaded = load_codec(tmp_path / "codec.safetensors")
    assert loaded.made_by == {"voice": "test"}
    sound = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    assert np.array_equal(loaded.encode(sound), codec.encode(sound))
    tokens = [0, 11, 5, 5, 2]
    assert torch.equal(loaded.decode_mel(tokens), codec.decode_mel(tokens))
    assert np.array_equal(loaded.decode(tokens, iterations=2), loaded.decode(tokens, iterations=2))


def test_a_batch_is_its_utterances_and_silence_for_nothing(codec):
    sequences = [[1, 2, 3], [], [4] * 7]
    sounds = codec.decode_batch(sequences)
    assert np.array_equal(sounds[0], codec.decode([1, 2, 3]))
    assert len(sounds[2]) == 7 * 640 - 160
    assert not sounds[1].any()
    assert len(sounds[1]) > 0


def test_a_single_token_is_sound_too(codec):
    assert len(codec.decode([3])) == 640 - 160
    assert np.isfinite(codec.decode([3])).all()


@pytest.mark.parametrize("tokens", [[], [0, 12], [-1]])
def test_tokens_outside_the_codebook_are_refused(codec, tokens):
    with pytest.raises(InputError, match="from 0 to 11"):
        codec.decode(tokens)


def test_griffin_lim_gives_back_the_frames():
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    # A rising tone under a rising envelope: something that moves in time and frequency.
    sound = (0.3 * time * np.sin(2 * np.pi * (300 + 400 * time) * time)).astype(np.float32)
    mel_TM = log_mel(sound)
    rebuilt = griffin_lim(mel_TM)
    error = (log_mel(rebuilt)[: len(mel_TM)] - mel_TM).abs()
    loud = mel_TM > mel_TM.max() - 3
    assert len(rebuilt) == (len(mel_TM) - 1) * 160
    assert error[loud].mean() < 0.25


def test_missing_damaged_and_foreign_files_are_one_sentence(codec, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_codec(tmp_path / "nothing.safetensors")
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        load_codec(path)
    from safetensors.torch import save_file

    save_file({"codebook": torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match="no demo codec"):
        load_codec(path)


def test_wav_holds_the_samples(tmp_path):
    samples = np.array([0, 0.5, -1, 2], np.float32)
    write_wav(tmp_path / "a.wav", samples)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        found = np.frombuffer(file.readframes(4), "<i2")
    assert found.tolist() == [0, 16384, -32767, 32767]
