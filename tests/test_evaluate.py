"""Evaluation: the Ray pool against the same steps by hand, reuse, failures, and the files it leaves."""

import json
import os
import signal
import subprocess
import sys
import wave
from dataclasses import asdict, replace

import jiwer
import numpy as np
import pytest
import ray
import torch
from tiny_models import VOCABULARY, transformers_model, write_folder
from tiny_whisper import write_tiny_whisper

from mamtra_ray.config import load_config
from mamtra_ray.corpus.table import write_corpus
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate import __main__ as verb
from mamtra_ray.evaluate import evaluation as evaluate
from mamtra_ray.evaluate import pool as evaluation_pool
from mamtra_ray.evaluate.evaluation import check_evaluation, evaluate_systems, evaluation_settings
from mamtra_ray.evaluate.results import RATES, audio_file, compare, scored, write_summary
from mamtra_ray.evaluate.worker import Chunk, EvaluationWorker
from mamtra_ray.run.folder import read_audio_index
from mamtra_ray.runtime.actor_pool import result_of
from mamtra_ray.runtime.environment import versions
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.speech import tokenizer as tk
from mamtra_ray.speech.demo_codec import Codec, DecoderConfig, TokenDecoder, load_codec
from mamtra_ray.speech.whisper import recognizer_from_name
from mamtra_ray.speech_lm.generate import COSYVOICE2, Sampling, generate
from mamtra_ray.speech_lm.generation_check import GenerationCheckError
from mamtra_ray.speech_lm.sampling import sampling_of
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import llasa, load_teacher
from mamtra_ray.teachers.shared import share_teacher

