"""Corpora: every source's layout, every way a recording can be bad, and stopped runs that go on."""

import io
import json
import os
import signal
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from mamtra_ray.artifacts import read_json
from mamtra_ray.config import load_config
from mamtra_ray.corpus import preparation as prepare
from mamtra_ray.corpus.__main__ import main
from mamtra_ray.corpus.preparation import prepare_corpus
from mamtra_ray.corpus.sources import Recording, cosyvoice_shards, length_stress, libritts, seed_tts_eval
from mamtra_ray.corpus.table import read_corpus
from mamtra_ray.corpus.tokenization_worker import TokenizationWorker, Tokenizers, _Shard
from mamtra_ray.errors import InputError
from mamtra_ray.runtime.cluster import Cluster
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.speech import speech_tokenizers
from mamtra_ray.speech import tokenizer as tk
from mamtra_ray.speech.demo_codec import Codec, DecoderConfig, TokenDecoder, load_codec
from mamtra_ray.teachers.demo_grammar import tokenize_text

RATE = 16_000


def sound(seed, seconds=1.0, rate=RATE):
    return 0.1 * np.random.default_rng(seed).normal(size=int(rate * seconds)).astype(np.float32)


def write_utterance(root, utterance_id, text, subset="train-clean-100", waveform=None, rate=RATE):
    speaker, chapter = utterance_id.split("_")[:2]
    folder = root / subset / speaker / chapter
    folder.mkdir(parents=True, exist_ok=True)
    waveform = sound(zlib.crc32(utterance_id.encode())) if waveform is None else waveform
    soundfile.write(folder / f"{utterance_id}.wav", waveform, rate, subtype="FLOAT")
    if text is not None:
        (folder / f"{utterance_id}.normalized.txt").write_text(text)
    return folder / f"{utterance_id}.wav"


@pytest.fixture
def codec_path(tmp_path):
    torch.manual_seed(0)
    codebook = torch.randn(16, tk.FRAMES_PER_TOKEN * tk.NUM_MELS)
    Codec(tk.Tokenizer(codebook), TokenDecoder(DecoderConfig(8, 1)), {"made": "by a test"}).save(
        tmp_path / "c.safetensors"
    )
    return tmp_path / "c.safetensors"


@pytest.fixture
def libritts_root(tmp_path):
    """Four good utterances in two splits, and one of every way to be bad."""
    root = tmp_path / "LibriTTS"
    write_utterance(root, "1_1_0_0", "open the window\n")
    write_utterance(root, "1_1_0_1", "find the camera today", waveform=sound(7, 0.7, 24_000), rate=24_000)
    write_utterance(root, "2_1_0_0", "paint the guitar", waveform=np.stack([sound(8), sound(9)], 1))
    write_utterance(root, "3_1_0_0", "bring the letter", "dev-clean")
    write_utterance(root, "4_1_0_0", None)
    write_utterance(root, "4_1_0_1", "  \n")
    write_utterance(root, "4_1_0_2", "open the unheard-of contraption")
    write_utterance(root, "4_1_0_3", "open the window", waveform=np.zeros(RATE))
    write_utterance(root, "4_1_0_4", "open the window", waveform=sound(1, 0.1))
    write_utterance(root, "4_1_0_5", "open the window", waveform=sound(1, 31))
    write_utterance(root, "4_1_0_6", "open the window").write_bytes(b"RIFF and then nothing")
    write_utterance(root, "4_1_0_7", "open the window", waveform=np.full(RATE, np.nan))
    write_utterance(root, "4_1_0_8", "open the window", waveform=np.zeros(0))
    write_utterance(root, "4_1_0_9", "open the window").unlink()
    return root


def run(root, output, codec_path, **options):
    recordings, skipped = libritts(root)
    return prepare_corpus(
        load_config().teacher,
        recordings,
        skipped,
        output,
        made_by={"source": "libritts"},
        speech_tokenizer=codec_path,
        worker=WorkerResources(),
        **options,
    )


