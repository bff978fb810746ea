"""What the last lines of a search say, word by word."""

import dataclasses

import pytest
from made_run import finalist_row
from test_finalists import row as trial_row

from mamtra_ray.evaluate.alarms import Measured
from mamtra_ray.evaluate.verdict import Outcome, is_unusable, training_warnings, verdict
from mamtra_ray.speech.error_rate import ErrorRate

TEACHER = Measured("teacher", 1.164, ErrorRate(0.014, 0.003, 0.03))
HEARD = Measured("AMMAMMMAAAMA", 1.165, ErrorRate(0.008, 0.0, 0.018))
UNHEARD = Measured("AMMAMMMAAAMA", 1.165)


def outcome(best=HEARD, alarm=None, others=True, difference=(-0.006, -0.02, 0.01), speaks=True):
    return Outcome(best, alarm, others, None if difference is None else ErrorRate(*difference), 0.5, speaks)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            outcome(),
            "AMMAMMMAAAMA: WER 0.8 % [0.0, 1.8], as good as the teacher's 1.4 % [0.3, 3.0] within the intervals,"
            " at 50 % of its cache",
        ),
        (
            outcome(difference=(0.02, 0.005, 0.04)),
            "AMMAMMMAAAMA: WER 0.8 % [0.0, 1.8], worse than the teacher's 1.4 % [0.3, 3.0] by 2.0 points [0.5, 4.0],"
            " at 50 % of its cache",
        ),
        (
            outcome(difference=(-0.02, -0.04, -0.005)),
            "AMMAMMMAAAMA: WER 0.8 % [0.0, 1.8], better than the teacher's 1.4 % [0.3, 3.0] by 2.0 points [0.5, 4.0],"
            " at 50 % of its cache",
        ),
        (
            outcome(difference=(0.02, -0.3, 0.35)),
            "AMMAMMMAAAMA: WER 0.8 % [0.0, 1.8], as good as the teacher's 1.4 % [0.3, 3.0] within the intervals"
            " (40 sentences leave room for 35 points more errors), at 50 % of its cache",
        ),
        # A run of an earlier version has no paired difference: the intervals themselves decide.
        (
            outcome(difference=None),
            "AMMAMMMAAAMA: WER 0.8 % [0.0, 1.8], as good as the teacher's 1.4 % [0.3, 3.0] within the intervals,"
            " at 50 % of its cache",
        ),
        (
            outcome(Measured("AMMAMMMAAAMA", 1.2, ErrorRate(0.08, 0.06, 0.1)), difference=None),
            "AMMAMMMAAAMA: WER 8.0 % [6.0, 10.0], worse than the teacher's 1.4 % [0.3, 3.0], at 50 % of its cache",
        ),
        (
            outcome(alarm="does not stop by itself in 35 % of the sentences", others=False),
            "AMMAMMMAAAMA: do not use: it does not stop by itself in 35 % of the sentences; every finalist of its ratio"
            " has an alarm",
        ),
        (
            outcome(alarm="has a WER of 30 %, far above that of AAMM, 1 %"),
            "AMMAMMMAAAMA: do not use: it has a WER of 30 %, far above that of AAMM, 1 %",
        ),
        (
            outcome(UNHEARD, difference=None),
            "AMMAMMMAAAMA: CE 1.165 (teacher 1.164), at 50 % of its cache; whether it speaks as well is not known,"
            " because no speech was generated (evaluate.sentences=0)",
        ),
        (
            outcome(UNHEARD, difference=None, speaks=False),
            "AMMAMMMAAAMA: CE 1.165 (teacher 1.164), at 50 % of its cache",
        ),
    ],
)
def test_every_case(given, sentence):
    assert verdict(given, TEACHER, None, 40) == sentence


def test_where_the_teacher_is_not_understood_nothing_is_good():
    alarm = "has a WER of 90.0 % [80.0, 95.0]"
    assert verdict(outcome(), TEACHER, alarm, 40) == (
        "AMMAMMMAAAMA: cannot be judged, because the teacher itself has a WER of 90.0 % [80.0, 95.0]"
    )
    assert verdict(outcome(alarm="stops at once"), TEACHER, alarm, 40).endswith("and it stops at once")


@pytest.mark.parametrize(
    ("alarms", "teacher_alarm", "unusable"),
    [
        ({"AM": None, "MA": "bad"}, None, False),
        ({"AM": "bad", "MA": "bad"}, None, True),
        ({"AM": None}, "bad", True),
        ({}, None, False),
    ],
)
def test_exit_code(alarms, teacher_alarm, unusable):
    assert is_unusable(alarms, teacher_alarm) is unusable


def test_trainings_that_did_harm_are_counted_at_their_last_rung():
    def trained(layout, rung, ce, kl):
        return dataclasses.replace(trial_row(layout, rung, ce), kl=kl)

    # trial_row begins with a CE of 2.0 and a KL of 1.0.
    trials = [
        trained("AMAM", 0, 2.1, 0.5),  # worse at first, better in the end
        trained("AMAM", 1, 1.9, 0.5),
        trained("AMMA", 0, 1.9, 1.1),  # a better CE does not make up for the KL
        trained("MAAM", 0, 2.0, 1.0),  # no worse
    ]
    finalists = [finalist_row("AAMM", ce=3.2, ce_start=3.1), finalist_row("AMAM", ce=3.0, ce_start=3.1)]
    of_trials, of_finalist = training_warnings(trials, finalists)
    assert of_trials.startswith("1 of 3 trials ended worse than they began") and "AMMA" in of_trials
    assert of_finalist.startswith("AAMM ended worse than it began: CE 3.100 -> 3.200")
    assert training_warnings(trials[:2], finalists[1:]) == []