TEXTS = ["a bad cab", "dead bee", "ace", "a cab added", "fade"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a teacher, a student, a corpus, a codec and a recognizer, all tiny and random."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_folder(folder / "teacher", transformers_model())
    teacher = load_teacher("huggingface", folder / "teacher")
    make_student(teacher.model, "AMAM").save(folder / "student")
    random = np.random.default_rng(0)
    rows = [
        {
            "utterance_id": f"test/{index}",
            "text": text,
            "text_tokens": random.integers(0, VOCABULARY.text_size, 3).tolist(),
            "speech_tokens": random.integers(0, VOCABULARY.eos_id, 30).tolist() if index else [],
            "split": "test",
        }
        for index, text in enumerate([*TEXTS, "..."])
    ]
    write_corpus(folder / "corpus.parquet", rows, tokenizer="tiny", made_by={"test": True})
    torch.manual_seed(0)
    codebook = torch.randn(VOCABULARY.speech_size, tk.FRAMES_PER_TOKEN * tk.NUM_MELS)
    decoder = TokenDecoder(DecoderConfig(channels=8, num_blocks=1))
    Codec(tk.Tokenizer(codebook), decoder, {"made": "by a test"}).save(folder / "codec.safetensors")
    write_tiny_whisper(folder / "whisper")
    return folder


def settings_of(place):
    return {
        "teacher.kind": "huggingface",
        "teacher.path": place / "teacher",
        "corpus.path": place / "corpus.parquet",
        "evaluate.codec": place / "codec.safetensors",
        "evaluate.recognizer": f"whisper:{place / 'whisper'}",
        "evaluate.normalization": "whisper_basic",
        "evaluate.audio_examples": 2,
    }


def config_of(place, **changes):
    return load_config(None, [f"{key}={value}" for key, value in {**settings_of(place), **changes}.items()])


def shared_teacher(place):
    return share_teacher(load_teacher("huggingface", place / "teacher"))


def evaluated_systems(place, systems, folder, on_progress=lambda done, total: None, **changes):
    """An evaluation with the settings of this file but for ``changes``."""
    return evaluate_systems(
        config_of(place, **changes),
        systems,
        folder,
        teacher=shared_teacher(place),
        worker=WorkerResources(),
        on_progress=on_progress,
    )


def worker_of(place, **changes):
    """A worker in this process."""
    return EvaluationWorker(evaluation_settings(config_of(place, **changes), shared_teacher(place)))


@pytest.fixture(scope="module")
def evaluated_run(place, ray_cluster, tmp_path_factory):
    """One evaluation by two actors, used by several tests."""
    folder = tmp_path_factory.mktemp("run")
    progress = []
    evaluations = evaluated_systems(
        place, {"AMAM": place / "student"}, folder, on_progress=lambda *counts: progress.append(counts)
    )
    return folder, evaluations, progress


def test_pool_equals_the_steps_by_hand(place, evaluated_run):
    _, evaluations, progress = evaluated_run
    config = config_of(place)
    teacher = load_teacher("huggingface", place / "teacher")
    student = make_student(teacher.model, "AMAM")
    codec = load_codec(place / "codec.safetensors")
    recognizer = recognizer_from_name(config.evaluate.recognizer)
    assert list(evaluations) == ["codec", "teacher", "AMAM"]
    assert progress[0] == (0, 14) and progress[-1] == (14, 14)
    corpus = {row["utterance_id"]: row for row in evaluate.read_corpus(place / "corpus.parquet").to_pylist()}
    heard = set()
    for name, model in {"codec": None, "teacher": teacher.model, "AMAM": student}.items():
        rows = evaluations[name].rows
        assert sorted(row["text"] for row in rows) == sorted(TEXTS if model else TEXTS[1:])
        for row in rows:
            sentence = corpus[row["utterance_id"]]
            if model is None:
                tokens, stopped = sentence["speech_tokens"], True
            else:
                prompt = teacher.sequence.prompt(sentence["text_tokens"])
                (alone,) = generate(model, [prompt], [teacher.length_bounds(sentence["text_tokens"])])
                tokens, stopped = list(alone.tokens), alone.stopped
            assert (row["speech_tokens"], row["stopped"]) == (tokens, stopped)
            assert bool(row["failure"]) == (not stopped)
            assert row["hypothesis"] == recognizer.transcribe([codec.decode(tokens)])[0]
            heard.add(row["hypothesis"])
        hypotheses = [" ".join(row["hypothesis"].lower().split()) for row in rows]
        assert evaluations[name].wer.value == pytest.approx(jiwer.wer([row["text"] for row in rows], hypotheses))
        assert evaluations[name].cer == pytest.approx(jiwer.cer([row["text"] for row in rows], hypotheses))
    assert len(heard) > 2
    difference = evaluations["AMAM"].difference_to_teacher.difference
    assert difference.value == pytest.approx(evaluations["AMAM"].wer.value - evaluations["teacher"].wer.value)
    # The codec has no recording of the first sentence, so it is compared on the four others.
    shared = [row for row in evaluations["teacher"].rows if row["utterance_id"] != "test/0"]
    rate = sum(row["word_errors"] for row in shared) / sum(row["words"] for row in shared)
    difference = evaluations["codec"].difference_to_teacher.difference
    assert difference.value == pytest.approx(evaluations["codec"].wer.value - rate)
    assert evaluations["teacher"].difference_to_teacher is None


def in_this_process(settings, chunks, _):
    """In place of the actors."""
    worker = EvaluationWorker(settings)
    for chunk in chunks:
        yield chunk, *worker.run(chunk)


def test_every_utterance_has_a_sound_file_of_its_own(tmp_path):
    ids = ["a/b", "a_b", "a b", "..", "x" * 300, "x" * 299 + "y", "天气/真", "天气", "a:b|c", "\n"]
    files = [audio_file(tmp_path, "AMAM", utterance_id) for utterance_id in ids]
    assert len(set(files)) == len(ids)
    for file in files:
        assert file.parent == tmp_path / "audio" / "AMAM"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert audio_file(tmp_path, "AMAM", "1089_134686_000001").name == "1089_134686_000001.wav"


def test_a_damaged_sound_file_is_named_and_spoken_again(place, evaluated_run, monkeypatch):
    folder, before, _ = evaluated_run
    clip = next(clip for clip in read_audio_index(folder).clips if clip.system == "AMAM")
    path = folder / "audio" / clip.file
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    with pytest.raises(InputError, match=r"\.wav is damaged"):
        read_audio_index(folder)
    monkeypatch.setattr(evaluate, "evaluated", in_this_process)
    assert evaluated_systems(place, {"AMAM": place / "student"}, folder)["AMAM"].rows == before["AMAM"].rows
    assert path.read_bytes() == content and read_audio_index(folder).clips


def test_files_of_an_evaluation(place, evaluated_run):
    folder, evaluations, _ = evaluated_run
    spoken = [sentence.utterance_id for sentence in evaluate.test_sentences(config_of(place))[0]]
    assert sorted(spoken) == [f"test/{index}" for index in range(5)]
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    assert summary["systems"]["AMAM"]["wer"] == asdict(evaluations["AMAM"].wer)
    assert torch.__version__.startswith(summary["made_by"]["versions"]["torch"])
    assert [(pair["a"], pair["b"]) for pair in summary["paired_differences"]] == [
        ("codec", "teacher"), ("codec", "AMAM"), ("teacher", "AMAM")
    ]  # fmt: skip
    for pair in summary["paired_differences"]:
        for rate in ("corpus_wer", "mean_utterance_wer", "corpus_cer", "mean_utterance_cer"):
            difference = pair[rate]["difference"]
            assert difference["low"] <= difference["value"] <= difference["high"]
    assert summary["left_out_no_words_after_normalization"] == ["test/5"]
    lines = (folder / "evaluation" / "teacher.jsonl").read_text().splitlines()
    assert [json.loads(line)["utterance_id"] for line in lines] == spoken
    index = read_audio_index(folder)
    assert index.systems == ("codec", "teacher", "AMAM")
    examples = [name for name in spoken if name in index.texts]
    assert len(examples) == 2
    assert {(clip.system, clip.utterance_id) for clip in index.clips} == {
        (system, name) for system in index.systems for name in examples if (system, name) != ("codec", "test/0")
    }
    clip = next(clip for clip in index.clips if clip.system == "teacher")
    row = next(row for row in evaluations["teacher"].rows if row["utterance_id"] == clip.utterance_id)
    assert clip.hypothesis == row["hypothesis"]
    with wave.open(str(folder / "audio" / clip.file)) as file:
        assert file.getnframes() / file.getframerate() == pytest.approx(row["audio_seconds"], abs=1e-3)


def test_finished_sentences_are_not_spoken_again(place, evaluated_run, monkeypatch):
    folder, before, _ = evaluated_run

    def no_actor(*_, **__):
        raise AssertionError("an actor was started although everything was there")

    monkeypatch.setattr(evaluation_pool.ray, "remote", no_actor)
    systems = {"AMAM": place / "student"}
    again = evaluated_systems(place, systems, folder)
    assert again["AMAM"].summary() == before["AMAM"].summary()
    seed = evaluated_systems(place, systems, folder, **{"evaluate.normalization": "seed"})
    assert seed["AMAM"].wer == seed["AMAM"].rates["mean_utterance_wer"]
    # One of them has no word.
    fewer = evaluated_systems(place, systems, folder, **{"evaluate.sentences": 3})
    assert fewer["AMAM"].sentences == 2
    with pytest.raises(AssertionError, match="an actor was started"):
        evaluated_systems(place, systems, folder, **{"evaluate.temperature": 0.5})
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="an actor was started"):
        patch.setattr(evaluate, "versions", lambda names: {**versions(names), "torch": "1.0"})
        evaluated_systems(place, systems, folder)
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="an actor was started"):
        patch.setattr(evaluate, "CODE_VERSION", 0)
        evaluated_systems(place, systems, folder)
    assert evaluated_systems(place, systems, folder)["AMAM"].sentences == 5


