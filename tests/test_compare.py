"""Students of several runs: the same paired test as by hand, and no comparison of what does not compare."""

import json
from dataclasses import dataclass, field, replace

import jiwer
import numpy as np
import pytest
from made_run import finalist_row

from mamtra_ray.artifacts import content_hash, write_checked_json
from mamtra_ray.compare.__main__ import main as compare
from mamtra_ray.compare.heard import heard_in, pairs_of
from mamtra_ray.config import load_config, save_config
from mamtra_ray.evaluate.evaluation import comparable_settings
from mamtra_ray.evaluate.results import scored, write_rows, write_summary
from mamtra_ray.run.folder import Reference, Score, read_runs, write_reference
from mamtra_ray.run.names import BEST, CONFIG, EXPORTED_LAYOUT, FINALISTS
from mamtra_ray.run.rows import FinalistRow, write_table
from mamtra_ray.speech.error_rate import ErrorRate

TEXTS = [f"{number} green cats watch the {place}" for number in ("five", "six", "nine") for place in ("sea", "town")]
A, B, C = "AAMM", "AMAM", "MMAA"
ALL = {"teacher": 0, A: 1, B: 4}


@dataclass
class Made:
    """What a run is made of; ``wrong[system]`` sentences lose their first word."""

    wrong: dict[str, int] = field(default_factory=lambda: dict(ALL))
    best: str = A
    texts: tuple[str, ...] = tuple(TEXTS)
    overrides: tuple[str, ...] = ()
    made_by: dict = field(default_factory=lambda: {"corpus": "c", "code": 2, "versions": {"torch": "1"}})
    teacher: str = "t"


def make(folder, made):
    config = load_config(None, ["evaluate.normalization=whisper_basic", *made.overrides])
    save_config(config, folder / CONFIG)
    made_by = {"teacher": made.teacher, "settings": str(config.seed), **made.made_by}
    ids = [f"u{index}" for index in range(len(made.texts))]
    identity = content_hash([made_by, config.evaluate.normalization, ids])
    rows = {
        system: [
            {
                "utterance_id": name,
                "text": text,
                "hypothesis": text.partition(" ")[2] if index < count else text,
                "failure": None,
                "stopped": True,
                "speech_tokens": [index, count],
                "audio_seconds": 1.5,
                "evaluation_hash": f"{system} {identity}",
            }
            for index, (name, text) in enumerate(zip(ids, made.texts, strict=True))
        ]
        for system, count in made.wrong.items()
    }
    evaluations = scored(rows, config.evaluate.normalization, identity)
    later = {**rows["teacher"][0], "utterance_id": "of an earlier, longer evaluation", "hypothesis": ""}
    for system in rows:
        write_rows(folder, system, [*evaluations[system].rows, later])
    write_summary(folder, evaluations, made_by, [], comparable_settings(config))
    finalists = [
        finalist_row(system, wer=evaluations[system].wer, evaluation=identity, cache_bytes=2.5e6)
        for system in made.wrong
        if system != "teacher"
    ]
    write_table(folder / FINALISTS, finalists, FinalistRow)
    write_reference(folder, Reference(1.0, len(ids), Score(ErrorRate(0, 0, 0)), evaluation=identity))
    write_checked_json(folder / BEST / EXPORTED_LAYOUT, {"kind": "layout", "schema_version": 1, "layout": made.best})
    return folder


@pytest.fixture
def two(tmp_path):
    """A run whose best is A, and one with another seed whose best is C."""
    other = Made(wrong={"teacher": 0, B: 2, C: 5}, best=C, overrides=("seed=3",))
    return make(tmp_path / "one", Made()), make(tmp_path / "two", other)


