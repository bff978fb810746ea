"""The race of the finalists: who is out, who goes on, and for how many sentences."""

import dataclasses

import numpy as np
import pytest
from made_run import finalist_row
from scipy.stats import binomtest

from mamtra_ray.artifacts import read_json
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.race import Race, run_race
from mamtra_ray.evaluate.results import scored
from mamtra_ray.evaluate.run_scores import choose, contenders, read_race, write_race
from mamtra_ray.run.names import RACE
from mamtra_ray.speech.error_rate import ErrorRate

WORDS = [f"word{number}" for number in range(10)]


class Speech:
    """Systems that lose each word of a sentence with a probability of their own; counts what they say."""

    def __init__(self, rates: dict[str, float], sentences: int = 1000, seed: int = 0) -> None:
        self.rates, self.available = rates, sentences
        self.said: list[tuple[tuple[str, ...], int]] = []
        rng = np.random.default_rng(seed)
        self.kept = {system: rng.random((sentences, len(WORDS))) >= rate for system, rate in rates.items()}

    def hear(self, systems, sentences):
        self.said.append((tuple(systems), sentences))
        rows = {
            system: [
                {
                    "utterance_id": f"u{number}",
                    "text": " ".join(WORDS),
                    "hypothesis": " ".join(word for word, kept in zip(WORDS, row, strict=True) if kept),
                    "failure": None,
                    "stopped": True,
                    "speech_tokens": [1],
                    "audio_seconds": 1.0,
                }
                for number, row in enumerate(self.kept[system][: min(sentences, self.available)])
            ]
            for system in systems
        }
        return scored(rows, "whisper_basic")


def race_of(speech, groups, first, most):
    heard = speech.hear([system for group in groups for system in group], first)
    speech.said.clear()
    return run_race(groups, heard, speech.hear, most)


def test_what_is_clear_is_not_said_again():
    speech = Speech({"AM": 0.02, "MA": 0.5})
    race = race_of(speech, [["AM", "MA"]], 40, 640)
    assert speech.said == [] and race.sentences == {"AM": 40, "MA": 40}
    assert set(race.lost) == {"MA"}
    assert "over AM on 40 sentences" in race.lost["MA"] and race.lost["MA"].startswith("+")


def test_a_small_difference_is_found_with_more_sentences_and_ends_the_race_then():
    speech = Speech({"AM": 0.05, "MA": 0.08, "MM": 0.5})
    race = race_of(speech, [["AM", "MA", "MM"]], 20, 1000)
    assert set(race.lost) == {"MA", "MM"}
    counts = [count for _, count in speech.said]
    assert counts == [20 * 2 ** (round + 1) for round in range(len(counts))] and counts[-1] < 1000
    assert all(systems == ("AM", "MA") for systems, _ in speech.said), "the third one was out at once"
    assert race.sentences == {"AM": counts[-1], "MA": counts[-1], "MM": 20}


def test_twins_go_on_until_the_budget_is_spent():
    speech = Speech({"AM": 0.05, "MA": 0.05})
    speech.kept["MA"] = speech.kept["AM"][:, ::-1]
    race = race_of(speech, [["AM", "MA"]], 40, 250)
    assert race.lost == {} and race.sentences == {"AM": 250, "MA": 250}
    assert [count for _, count in speech.said] == [80, 160, 250]


def test_it_ends_where_there_are_no_further_sentences():
    speech = Speech({"AM": 0.05, "MA": 0.05}, sentences=50)
    speech.kept["MA"] = speech.kept["AM"][:, ::-1]
    assert race_of(speech, [["AM", "MA"]], 40, 1000).sentences == {"AM": 50, "MA": 50}
    assert [count for _, count in speech.said] == [80, 100]


def test_ratios_do_not_race_against_each_other():
    speech = Speech({"AM": 0.02, "MA": 0.02, "MMMA": 0.9})
    speech.kept["MA"] = speech.kept["AM"][:, ::-1]
    race = race_of(speech, [["AM", "MA"], ["MMMA"], []], 40, 80)
    assert race.lost == {} and race.sentences == {"AM": 80, "MA": 80, "MMMA": 40}


@pytest.mark.slow
def test_an_equal_one_seldom_loses():
    """Four looks at intervals of 95 %: an equal system is out by chance in a few races of a hundred."""
    lost = sum(
        bool(race_of(Speech({"AM": 0.1, "MA": 0.1}, seed=seed), [["AM", "MA"]], 20, 160).lost) for seed in range(60)
    )
    assert binomtest(lost, 60, 0.2, alternative="greater").pvalue > 1e-3


def row(layout, wer, ce, alarm=None):
    return finalist_row(layout, wer=ErrorRate(wer, wer - 0.01, wer + 0.01), ce=ce, alarm=alarm)


def test_the_race_decides_before_the_cross_entropy():
    rows = [row("AAMM", 0.02, 1.3), row("AMAM", 0.02, 1.2), row("AMMA", 0.02, 1.1), row("MAMM", 0.5, 1.0)]
    assert contenders(rows, ("1:1", "1:3")) == [["AAMM", "AMAM", "AMMA"], ["MAMM"]]
    race = Race({"AMMA": "worse"}, {"AAMM": 80, "AMAM": 80, "AMMA": 80, "MAMM": 40})
    _, best = choose(rows, ("1:1", "1:3"), race)
    assert str(best["1:1"].layout) == "AMAM" and str(best["1:3"].layout) == "MAMM"
    assert str(choose(rows, ("1:1",))[1]["1:1"].layout) == "AMMA"


def test_one_with_an_alarm_does_not_run_and_is_not_chosen():
    rows = [row("AAMM", 0.02, 1.3), row("AMAM", 0.0, 1.0, alarm="stops at once")]
    assert contenders(rows, ("1:1",)) == [["AAMM"]]
    _, best = choose(rows, ("1:1",), Race({}, {"AAMM": 40}))
    assert str(best["1:1"].layout) == "AAMM"


def test_a_race_belongs_to_its_evaluation(tmp_path):
    race = Race({"AMMA": "worse"}, {"AAMM": 80, "AMMA": 80})
    assert read_race(tmp_path, "e") is None
    write_race(tmp_path, race, "e")
    assert dataclasses.asdict(read_race(tmp_path, "e")) == dataclasses.asdict(race)
    assert read_race(tmp_path, "of other sentences") is None
    content = read_json(tmp_path / RACE)
    (tmp_path / RACE).write_text(str(content).replace("AMMA", "AMAM").replace("'", '"'))
    with pytest.raises(InputError, match="checksum"):
        read_race(tmp_path, "e")
