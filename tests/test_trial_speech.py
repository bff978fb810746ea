"""What trials say at the last rung, and what it decides."""

import dataclasses
import random
from types import SimpleNamespace

import pytest
from test_evaluate import config_of, place, shared_teacher, worker_of  # noqa: F401 (place is a fixture)
from test_finalists import row

from mamtra_ray.config import load_config
from mamtra_ray.corpus.table import read_corpus, utterances, write_corpus
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.evaluation import evaluation_settings
from mamtra_ray.evaluate.results import scored
from mamtra_ray.evaluate.worker import Chunk
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace
from mamtra_ray.runtime.progress import Costs, Screen
from mamtra_ray.search import trial_speech
from mamtra_ray.search.finalists import choose_finalists
from mamtra_ray.search.trial_speech import TrialSpeech, speech_score, token_error_rate, validation_sentences
from mamtra_ray.speech.error_rate import ErrorRate


def edits(a, b):
    """Levenshtein's distance, by its recurrence."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        now = [i]
        for j, y in enumerate(b, 1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (x != y)))
        before = now
    return before[-1]


def test_token_errors_are_edits_over_the_teachers_tokens():
    generator = random.Random(0)
    theirs = {str(n): [generator.randrange(5) for _ in range(generator.randrange(9))] for n in range(40)}
    ours = {name: [generator.randrange(5) for _ in range(generator.randrange(9))] for name in theirs}
    assert any(not tokens for tokens in theirs.values()) and any(not tokens for tokens in ours.values())
    rows = [{"utterance_id": name, "speech_tokens": tokens} for name, tokens in ours.items()]
    counted = [name for name in theirs if theirs[name]]
    expected = sum(edits(theirs[name], ours[name]) for name in counted) / sum(len(theirs[name]) for name in counted)
    assert token_error_rate(rows, theirs) == pytest.approx(expected)


def test_a_trial_hears_what_an_evaluation_hears(place, ray_cluster):  # noqa: F811
    config = config_of(place)
    sentences = tuple(utterances(read_corpus(place / "corpus.parquet", "test")))[:3]
    worker = worker_of(place)
    teacher, _, _ = worker.run(Chunk("teacher", None, sentences, frozenset()))
    expected, _, _ = worker.run(Chunk("AMAM", place / "student", sentences, frozenset()))
    tokens = {one["utterance_id"]: one["speech_tokens"] for one in teacher}
    speech = TrialSpeech(
        evaluation_settings(config, shared_teacher(place)), sentences, tokens, ErrorRate(0, 0, 0), "test", 1
    )
    score = speech_score(speech, "AMAM", place / "student")
    assert score.wer == scored({"AMAM": expected}, config.evaluate.normalization)["AMAM"].wer
    differences = sum(edits(tokens[one["utterance_id"]], one["speech_tokens"]) for one in expected)
    assert score.token_error_rate == pytest.approx(differences / sum(map(len, tokens.values())))
    assert differences, "a student that says what the teacher says tells nothing here"


def test_sentences_without_a_word_are_passed_over():
    sentences = [dataclasses.replace(one, text=text) for one, text in zip(SENTENCES, ("...", "a b", "c"), strict=True)]
    assert [one.text for one in validation_sentences(sentences, 1, "whisper_basic")] == ["a b"]
    assert [one.text for one in validation_sentences(sentences, 9, "whisper_basic")] == ["a b", "c"]
    with pytest.raises(InputError, match=r"search.sentences=2: the validation split has no sentence with a word"):
        validation_sentences(sentences[:1], 2, "whisper_basic")


SENTENCES = utterances(read_corpus(None, "validation").slice(0, 3))


def test_trials_of_several_workers_cannot_speak():
    with pytest.raises(InputError, match="a trial speaks where it trains"):
        load_config("demo", ["search.sentences=2", "search.workers_per_trial=2"])


def heard(layout, rung, ce, wer, evaluation="now"):
    return dataclasses.replace(row(layout, rung, ce), wer=ErrorRate(wer, wer - 0.02, wer + 0.02), evaluation=evaluation)


def test_the_wer_of_trials_rules_out_and_ce_decides():
    space = SearchSpace(4, ("1:1",))
    rows = [
        heard("AAMM", 1, 1.0, 0.30),  # the lowest CE, but another one is understood better
        heard("AMAM", 1, 1.2, 0.05),
        heard("AMMA", 1, 1.1, 0.06),  # within the interval of the lowest WER, and of a lower CE
        row("MAAM", 0, 0.9),  # stopped at the first rung: nothing of it compares
    ]

    def found(count, rows=rows, evaluation="now"):
        return [str(one.layout) for one in choose_finalists(space, [], rows, count, evaluation)]

    assert found(4) == ["AMMA", "AMAM", "AAMM", "MAAM"]
    # Another evaluation's rates do not compare, and without any the CE decides.
    assert found(3, evaluation="later") == ["AAMM", "AMMA", "AMAM"]
    mixed = [*rows[1:], dataclasses.replace(rows[0], evaluation="before")]
    assert found(1, mixed) == ["AAMM"], "heard under other settings: its CE counts"
    assert Layout("MAAM") not in found(3)


def test_trials_are_heard_in_the_language_of_their_sentences(tmp_path, monkeypatch):
    rows = [
        {
            "utterance_id": f"{split}-{n}",
            "text": "你好世界",
            "text_tokens": [n],
            "speech_tokens": [n, 1],
            "split": split,
        }
        for split in ("train", "validation", "test")
        for n in range(3)
    ]
    write_corpus(tmp_path / "corpus.parquet", rows, tokenizer="mine", made_by={"test": True})
    config = load_config("demo", [f"corpus.path={tmp_path / 'corpus.parquet'}", "evaluate.normalization=whisper_basic"])
    asked = []

    def evaluated(settings, chunks, worker):
        asked.append(settings.evaluate.language)
        for chunk in chunks:
            heard = [{"utterance_id": x.utterance_id, "text": x.text, "hypothesis": x.text} for x in chunk.utterances]
            rest = {"failure": None, "stopped": True, "speech_tokens": [1], "audio_seconds": 1.0}
            yield chunk, [row | rest for row in heard], {}, 16_000

    monkeypatch.setattr(trial_speech, "evaluated", evaluated)
    session = SimpleNamespace(
        config=config,
        folder=tmp_path,
        shared_teacher=SimpleNamespace(fingerprint="t"),
        worker=SimpleNamespace(num_threads=1),
        screen=Screen(("trials",), Costs(tmp_path / "costs.json")),
    )
    speech = trial_speech.prepare_trial_speech(session)
    assert asked == [speech.settings.evaluate.language] == ["zh"]
    assert speech.teacher_wer.value == 0 and session.screen.costs.phases["trials"]["seconds"] >= 0
    # The teacher speaks once in a run, and again where something else decides what is heard.
    assert trial_speech.prepare_trial_speech(session).identity == speech.identity and len(asked) == 1
    session.shared_teacher.fingerprint = "another"
    assert trial_speech.prepare_trial_speech(session).identity != speech.identity and len(asked) == 2
