"""Alarms: which numbers contradict each other, at and beside every threshold."""

import math

import pytest
from made_run import finalist_row

from mamtra_ray.evaluate.alarms import Measured, alarm_text, chosen_alarms, finalist_alarms, teacher_alarms
from mamtra_ray.run.rows import FinalistRow, columns, row_from_columns
from mamtra_ray.search.outcome import measured_of
from mamtra_ray.speech.end_of_speech import EndOfSpeech, end_of_speech
from mamtra_ray.speech.error_rate import ErrorRate

GOOD = EndOfSpeech(0.0, 0.0, 0.0)
TEACHER = Measured("teacher", 1.0, ErrorRate(0.014, 0.003, 0.03), GOOD)


def measured(ce=1.0, wer=0.02, low=0.01, high=0.03, ends=GOOD, system="AMAM"):
    return Measured(system, ce, ErrorRate(wer, low, high), ends)


def kinds(alarms):
    return [alarm.kind for alarm in alarms]


@pytest.mark.parametrize(
    ("finalist", "expected"),
    [
        (measured(), []),
        # The run of review.md, A1: the teacher's CE, 62 % WER.
        (measured(ce=1.01, wer=0.62, low=0.55, high=0.7), ["ce_contradicts_wer"]),
        # Twice 1.4 % plus 10 points are 12.8 %.
        (measured(wer=0.2, low=0.1279), []),
        (measured(wer=0.2, low=0.1281), ["ce_contradicts_wer"]),
        # A CE more than 2 % above the teacher's explains the WER.
        (measured(ce=1.0199, wer=0.62, low=0.55), ["ce_contradicts_wer"]),
        (measured(ce=1.0201, wer=0.62, low=0.55), []),
        # Better than the teacher's CE and not understood: all the more.
        (measured(ce=0.9, wer=0.62, low=0.55), ["ce_contradicts_wer"]),
        (measured(ends=EndOfSpeech(0.10, 0.10, 0.10)), []),
        (measured(ends=EndOfSpeech(0.11, 0.0, 0.0)), ["does_not_stop"]),
        (measured(ends=EndOfSpeech(0.0, 0.11, 0.0)), ["stops_at_once"]),
        (measured(ends=EndOfSpeech(0.0, 0.0, 0.11)), ["fails"]),
        (measured(ends=EndOfSpeech(0.5, 0.5, 0.0)), ["does_not_stop", "stops_at_once"]),
        (measured(ce=math.nan), ["ce_not_finite"]),
        (Measured("AMAM", 1.0), []),  # nothing was spoken
        (Measured("AMAM", wer=ErrorRate(0.9, 0.8, 1.0)), []),  # the CE is not known
    ],
)
def test_a_finalist(finalist, expected):
    assert kinds(finalist_alarms(finalist, TEACHER)) == expected


def test_the_text_gives_the_numbers():
    row = measured(ce=1.01, wer=0.62, low=0.55, high=0.7, ends=EndOfSpeech(0.35, 0.0, 0.2, "logits are not finite"))
    text = alarm_text(finalist_alarms(row, TEACHER))
    assert "does not stop by itself in 35 % of the sentences" in text
    assert "nothing that can be heard in 20 % of the sentences (logits are not finite)" in text
    assert "CE (1.010, teacher 1.000)" in text and "62.0 % [55.0, 70.0], teacher 1.4 % [0.3, 3.0]" in text
    assert alarm_text([]) is None


@pytest.mark.parametrize(
    ("wer", "low", "codec", "expected"),
    [
        (0.02, 0.01, 0.003, []),
        (0.3, 0.2, 0.003, ["teacher_not_understood"]),
        (0.3, 0.2, 0.2, []),  # the codec, or the recognizer, is no better
        (0.3, 0.2, None, []),
        (0.9, 0.8, None, ["teacher_not_understood"]),
    ],
)
def test_the_teacher_beside_its_codec(wer, low, codec, expected):
    teacher = measured(wer=wer, low=low, high=1.0, system="teacher")
    floor = None if codec is None else Measured("codec", None, ErrorRate(codec, codec, codec))
    assert kinds(teacher_alarms(teacher, floor)) == expected


def test_the_teachers_own_outputs_may_fail():
    teacher = measured(ends=EndOfSpeech(0.0, 0.0, 1.0, "no room"), system="teacher")
    (alarm,) = teacher_alarms(teacher, None)
    assert (alarm.system, alarm.kind) == ("teacher", "fails") and "(no room)" in alarm.text


def test_an_export_far_worse_than_a_rival():
    chosen = measured(wer=0.3, low=0.2, high=0.4)
    near = measured(wer=0.12, low=0.1, high=0.16, system="AAMM")
    far = measured(wer=0.1, low=0.08, high=0.14, system="MMAA")
    assert chosen_alarms(chosen, [chosen, near]) == []  # 4 points between the intervals
    (alarm,) = chosen_alarms(chosen, [chosen, near, far])
    assert alarm.system == "AMAM" and "far above that of MMAA, 10.0 % [8.0, 14.0]" in alarm.text
    assert chosen_alarms(Measured("AMAM", 1.0), [Measured("AMAM", 1.0), far]) == []


def row(tokens, stopped=True, seconds=2.0, failure=None, **more):
    return {"speech_tokens": [1] * tokens, "stopped": stopped, "audio_seconds": seconds, "failure": failure, **more}


def test_how_sentences_end():
    rows = [
        row(50, fewest_tokens=4),
        row(5, fewest_tokens=4),
        row(400, stopped=False, failure="the model did not stop within the length limit"),
        row(0, seconds=0.0, failure="no speech token was generated"),
        row(4, fewest_tokens=4),  # as soon as it was allowed to
        row(3, seconds=0.1),
        row(0, stopped=False, seconds=0.0, failure="its logits are not finite"),
        row(50, seconds=0.0, failure="decoding to sound failed: why"),
        row(50, failure="recognition failed: why"),  # spoken all the same
        row(50),
    ]
    assert end_of_speech(rows) == EndOfSpeech(0.1, 0.3, 0.2, "its logits are not finite")
    assert end_of_speech([]) == EndOfSpeech(0.0, 0.0, 0.0)


def test_a_row_of_a_table_is_measured_as_far_as_it_was_heard():
    unheard = finalist_row("AMAM")
    assert measured_of(row_from_columns(FinalistRow, columns(unheard))) == Measured("AMAM", 1.0)
    old = columns(unheard) | {"wer": 0.1, "wer_low": 0.0, "wer_high": 0.2}
    assert measured_of(row_from_columns(FinalistRow, old)) == Measured("AMAM", 1.0, ErrorRate(0.1, 0.0, 0.2))
    ends = {"not_stopped": 0.1, "stopped_at_once": 0.2, "failed": 0.3}
    assert measured_of(row_from_columns(FinalistRow, old | ends)).ends == EndOfSpeech(0.1, 0.2, 0.3)