def test_only_lost_sentences_are_spoken_again(place, evaluated_run, monkeypatch):
    folder, before, _ = evaluated_run
    monkeypatch.setattr(evaluate, "evaluated", in_this_process)
    path = folder / "evaluation" / "AMAM.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    progress = []
    after = evaluated_systems(
        place, {"AMAM": place / "student"}, folder, on_progress=lambda *counts: progress.append(counts)
    )
    assert progress == [(13, 14), (14, 14)]
    assert after["AMAM"].rows == before["AMAM"].rows
    path.write_text(path.read_text()[:-30])
    with pytest.raises(InputError, match=r"AMAM.jsonl is damaged"):
        evaluated_systems(place, {"AMAM": place / "student"}, folder)
    path.write_text("".join(lines))


def test_errors_of_an_actor_reach_the_user(place, ray_cluster, tmp_path):
    with pytest.raises(InputError, match=r"nowhere given, which is no folder with Whisper weights$"):
        evaluated_systems(place, {}, tmp_path, **{"evaluate.recognizer": "whisper:nowhere"})


def test_a_search_checks_its_evaluation_before_it_trains(place, ray_cluster):
    check_evaluation(config_of(place), shared_teacher(place), WorkerResources())
    for key, value, message in (
        ("evaluate.metrics", "speaker", "did you mean 'speaker_similarity'"),
        ("evaluate.corpus", "nowhere", "nowhere"),
    ):
        with pytest.raises(InputError, match=message):
            check_evaluation(config_of(place, **{key: value}), shared_teacher(place), WorkerResources())