def test_libritts_with_bad_recordings(libritts_root, codec_path, tmp_path, ray_cluster):
    progress = []
    output = tmp_path / "corpus"
    report = run(
        libritts_root, output, codec_path, utterances_per_part=5, on_progress=lambda *counts: progress.append(counts)
    )
    assert progress[0] == (0, 11) and progress[-1] == (11, 11)
    assert report["utterances"] == 4 and report["splits"] == {"train": 3, "validation": 1} and report["skipped"] == 10
    reasons = {one["utterance_id"]: one["reason"] for one in read_json(output / "report.json")["skipped_utterances"]}
    expected = ["transcript is missing", "text is empty", "does not know the word", "silence", "0.1 s of audio"]
    expected += ["31.0 s of audio", "damaged or no audio", "no numbers", "is empty", "recording is missing"]
    for number, reason in enumerate(expected):
        assert reason in reasons[f"4_1_0_{number}"], number

    rows = {row["utterance_id"]: row for row in read_corpus(output).to_pylist()}
    assert set(rows) == {"1_1_0_0", "1_1_0_1", "2_1_0_0", "3_1_0_0"}
    assert rows["1_1_0_0"]["text"] == "open the window" and rows["1_1_0_0"]["speaker"] == "1"
    assert rows["1_1_0_0"]["text_tokens"] == tokenize_text("open the window")
    codec = load_codec(codec_path)
    waveform, _ = soundfile.read(libritts_root / "train-clean-100/1/1/1_1_0_0.wav", dtype="float32")
    assert rows["1_1_0_0"]["speech_tokens"] == codec.encode(waveform).tolist()
    stereo, _ = soundfile.read(libritts_root / "train-clean-100/2/1/2_1_0_0.wav", dtype="float32")
    assert rows["2_1_0_0"]["speech_tokens"] == codec.encode(stereo.mean(1)).tolist()
    assert len(rows["1_1_0_1"]["speech_tokens"]) == pytest.approx(0.7 * 25, abs=1)

    # A stopped run: one part is missing, the others are kept as they are.
    parts = sorted(output.glob("part-*.parquet"))
    kept = [part.stat().st_mtime_ns for part in parts]
    before = read_corpus(output)
    (output / "part-00000.json").unlink()
    (output / "report.json").unlink()
    with pytest.raises(InputError, match=r"is not finished: give its python -m mamtra_ray\.corpus command again"):
        read_corpus(output)
    progress.clear()
    again = run(
        libritts_root, output, codec_path, utterances_per_part=5, on_progress=lambda *counts: progress.append(counts)
    )
    assert progress == [(6, 11), (11, 11)] and again == report
    assert read_corpus(output).equals(before)
    assert [part.stat().st_mtime_ns for part in parts][1:] == kept[1:]

    # Other recordings or another tokenizer are another corpus.
    with pytest.raises(InputError, match="made with another speech tokenizer"):
        run(libritts_root, output, None, utterances_per_part=5)
    (output / "part-00009.parquet").touch()
    with pytest.raises(InputError, match=r"part-00009\.parquet, which is not of this corpus"):
        run(libritts_root, output, codec_path, utterances_per_part=5)


def test_missing_tokenizer_is_one_sentence(libritts_root, tmp_path, ray_cluster):
    with pytest.raises(InputError, match=r"nowhere\.safetensors"):
        run(libritts_root, tmp_path / "corpus", tmp_path / "nowhere.safetensors")