def test_the_paired_test_is_the_one_by_hand(two):
    heard = heard_in(read_runs(two))
    assert [(one.run, one.system) for one in heard] == [("one", "teacher"), ("one", A), ("two", C)]
    (pair,) = pairs_of(heard)
    errors = {count: [int(index < count) for index in range(6)] for count in (1, 5)}
    words = [len(text.split()) for text in TEXTS]
    heard_texts = [text.partition(" ")[2] if index < 5 else text for index, text in enumerate(TEXTS)]
    assert heard[2].evaluation.wer.value == pytest.approx(jiwer.wer(TEXTS, heard_texts))
    # Both resampled together, by draws of our own.
    draws = np.random.default_rng(7).integers(0, 6, (20_000, 6))
    difference = np.array(errors[1]) - np.array(errors[5])
    resampled = difference[draws].sum(1) / np.array(words)[draws].sum(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    found = pair.paired.difference
    assert found.value == pytest.approx(difference.sum() / sum(words))
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert pair.verdict == "better" and pair.paired.probability_a_not_worse == pytest.approx(1, abs=0.01)


def test_all_finalists_and_what_is_not_told_apart(two, capsys):
    heard = heard_in(read_runs(two), all_finalists=True)
    assert [one.name for one in heard] == ["one: teacher", f"one: {A}", f"one: {B}", f"two: {B}", f"two: {C}"]
    verdicts = {(one.a.name, one.b.name): one.verdict for one in pairs_of(heard)}
    assert len(verdicts) == 6 and verdicts[f"one: {A}", f"two: {B}"] == "not told apart"
    assert verdicts[f"one: {B}", f"two: {B}"] in ("worse", "not told apart")
    assert compare([*map(str, two), "--all"]) == 0
    printed = capsys.readouterr().out
    assert "6 sentences, whisper_basic normalization" in printed and "6 pairs" in printed
    assert printed.count("2.50") == 4 and "first is better" in printed


def test_json_has_what_the_tables_have(two, capsys):
    assert compare([*map(str, two), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [one["system"] for one in content["systems"]] == ["teacher", A, C]
    (pair,) = content["pairs"]
    assert pair["verdict"] == "better" and pair["difference"][0] == pytest.approx(-4 / 36)


def test_teachers_that_said_something_else_are_both_shown(tmp_path):
    one = make(tmp_path / "one", Made())
    two = make(tmp_path / "two", Made(wrong={**ALL, "teacher": 1}, teacher="another"))
    assert [one.name for one in heard_in(read_runs([one, two])) if one.system == "teacher"] == [
        "one: teacher",
        "two: teacher",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"overrides": ("evaluate.recognizer=whisper:other",)}, r"evaluate\.recognizer was 'demo' and 'whisper:"),
        ({"overrides": ("evaluate.normalization=seed",)}, r"evaluate\.normalization was 'whisper_basic' and 'seed'"),
        ({"overrides": ("evaluate.temperature=0.5",)}, r"evaluate\.temperature was 0\.0 and 0\.5"),
        ({"texts": tuple(TEXTS[:4])}, r"other sentences \(6 and 4\)"),
        ({"texts": (*TEXTS[:5], "two owls")}, r"other sentences \(6 and 6\)"),
        ({"made_by": {"corpus": "d", "code": 2, "versions": {"torch": "1"}}}, "the corpus of their evaluations differ"),
        ({"made_by": {"corpus": "c", "code": 2, "versions": {"torch": "2"}}}, "the versions of their evaluations"),
    ],
)
def test_what_does_not_compare_is_refused_in_one_sentence(tmp_path, capsys, changes, sentence):
    runs = make(tmp_path / "one", Made()), make(tmp_path / "two", replace(Made(), **changes))
    assert compare([str(run) for run in runs]) == 2
    import re

    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line) and str(runs[1]) in line


def test_a_run_without_a_whole_evaluation_is_named(two, capsys, tmp_path):
    one, _ = two
    save_config(load_config(None), tmp_path / "three" / CONFIG)
    assert compare([str(one), str(tmp_path / "three")]) == 2
    assert f"python -m mamtra_ray.evaluate --run {tmp_path / 'three'}" in capsys.readouterr().err
    rows = (one / "evaluation" / f"{A}.jsonl").read_bytes().splitlines(keepends=True)
    (one / "evaluation" / f"{A}.jsonl").write_bytes(b"".join([*rows[1:], rows[0]]))
    assert compare([str(one)]) == 2
    assert f"{A}.jsonl is not of the evaluation" in capsys.readouterr().err
    summary = one / "evaluation" / "summary.json"
    content = json.loads(summary.read_text())
    write_checked_json(summary, {**content, "schema_version": 3})
    assert compare([str(one)]) == 2
    assert "is of an earlier version" in capsys.readouterr().err
    assert compare([]) == 2