def test_bad_input_is_refused_before_any_work(place, ray_cluster, tmp_path, capsys):
    for changes, message in {
        ("evaluate.normalization", "seeds"): r"evaluate.normalization = 'seeds' \(.*\): did you mean 'seed'",
        ("evaluate.sentences", 0): "nothing to speak",
    }.items():
        with pytest.raises(InputError, match=message):
            evaluated_systems(place, {}, tmp_path, **dict([changes]))
    for name in ("codec", "a/b", ""):
        with pytest.raises(InputError, match="cannot be called"):
            evaluated_systems(place, {name: None}, tmp_path)
    with pytest.raises(InputError, match="holds no saved model"):
        evaluated_systems(place, {"a": tmp_path}, tmp_path)
    assert verb.main(["--system", "name-only", "--run", str(tmp_path)]) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err


class _Recognizer:
    name = "stub"

    def transcribe(self, waveforms):
        if len(waveforms) > 1 or waveforms[0].max() > 0.5:
            raise RuntimeError("too loud")
        return ["heard"]


class _Vocoder:
    sample_rate = 8_000

    def decode(self, speech_tokens, voice=None):
        if speech_tokens[0] == 0:
            raise InputError("token 0 is silence")
        return np.full(800, speech_tokens[0] / 10, np.float32)


def test_failures_of_single_utterances_are_listed_and_counted(place, ray_cluster):
    worker = worker_of(place)
    worker.prepared, worker.recognizer, worker.vocoder, worker.metrics = True, _Recognizer(), _Vocoder(), []
    sentences = evaluate.utterances(evaluate.read_corpus(place / "corpus.parquet"))[:4]
    for sentence, first in zip(sentences, (None, 0, 1, 9), strict=True):
        tokens = np.array([] if first is None else [first, 1], np.int32)
        object.__setattr__(sentence, "speech_tokens", tokens)
    rows, kept, rate = worker.run(Chunk("codec", None, tuple(sentences), frozenset({"test/2"})))
    assert [row["hypothesis"] for row in rows] == ["", "", "heard", ""]
    assert [row["failure"] for row in rows] == [
        "no speech token was generated",
        "decoding to sound failed: token 0 is silence",
        None,
        "recognition failed: too loud",
    ]
    assert list(kept) == ["test/2"] and rate == 8_000
    evaluation = scored({"codec": rows}, "whisper_basic")["codec"]
    assert [row["utterance_id"] for row in evaluation.failures] == ["test/0", "test/1", "test/3"]
    assert evaluation.wer.value == pytest.approx(1.0)


def test_a_text_too_long_for_the_teacher_is_one_failure(place, ray_cluster):
    worker = worker_of(place)
    worker.prepare()
    worker.teacher = replace(load_teacher("huggingface", place / "teacher"), max_length=100)
    good = evaluate.utterances(evaluate.read_corpus(place / "corpus.parquet"))[1]
    long = replace(good, utterance_id="long", text_tokens=np.ones(100, np.int32))
    rows, _, _ = worker.run(Chunk("teacher", None, (long, good), frozenset()))
    assert "leaves no room for speech" in rows[0]["failure"] and not rows[0]["speech_tokens"]
    (alone,), _, _ = worker.run(Chunk("teacher", None, (good,), frozenset()))
    assert rows[1] == alone and worker.run(Chunk("teacher", None, (long,), frozenset()))[0] == rows[:1]
    full = replace(good, utterance_id="full", prompt_speech_tokens=np.ones(100, np.int32))
    (row,), _, _ = worker.run(Chunk("teacher", None, (full,), frozenset()))
    assert row["failure"] == "a prompt of 106 tokens leaves no room for speech"
    tight = replace(full, prompt_speech_tokens=np.ones(90, np.int32))
    (row,), _, _ = worker.run(Chunk("teacher", None, (tight,), frozenset()))
    assert len(row["speech_tokens"]) <= 4
    foreign = replace(good, text_tokens=np.array([VOCABULARY.text_size], np.int32))
    with pytest.raises(InputError, match="was another tokenizer used"):
        worker.run(Chunk("teacher", None, (good, foreign), frozenset()))