def test_libritts_folders(libritts_root, tmp_path):
    recordings, _ = libritts(libritts_root, subsets=["dev-clean"])
    assert [(one.utterance_id, one.split) for one in recordings] == [("3_1_0_0", "validation")]
    assert libritts(libritts_root / "dev-clean")[0] == recordings
    with pytest.raises(InputError, match=r"no subset test-clean \(it has dev-clean, train-clean-100\)"):
        libritts(libritts_root, subsets=["test-clean"])
    with pytest.raises(InputError, match="no folder"):
        libritts(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no <subset>"):
        libritts(tmp_path)


def test_length_stress_pairs_lengths_with_prompts_of_the_speaker(tmp_path):
    for speaker in (1, 2, 3):
        for words in (1, 2, 2, 2, 15, 62, 63):
            number = len(list(tmp_path.rglob(f"{speaker}_*.wav")))
            text = " ".join(["word"] * words)
            write_utterance(tmp_path, f"{speaker}_1_0_{number}", text, "test-clean", sound(number, 0.01))
    write_utterance(tmp_path, "9_1_0_0", "alone here now", "test-clean")
    recordings, skipped = length_stress(tmp_path, per_length=2)
    lengths = [len(one.text.split()) for one in recordings]
    assert lengths == [1, 1, 2, 2, 15, 15, 62, 62]
    for one in recordings:
        assert one.prompt_audio != one.audio and one.split == "test"
        assert f"/{one.speaker}/1/{one.speaker}_1_0_" in one.prompt_audio
        assert len(one.prompt_text.split()) == (15 if len(one.text.split()) != 15 else 2)
    lacking = [f"length {words}" for words in range(1, 63) if words not in (1, 2, 3, 15, 62)]
    assert sorted(one.utterance_id for one in skipped) == sorted([*lacking, "9_1_0_0"])
    assert length_stress(tmp_path, per_length=2) == (recordings, skipped)
    with pytest.raises(InputError, match="no folder"):
        length_stress(tmp_path / "nowhere")


def test_seed_tts_eval_lines(tmp_path):
    (tmp_path / "wavs").mkdir()
    (tmp_path / "wavs" / "there.wav").write_bytes(b"")
    (tmp_path / "meta.lst").write_text(
        "\ufeffthere|What it says.|prompt-wavs/a.wav|Say this.\n"
        "gone|What it says.|prompt-wavs/a.wav|Say that.\n"
        " five | What it says. | prompt-wavs/a.wav | Say more. | other/five.wav\n"
        "three.wav | Say three.|\t/abs/b.wav \n"
        "two|Say\u2028two.\r\n"
        "\n"
        "just one field\n"
        "empty|What it says.|prompt-wavs/a.wav|\n"
        "a|b|c|d|e|f\n"
    )
    recordings, skipped = seed_tts_eval(tmp_path / "meta.lst")
    assert seed_tts_eval(tmp_path) == (recordings, skipped)
    found = {one.utterance_id: (one.text, one.prompt_text, one.prompt_audio, one.audio) for one in recordings}
    prompt = ("What it says.", str(tmp_path / "prompt-wavs/a.wav"))
    assert found == {
        "there": ("Say this.", *prompt, str(tmp_path / "wavs/there.wav")),
        "gone": ("Say that.", *prompt, None),
        "five": ("Say more.", *prompt, str(tmp_path / "other/five.wav")),
        "three": ("Say three.", None, "/abs/b.wav", None),
        "two": ("Say\u2028two.", None, None, None),
    }
    assert {one.split for one in recordings} == {"test"}
    assert [one.utterance_id for one in skipped] == ["line 7", "empty", "line 9"]
    with pytest.raises(InputError, match="cannot be read"):
        seed_tts_eval(tmp_path / "other.lst")


@pytest.fixture
def worker(codec_path):
    worker = TokenizationWorker(Tokenizers("demo", None, codec_path))
    worker._load()
    return worker


def test_prompts_become_tokens(worker, tmp_path):
    prompt = write_utterance(tmp_path, "1_1_0_0", None)
    said = {"utterance_id": "a", "text": "open the window", "split": "test"}
    rows, skipped = worker.tokenized(
        [
            Recording(**said, prompt_text="find the camera", prompt_audio=str(prompt)),
            Recording(**said | {"utterance_id": "b"}, prompt_audio=str(prompt)),
            Recording(**said | {"utterance_id": "c"}, prompt_text="find", prompt_audio=str(tmp_path / "none.wav")),
        ]
    )
    waveform, _ = soundfile.read(prompt, dtype="float32")
    assert rows[0]["prompt_speech_tokens"].tolist() == worker.speech.codec.encode(waveform).tolist()
    assert rows[0]["prompt_text_tokens"] == tokenize_text("find the camera") and rows[0]["speech_tokens"] == []
    # Without the prompt's words the model must not hear its speech; codecs still get the voice.
    assert "prompt_speech_tokens" not in rows[1] and rows[1]["prompt_audio"] == str(prompt)
    assert [one.utterance_id for one in skipped] == ["c"] and "prompt cannot be used" in skipped[0].reason


def wav_bytes(waveform):
    file = io.BytesIO()
    soundfile.write(file, waveform, RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def write_shard(path, utterances, **columns):
    table = {
        "utt": utterances,
        "text": ["open the window", "find the camera", ""][: len(utterances)],
        "spk": ["7"] * len(utterances),
        **columns,
    }
    pq.write_table(pa.table(table), path, row_group_size=2)


def test_cosyvoice_shards(worker, tmp_path):
    sounds = [sound(index) for index in range(3)]
    write_shard(tmp_path / "parquet_000000000.tar", ["a", "b", "c"], audio_data=[wav_bytes(one) for one in sounds])
    write_shard(
        tmp_path / "parquet_000000001.tar", ["d", "e"], audio_data=[b"", b"no audio"], speech_token=[[5, 6, 7], []]
    )
    (tmp_path / "data.list").write_text("".join(f"{tmp_path}/parquet_00000000{index}.tar\n" for index in range(2)))
    recordings, skipped = cosyvoice_shards(tmp_path / "data.list", split="validation")
    assert cosyvoice_shards(tmp_path, split="validation") == (recordings, skipped)
    assert [(one.utterance_id, one.row) for one in recordings] == [("a", 0), ("b", 1), ("d", 0), ("e", 1)]
    assert [one.utterance_id for one in skipped] == ["c"]
    rows, bad = worker.tokenized(recordings)
    codec = worker.speech.codec
    assert [row["speech_tokens"].tolist() for row in rows[:2]] == [codec.encode(one).tolist() for one in sounds[:2]]
    assert rows[2]["speech_tokens"] == [5, 6, 7] and {row["split"] for row in rows} == {"validation"}
    assert [one.utterance_id for one in bad] == ["e"] and "no audio" in bad[0].reason
    write_shard(tmp_path / "foreign.parquet", ["f", "g"], speech_token=[[5, -1], [7, 8]], spk=[7, 8])
    rows, bad = worker.tokenized(cosyvoice_shards(tmp_path / "foreign.parquet")[0])
    assert [(row["utterance_id"], row["speaker"]) for row in rows] == [("g", "8")]
    assert [(one.utterance_id, one.reason) for one in bad] == [("f", "its speech_token has the negative token -1")]
    (tmp_path / "foreign.parquet").unlink()
    with pytest.raises(InputError, match="splits train, validation, test, not 'dev'"):
        cosyvoice_shards(tmp_path, split="dev")
    pq.write_table(pa.table({"utt": ["a"], "text": ["b"]}), tmp_path / "parquet_000000002.tar")
    with pytest.raises(InputError, match="lacks the column audio_data"):
        cosyvoice_shards(tmp_path)
    with pytest.raises(InputError, match="damaged or no Parquet"):
        (tmp_path / "parquet_000000002.tar").write_bytes(b"PAR1 cut")
        cosyvoice_shards(tmp_path / "parquet_000000002.tar")


def test_a_large_row_group_is_not_read_at_once(tmp_path):
    """CosyVoice writes a thousand sounds into one."""
    random = np.random.default_rng(0)
    sounds = [random.bytes(200_000) for _ in range(200)]
    names = [str(index) for index in range(200)]
    pq.write_table(pa.table({"utt": names, "audio_data": sounds}), tmp_path / "s.tar", write_batch_size=8)
    assert pq.ParquetFile(tmp_path / "s.tar").num_row_groups == 1
    shard, before = _Shard(str(tmp_path / "s.tar")), pa.default_memory_pool().bytes_allocated()
    for row in (0, 1, 17, 150, 199, 3):
        assert shard.value("audio_data", row) == sounds[row] and shard.value("utt", row) == str(row)
        assert pa.default_memory_pool().bytes_allocated() - before < 12_000_000
    assert shard.value("nothing", 0) is None
    with pytest.raises(InputError, match="has no row 200 any more"):
        shard.value("utt", 200)


def test_one_sound_that_breaks_the_tokenizer_does_not_take_its_batch_along(worker, tmp_path):
    class Breaking:
        sample_rate = RATE

        def encode(self, waveforms):
            if any(len(waveform) > RATE for waveform in waveforms):
                raise RuntimeError("too long\nfor this tokenizer")
            return [np.array([] if waveform[0] == 0 else [1, 2], np.int32) for waveform in waveforms]

    worker.speech = Breaking()
    paths = [
        write_utterance(tmp_path, f"1_1_0_{index}", None, waveform=waveform)
        for index, waveform in enumerate([sound(0), sound(1, 1.5), np.concatenate([[0], sound(2)[:-1]]), sound(3)])
    ]
    rows, skipped = worker.tokenized([Recording(path.stem, "open the window", "train", str(path)) for path in paths])
    assert [row["utterance_id"] for row in rows] == ["1_1_0_0", "1_1_0_3"]
    assert {one.utterance_id: one.reason for one in skipped} == {
        "1_1_0_1": "tokenizing failed: too long for this tokenizer",
        "1_1_0_2": "its audio gave no speech token",
    }


def test_s3_tokenizer_is_called_as_its_package_wants(tmp_path, monkeypatch):
    """The package's interface (0.3.0): class by name, weights from onnx, (128, frames) features, lengths."""
    calls = []

    class Model(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            calls.append(name)

        def init_from_onnx(self, path):
            if "bad" in path:
                raise RuntimeError("no such\nweights")
            calls.append(path)

        def quantize(self, mel, lengths):
            assert mel.shape[1:] == (128, 200) and lengths.tolist() == [100, 200]
            return torch.arange(100).view(2, 50), lengths // 4

    def padding(features):
        lengths = torch.tensor([feature.shape[1] for feature in features], dtype=torch.int32)
        return torch.nn.utils.rnn.pad_sequence([f.T for f in features], batch_first=True).transpose(1, 2), lengths

    package = types.ModuleType("s3tokenizer")
    package.S3TokenizerV2, package.padding = Model, padding
    package.log_mel_spectrogram = lambda audio: torch.zeros(128, len(audio) // 160)
    monkeypatch.setitem(speech_tokenizers.sys.modules, "s3tokenizer", package)
    (tmp_path / "speech_tokenizer_v2.onnx").touch()
    (tmp_path / "bad.onnx").touch()
    tokenizer = speech_tokenizers.speech_tokenizer_of_teacher("cosyvoice2", tmp_path)
    codes = tokenizer.encode([sound(0, 1), sound(1, 2)])
    assert [len(one) for one in codes] == [25, 50] and codes[1].tolist() == list(range(50, 100))
    assert calls == ["speech_tokenizer_v2_25hz", str(tmp_path / "speech_tokenizer_v2.onnx")]
    with pytest.raises(InputError, match="no such weights"):
        speech_tokenizers.speech_tokenizer_of_teacher("cosyvoice2", None, tmp_path / "bad.onnx")
    with pytest.raises(InputError, match="expected CosyVoice 2's speech_tokenizer_v2"):
        speech_tokenizers.speech_tokenizer_of_teacher("cosyvoice2", tmp_path / "nowhere")
    with pytest.raises(InputError, match="--speech-tokenizer"):
        speech_tokenizers.speech_tokenizer_of_teacher("llasa", tmp_path)


def test_command_line(libritts_root, tmp_path, capsys):
    arguments = ["libritts", str(libritts_root), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--dry-run", "name=other", "teacher.kind=llasa", f"teacher.path={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "11 recordings, 3 left out already" in printed and "llasa's tokenizers" in printed
    assert not (tmp_path / "out").exists()
    assert main(["prepare", *arguments, "--dry-run"]) == 0
    assert "11 recordings" in capsys.readouterr().out
    assert main(["length_stress", str(libritts_root), "--output", "x", "--per-length", "-1"]) == 2
    assert "one or more utterances per number of words, not -1" in capsys.readouterr().err
    assert main(["libri", *arguments[1:]]) == 2
    assert "did you mean 'libritts'" in capsys.readouterr().err


def test_paths_in_a_corpus_hold_from_anywhere(tmp_path, codec_path, monkeypatch, capsys):
    """Given relative to where the verb is called; read by workers and evaluations elsewhere."""

    def in_this_process(tokenizers, groups, actors, worker):
        assert tokenizers.speech_tokenizer.is_absolute()
        monkeypatch.chdir("/")
        tokenization = TokenizationWorker(tokenizers)
        tokenization._load()
        for index, recordings in groups.items():
            yield index, *tokenization.tokenized(recordings)

    monkeypatch.setattr(prepare, "_tokenized", in_this_process)
    monkeypatch.setattr("mamtra_ray.runtime.cluster.connect", lambda address: Cluster({}, "off"))
    monkeypatch.chdir(tmp_path)
    soundfile.write(tmp_path / "prompt.wav", sound(3), RATE, subtype="FLOAT")
    (tmp_path / "meta.lst").write_text("a|find the camera|prompt.wav|open the window\n")
    output = str(tmp_path / "corpus")
    assert main(["seed_tts_eval", "meta.lst", "--output", output, "--speech-tokenizer", codec_path.name]) == 0
    (row,) = read_corpus(output).to_pylist()
    assert row["prompt_audio"] == str(tmp_path / "prompt.wav") and len(row["prompt_speech_tokens"])


def test_nothing_usable_says_where_the_reasons_are(tmp_path, codec_path, monkeypatch):
    def in_this_process(tokenizers, groups, actors, worker):
        tokenization = TokenizationWorker(tokenizers)
        tokenization._load()
        for index, recordings in groups.items():
            yield index, *tokenization.tokenized(recordings)

    monkeypatch.setattr(prepare, "_tokenized", in_this_process)
    root = tmp_path / "LibriTTS"
    write_utterance(root, "1_1_0_0", "words nobody knows")
    with pytest.raises(InputError, match=r"none of 1 recordings could be used; .*report\.json says why"):
        run(root, tmp_path / "corpus", codec_path)
    report = json.loads((tmp_path / "corpus" / "report.json").read_text())
    assert report["reasons"] and report["utterances"] == 0


DRIVER = """
import sys
from pathlib import Path
import ray
from mamtra_ray.config import load_config
from mamtra_ray.corpus.preparation import prepare_corpus
from mamtra_ray.corpus.sources import libritts
from mamtra_ray.runtime.resources import WorkerResources

if __name__ == "__main__":
    root, output, codec = map(Path, sys.argv[1:])
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    prepare_corpus(load_config().teacher, *libritts(root), output, made_by={"source": "libritts"},
                   speech_tokenizer=codec, worker=WorkerResources(), utterances_per_part=2,
                   on_progress=lambda done, total: print(done, total, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("parts_before_kill", [0, 2])
def test_killed_and_called_again_makes_the_same_corpus(libritts_root, codec_path, tmp_path, parts_before_kill):
    (tmp_path / "driver.py").write_text(DRIVER)

    def start(output):
        command = [sys.executable, tmp_path / "driver.py", libritts_root, output, codec_path]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    whole = start(tmp_path / "whole")
    assert whole.communicate(timeout=240)[0].split()[-2:] == ["11", "11"] and whole.returncode == 0
    process = start(tmp_path / "killed")
    for line in process.stdout:
        if int(line.split()[0]) >= 2 * parts_before_kill:
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "report.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("part-*.json")}
    assert len(finished) >= parts_before_kill
    again = start(tmp_path / "killed")
    printed = again.communicate(timeout=240)[0].splitlines()
    assert again.returncode == 0 and int(printed[0].split()[0]) >= 2 * parts_before_kill
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())
    assert read_corpus(tmp_path / "killed").equals(read_corpus(tmp_path / "whole"))
    reports = [(tmp_path / name / "report.json").read_text() for name in ("killed", "whole")]
    assert reports[0] == reports[1]
