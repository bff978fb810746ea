"""Alarms: what in a finished run contradicts itself, so that its result must not be used as it stands.

Plain Python on numbers that are already there. All rates are fractions (0.1 is 10 %), cross-entropies nats per token.
An alarm does not stop a run: it is shown on the screen, in the report and in ``finalists.parquet``, and decides with
others what is exported as ``best``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mamtra_ray.speech.end_of_speech import EndOfSpeech
from mamtra_ray.speech.error_rate import ErrorRate

CE_MARGIN = 0.02
"""A cross-entropy this much above the teacher's, relative to it, counts as the teacher's."""
WER_FACTOR, WER_POINTS = 2.0, 0.10
"""A WER is far above another one if its whole interval lies above this many times the other one plus this."""
WER_GAP = 0.05
"""A WER is far worse than another finalist's if this lies between their intervals, which then do not meet."""
SENTENCES_SHARE = 0.10
"""More sentences than this that go wrong in one way are a fault of the model, not of the sentences."""
UNKNOWN_CODEC_WER = 0.5
"""A teacher whose interval lies above this is not understood, whatever its codec (used where no codec was heard)."""


@dataclass(frozen=True)
class Alarm:
    """One contradiction."""

    kind: str
    """``ce_contradicts_wer``, ``does_not_stop``, ``stops_at_once``, ``fails``, ``ce_not_finite``,
    ``far_worse_than_finalist``, ``teacher_not_understood``."""
    system: str
    """The layout, or ``teacher``."""
    text: str
    """A clause that begins with a verb: "does not stop by itself in 35 % of the sentences"."""


@dataclass(frozen=True)
class Measured:
    """What is known of one system; None where it was not measured."""

    system: str
    ce: float | None = None
    wer: ErrorRate | None = None
    ends: EndOfSpeech | None = None


def finalist_alarms(finalist: Measured, teacher: Measured) -> list[Alarm]:
    """What contradicts itself in one finalist."""

    def alarm(kind: str, text: str) -> Alarm:
        return Alarm(kind, finalist.system, text)

    alarms = []
    if finalist.ce is not None and not math.isfinite(finalist.ce):
        alarms.append(alarm("ce_not_finite", f"has a held-out CE of {finalist.ce}: its training has diverged"))
    alarms += [alarm(kind, text) for kind, text in _wrong_ends(finalist.ends)]
    if (
        finalist.ce is not None
        and teacher.ce is not None
        and finalist.ce <= (1 + CE_MARGIN) * teacher.ce
        and _is_far_above(finalist, teacher)
    ):
        alarms.append(
            alarm(
                "ce_contradicts_wer",
                f"has the teacher's CE ({finalist.ce:.3f}, teacher {teacher.ce:.3f}) but not its words: WER"
                f" {finalist.wer}, teacher {teacher.wer}; generation may be broken",
            )
        )
    return alarms


def teacher_alarms(teacher: Measured, codec: Measured | None) -> list[Alarm]:
    """What is wrong with the teacher's speech: then nothing can be said about its students' either.

    Args:
        teacher: as heard.
        codec: the recordings after a round trip through the codec, the floor; None if there was none to hear.
    """
    alarms = [Alarm(kind, teacher.system, text) for kind, text in _wrong_ends(teacher.ends)]
    if codec is not None and _is_far_above(teacher, codec):
        alarms.append(
            Alarm(
                "teacher_not_understood",
                teacher.system,
                f"has a WER of {teacher.wer}, the codec's round trip only {codec.wer}",
            )
        )
    elif codec is None and teacher.wer is not None and teacher.wer.low > UNKNOWN_CODEC_WER:
        alarms.append(Alarm("teacher_not_understood", teacher.system, f"has a WER of {teacher.wer}"))
    return alarms


def chosen_alarms(chosen: Measured, others: Iterable[Measured]) -> list[Alarm]:
    """Whether the exported finalist is far worse than another one of its ratio.

    Args:
        chosen: the exported one.
        others: the finalists of its ratio.
    """
    heard = [(other.wer, other) for other in others if other.wer is not None]
    if chosen.wer is None or not heard:
        return []
    lowest_wer, lowest = min(heard, key=lambda pair: pair[0].value)
    if chosen.wer.low <= lowest_wer.high + WER_GAP:
        return []
    text = f"has a WER of {chosen.wer}, far above that of {lowest.system}, {lowest_wer}"
    return [Alarm("far_worse_than_finalist", chosen.system, text)]


def alarm_text(alarms: Iterable[Alarm]) -> str | None:
    """The ``alarm`` column of one system; None if there is none."""
    return "; ".join(alarm.text for alarm in alarms) or None


def _wrong_ends(ends: EndOfSpeech | None) -> list[tuple[str, str]]:
    if ends is None:
        return []
    because = f" ({ends.reason})" if ends.reason else ""
    wrong = (
        ("does_not_stop", "does not stop by itself", ends.not_stopped, ""),
        ("stops_at_once", "stops at once", ends.stopped_at_once, ""),
        ("fails", "says nothing that can be heard", ends.failed, because),
    )
    return [
        (kind, f"{what} in {100 * share:.0f} % of the sentences{detail}")
        for kind, what, share, detail in wrong
        if share > SENTENCES_SHARE
    ]


def _is_far_above(measured: Measured, floor: Measured) -> bool:
    if measured.wer is None or floor.wer is None:
        return False
    return measured.wer.low > WER_FACTOR * floor.wer.value + WER_POINTS