def spoil(place, folder, name):
    """A student with one value of tensor ``name`` that is not a number."""
    student = make_student(load_teacher("huggingface", place / "teacher").model, "AMAM")
    with torch.no_grad():
        student.state_dict()[name].view(-1)[0] = torch.nan
    student.save(folder)


def test_a_student_that_has_diverged_fails_by_name_and_stops_nobody(place, ray_cluster, tmp_path, monkeypatch, capsys):
    """Its rows say why; the other systems are heard; the verb ends with that sentence."""

    def in_this_process(settings, chunks, _):
        worker = EvaluationWorker(settings)
        for chunk in chunks:
            yield chunk, *worker.run(chunk)

    monkeypatch.setattr(evaluate, "evaluated", in_this_process)
    spoil(place, tmp_path / "diverged", "body.norm.weight")
    overrides = [f"{key}={value}" for key, value in settings_of(place).items()]
    systems = [f"--system=bad={tmp_path / 'diverged'}", f"--system=good={place / 'student'}"]
    assert verb.main([*overrides, *systems, "--run", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    reason = "system 'bad' (layout AMAM, float32 on cpu): the model's logits are not finite"
    assert printed.err.splitlines()[-1].startswith(f"error: no sentence of system 'bad' could be spoken: {reason}")
    assert "alarm: bad says nothing that can be heard in 100 % of the sentences (system 'bad' (layout" in printed.out
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"run/evaluation/{name}.jsonl").read_text().splitlines()]
        for name in ("bad", "good", "teacher")
    }
    assert all(row["failure"].startswith(reason) and row["hypothesis"] == "" for row in rows["bad"])
    assert all(row["speech_tokens"] for row in rows["good"] + rows["teacher"])


def test_an_error_of_generation_is_the_rows_failure(place, ray_cluster, monkeypatch):
    """Only some texts may lead a model to logits that are not finite."""
    worker = worker_of(place)
    worker.prepare()
    sentences = evaluate.utterances(evaluate.read_corpus(place / "corpus.parquet"))[:2]

    def refuse(*_):
        raise InputError("the logits of row 1 are not finite")

    monkeypatch.setattr("mamtra_ray.speech_lm.generate.generate", refuse)
    # The check itself has its own name for generate, from before.
    rows, _, _ = worker.run(Chunk("AMAM", place / "student", tuple(sentences), frozenset()))
    assert [row["failure"] for row in rows] == ["the logits of row 1 are not finite"] * 2
    assert not any(row["stopped"] or row["speech_tokens"] for row in rows)


def test_a_model_that_does_not_generate_what_it_computes_ends_the_evaluation(place, ray_cluster, monkeypatch):
    """Found by the worker, on its own device; the type of the error survives Ray."""
    sound = SpeechLM.hidden_states

    def forgetful(self, **arguments):
        """Every step begins with an empty cache."""
        if arguments.get("past_key_values") is not None and arguments["inputs_embeds_BLD"].shape[1] == 1:
            arguments |= {"past_key_values": self.new_cache(), "attention_mask_BL": None}
        return sound(self, **arguments)

    monkeypatch.setattr(SpeechLM, "hidden_states", forgetful)
    sentence = evaluate.utterances(evaluate.read_corpus(place / "corpus.parquet"))[:1]
    for system, model in {"AMAM": place / "student", "teacher": None}.items():
        with pytest.raises(GenerationCheckError, match=f"system '{system}' .* decoding from the cache, step 1"):
            worker_of(place).run(Chunk(system, model, tuple(sentence), frozenset()))

    @ray.remote
    def fail():
        raise GenerationCheckError("torch 0")

    with pytest.raises(GenerationCheckError, match=r"^torch 0$"):
        result_of(fail.remote())


def test_alarms_of_an_evaluation(evaluated_run, capsys):
    """Random models never stop; the codec cannot."""
    _, evaluations, _ = evaluated_run
    not_stopped = {name: np.mean([not row["stopped"] for row in e.rows]) for name, e in evaluations.items()}
    found = {(alarm.system, alarm.kind) for alarm in evaluate.evaluation_alarms(evaluations)}
    for name in ("teacher", "AMAM"):
        assert ((name, "does_not_stop") in found) == (not_stopped[name] > 0.1)
        assert evaluations[name].measured().ends.not_stopped == pytest.approx(not_stopped[name])
    assert max(not_stopped.values()) > 0.1 and "codec" not in {system for system, _ in found}
    assert all(row["fewest_tokens"] > 0 for row in evaluations["AMAM"].rows)


def test_prompts_reach_the_model_and_the_codec(place, ray_cluster):
    voices = []

    class Vocoder:
        sample_rate = 16_000

        def decode(self, speech_tokens, voice=None):
            voices.append(voice)
            return np.zeros(160, np.float32)

    worker = worker_of(place)
    worker.prepare()
    worker.vocoder, worker.metrics = Vocoder(), []
    sentence = evaluate.utterances(evaluate.read_corpus(place / "corpus.parquet"))[1]
    prompt = {"prompt_text_tokens": np.array([7, 8], np.int32), "prompt_speech_tokens": np.array([1, 2, 3], np.int32)}
    spoken = (
        sentence,
        replace(sentence, utterance_id="p", **prompt),
        replace(sentence, utterance_id="v", prompt_audio="voice.wav"),
    )
    rows, _, _ = worker.run(Chunk("teacher", None, spoken, frozenset()))
    teacher = load_teacher("huggingface", place / "teacher")
    text = sentence.text_tokens.tolist()
    prompts = [teacher.sequence.prompt(text), teacher.sequence.prompt(text, [7, 8], [1, 2, 3])]
    expected = [generate(teacher.model, [one], [teacher.length_bounds(text)])[0].tokens for one in prompts]
    assert [tuple(row["speech_tokens"]) for row in rows] == [expected[0], expected[1], expected[0]]
    plain, full, voice_only = voices
    assert plain is None and full.speech_tokens.tolist() == [1, 2, 3] and full.audio is None
    assert len(voice_only.speech_tokens) == 0 and str(voice_only.audio) == "voice.wav"


def test_seed_headline_is_the_mean_over_utterances():
    def row(text, hypothesis, **more):
        return {"utterance_id": text, "text": text, "hypothesis": hypothesis, "failure": None, **more}

    random = np.random.default_rng(1)
    teacher = [row("one two", "one"), row("a b c d e f g h", "a b c d e f g h")] + [
        row(f"word{index} " * int(random.integers(1, 9)), f"word{index}") for index in range(30)
    ]
    student = [row(r["text"], "" if index % 3 else r["hypothesis"], utmos=3.0) for index, r in enumerate(teacher)]
    result = scored({"student": student, "teacher": teacher}, "seed")
    rates = np.array([jiwer.wer(r["text"].strip(), r["hypothesis"]) for r in teacher])
    assert result["teacher"].wer.value == pytest.approx(rates.mean())
    assert result["teacher"].rates["corpus_wer"].value != pytest.approx(result["teacher"].wer.value)
    means = [random.choice(rates, len(rates)).mean() for _ in range(4000)]
    assert (result["teacher"].wer.low, result["teacher"].wer.high) == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=0.03
    )
    difference = result["student"].difference_to_teacher.difference
    assert difference.value == pytest.approx(result["student"].wer.value - result["teacher"].wer.value)
    assert difference.low > 0 and result["student"].metrics == {"utmos": 3.0}
    backwards = compare(result["teacher"], result["student"]).difference
    assert (backwards.value, backwards.low, backwards.high) == pytest.approx(
        (-difference.value, -difference.high, -difference.low)
    )
    # A bootstrap by hand, over sentences, of the difference of the means.
    losses = np.array([jiwer.wer(row["text"].strip(), row["hypothesis"]) for row in student]) - rates
    means = [random.choice(losses, len(losses)).mean() for _ in range(4000)]
    assert (difference.low, difference.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)
    assert evaluate.comparison_lines(result) == []
    (line,) = evaluate.comparison_lines({**result, "other": replace(result["teacher"], system="other")})
    assert line.startswith(f"student - other: {difference.value:+.2%} [") and "not worse in 0%" in line
    elsewhere = replace(result["teacher"], rows=tuple({**row, "utterance_id": "x"} for row in result["teacher"].rows))
    with pytest.raises(InputError, match="no sentence and normalization in common"):
        compare(result["student"], elsewhere)


def test_words_and_characters_over_the_corpus_and_as_means():
    """All four rates and their intervals against jiwer and a bootstrap by hand."""
    random = np.random.default_rng(2)
    words = ["open", "the", "window", "a", "guitar"]
    texts = [" ".join(random.choice(words, random.integers(1, 12))) for _ in range(60)]
    systems = {}
    for name, damage in {"a": 0.1, "b": 0.3}.items():
        heard = [" ".join(w[1:] if random.random() < damage else w for w in text.split()) for text in texts]
        systems[name] = [
            {"utterance_id": str(index), "text": text, "hypothesis": hypothesis, "failure": None}
            for index, (text, hypothesis) in enumerate(zip(texts, heard, strict=True))
        ]
    result = scored(systems, "whisper_basic")
    counts = {}
    for name, rows in systems.items():
        for unit, process in {"wer": jiwer.process_words, "cer": jiwer.process_characters}.items():
            outputs = [process(row["text"], " ".join(row["hypothesis"].split())) for row in rows]
            errors = np.array([one.substitutions + one.deletions + one.insertions for one in outputs], float)
            lengths = np.array([one.hits + one.substitutions + one.deletions for one in outputs], float)
            counts[name, f"corpus_{unit}"] = errors, lengths
            counts[name, f"mean_utterance_{unit}"] = errors / lengths, np.ones(len(rows))
    draws = random.integers(len(texts), size=(4000, len(texts)))
    for rate in RATES:
        drawn = {}
        for name in systems:
            errors, lengths = counts[name, rate]
            found = result[name].rates[rate]
            assert found.value == pytest.approx(errors.sum() / lengths.sum())
            drawn[name] = errors[draws].sum(1) / lengths[draws].sum(1)
            assert (found.low, found.high) == pytest.approx(np.quantile(drawn[name], [0.025, 0.975]), abs=0.01)
        paired = compare(result["b"], result["a"], rate).difference
        values = {name: result[name].rates[rate].value for name in systems}
        assert paired.value == pytest.approx(values["b"] - values["a"]) and paired.low > 0
        expected = np.quantile(drawn["b"] - drawn["a"], [0.025, 0.975])
        assert (paired.low, paired.high) == pytest.approx(expected, abs=0.015)
    assert result["a"].wer == result["a"].rates["corpus_wer"]
    assert result["a"].cer == result["a"].rates["corpus_cer"].value


class _Opinion:
    """Cannot score sound that begins with 0.3, gives no number for 0.2."""

    def score(self, waveforms, sample_rate, texts, prompts):
        if any(waveform[0] == np.float32(0.3) for waveform in waveforms):
            raise RuntimeError("kernel is larger\nthan the sound")
        return [{"opinion": float("nan") if waveform[0] == np.float32(0.2) else 4.0} for waveform in waveforms]


class _NoPrompt:
    def score(self, waveforms, sample_rate, texts, prompts):
        raise InputError("needs a prompt")


def test_an_utterance_without_a_score_is_listed_and_ends_nothing(place, ray_cluster, tmp_path):
    worker = worker_of(place, **{"evaluate.metrics": "dnsmos"})
    worker.prepared, worker.recognizer, worker.vocoder, worker.metrics = True, _Recognizer(), _Vocoder(), [_Opinion()]
    sentences = evaluate.utterances(evaluate.read_corpus(place / "corpus.parquet"))[1:5]
    for sentence, first in zip(sentences, (1, 2, 3, 4), strict=True):
        object.__setattr__(sentence, "speech_tokens", np.array([first, 1], np.int32))
    chunk = Chunk("codec", None, tuple(sentences), frozenset())
    rows, _, _ = worker.run(chunk)
    assert [row.get("opinion") for row in rows] == [4.0, None, None, 4.0] and not any(row["failure"] for row in rows)
    evaluations = scored({"codec": rows}, "whisper_basic")
    assert evaluations["codec"].metrics == {"opinion": 4.0} and evaluations["codec"].metric_utterances == {"opinion": 2}
    write_summary(tmp_path, evaluations, {}, [], {})
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())["systems"]["codec"]
    assert [(one["utterance_id"], one["score"], one["reason"]) for one in summary["unscored"]] == [
        ("test/2", "dnsmos", "opinion is nan"), ("test/3", "dnsmos", "kernel is larger than the sound")
    ]  # fmt: skip
    worker.metrics = [_NoPrompt()]
    with pytest.raises(InputError, match=r"evaluate\.metrics=dnsmos: needs a prompt"):
        worker.run(chunk)


def test_a_codec_that_takes_no_utterance_ends_the_evaluation(place, ray_cluster):
    worker = worker_of(place)
    worker.prepared, worker.recognizer, worker.vocoder, worker.metrics = True, _Recognizer(), _Vocoder(), []
    sentences = evaluate.utterances(evaluate.read_corpus(place / "corpus.parquet"))[1:4]
    for sentence in sentences:
        object.__setattr__(sentence, "speech_tokens", np.array([0], np.int32))
    with pytest.raises(InputError, match=r"no utterance of system 'codec' can be heard: .*token 0 is silence"):
        worker.run(Chunk("codec", None, tuple(sentences), frozenset()))
    rows, _, _ = worker.run(Chunk("codec", None, tuple(sentences[:1]), frozenset()))
    assert "token 0 is silence" in rows[0]["failure"]


def test_sampling_settings(place):
    config = config_of(place, **{"evaluate.temperature": 0.7, "evaluate.repetition_aware": "true"})
    sampling = sampling_of(config.evaluate)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_window) == (0.7, 0.8, 25, 10)
    # What is not asked for is the teacher's own; one that says nothing is greedy.
    assert sampling_of(config_of(place).evaluate).temperature == 0
    sampling = sampling_of(config.evaluate, {"temperature": 0.8, "top_k": 50, "top_p": 1.0})
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_window) == (0.7, 1.0, 50, 10)


def test_search_spaces_are_valid():
    folder = evaluate.Path(__file__).parent.parent / "search_spaces"
    spaces = {path.stem: load_config(path) for path in sorted(folder.glob("*.yaml"))}
    assert {"demo", "cosyvoice2", "llasa_1b"} <= set(spaces)
    assert spaces["cosyvoice2"].evaluate.normalization == "seed" and spaces["cosyvoice2"].teacher.kind == "cosyvoice2"
    # What is sampled is what the teachers' own code does.
    for name, own in {"cosyvoice2": vars(COSYVOICE2), "llasa_1b": llasa.SAMPLING}.items():
        assert sampling_of(spaces[name].evaluate, own) == Sampling(**own)


DRIVER = """
import json
import sys
from pathlib import Path
import ray
from mamtra_ray.config import load_config
from mamtra_ray.evaluate import evaluation as evaluate
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.shared import share_teacher

if __name__ == "__main__":
    overrides, student, folder = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    evaluate.SENTENCES_PER_CHUNK = 1
    config = load_config(None, overrides)
    teacher = share_teacher(load_teacher(config.teacher.kind, config.teacher.path))
    evaluate.evaluate_systems(config, {"AMAM": student}, folder, teacher=teacher, worker=WorkerResources(),
                              on_progress=lambda done, total: print(done, total, flush=True))
"""


@pytest.mark.slow
def test_killed_and_called_again_gives_the_same_scores(place, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    overrides = json.dumps([f"{key}={value}" for key, value in settings_of(place).items()])

    def start(folder):
        command = [sys.executable, tmp_path / "driver.py", overrides, place / "student", folder]
        environment = {**os.environ, "PYTHONPATH": str(evaluate.Path(evaluate.__file__).parents[2])}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    whole = start(tmp_path / "whole")
    assert whole.communicate(timeout=240)[0].split()[-2:] == ["14", "14"] and whole.returncode == 0
    process = start(tmp_path / "killed")
    for line in process.stdout:
        if int(line.split()[0]) >= 5:
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "evaluation" / "summary.json").exists()
    again = start(tmp_path / "killed")
    printed = again.communicate(timeout=240)[0].splitlines()
    assert again.returncode == 0 and 5 <= int(printed[0].split()[0]) < 14
    for name in ("summary.json", "teacher.jsonl", "AMAM.jsonl", "codec.jsonl"):
        texts = [(tmp_path / run / "evaluation" / name).read_text() for run in ("whole", "killed")]
        assert texts[0] == texts[1], name
