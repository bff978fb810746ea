"""Alarms: what in a finished run contradicts itself, so that its result must not be used as it stands.

Plain Python on numbers that are already there. All rates are fractions (0.1 is 10 %), cross-entropies nats per token.
An alarm does not stop a run: it is shown on the screen, in the report and in ``finalists.parquet``, and decides with
others what is exported as ``best``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CE_MARGIN = 0.02
"""A cross-entropy this much above the teacher's, relative to it, counts as the teacher's."""
WER_FACTOR, WER_POINTS = 2.0, 0.10
"""A WER is far above another one if its whole interval lies above this many times the other one plus this."""
WER_GAP = 0.05
"""A WER is far worse than another finalist's if this lies between their intervals, which then do not meet."""
SENTENCES_SHARE = 0.10
"""More sentences than this that go wrong in one way are a fault of the model, not of the sentences."""
ALMOST_NO_SPEECH_SECONDS = 0.2
"""Shorter than any word."""
UNKNOWN_CODEC_WER = 0.5
"""A teacher whose interval lies above this is not understood, whatever its codec (used where no codec was heard)."""

COLUMNS = ("not_stopped", "stopped_at_once", "failed", "alarm")
"""What a finished run adds to the columns of the finalists table; tables of earlier versions lack them."""


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
class EndOfSpeech:
    """How a system's sentences ended; each a share of all its sentences."""

    not_stopped: float
    """Ran into the length limit."""
    stopped_at_once: float
    """Ended by the model as soon as it was allowed to, or after almost no sound."""
    failed: float
    """Neither: nothing to hear for another reason."""
    reason: str = ""
    """Of the first one that failed."""

    def columns(self) -> dict[str, float]:
        """As columns of the finalists table."""
        return {"not_stopped": self.not_stopped, "stopped_at_once": self.stopped_at_once, "failed": self.failed}


@dataclass(frozen=True)
class Measured:
    """What is known of one system; None where it was not measured."""

    system: str
    ce: float | None = None
    wer: float | None = None
    wer_low: float | None = None
    wer_high: float | None = None
    ends: EndOfSpeech | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Measured:
        """From a row of the finalists table, of this version or an earlier one."""
        names = ("not_stopped", "stopped_at_once", "failed")
        known = all(row.get(name) is not None for name in names)
        return cls(
            system=row["layout"],
            ce=row["ce"],
            wer=row["wer"],
            wer_low=row["wer_low"],
            wer_high=row["wer_high"],
            ends=EndOfSpeech(*(row[name] for name in names)) if known else None,
        )


def end_of_speech(rows: Sequence[Mapping[str, Any]]) -> EndOfSpeech:
    """Shares over the rows of an evaluation.

    Args:
        rows: ``speech_tokens``, ``stopped``, ``audio_seconds``, ``failure`` and ``fewest_tokens`` (speech tokens below
            which the stop was barred; rows of earlier versions lack it).
    """
    counts = dict.fromkeys(("not_stopped", "stopped_at_once", "failed"), 0)
    for row in rows:
        if kind := _end_of_row(row):
            counts[kind] += 1
    reason = next((row["failure"] for row in rows if _end_of_row(row) == "failed"), "")
    return EndOfSpeech(**{kind: count / max(1, len(rows)) for kind, count in counts.items()}, reason=reason)


def _end_of_row(row: Mapping[str, Any]) -> str | None:
    num_tokens = len(row["speech_tokens"])
    if not row["stopped"]:
        # Without a token the model was never asked: the text was too long, or its logits were not finite.
        return "not_stopped" if num_tokens else "failed"
    barred = row.get("fewest_tokens") or 0
    if num_tokens <= barred or (not row["failure"] and row["audio_seconds"] < ALMOST_NO_SPEECH_SECONDS):
        return "stopped_at_once"
    return "failed" if row["failure"] and not row["audio_seconds"] else None


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
                f" {wer_text(finalist)}, teacher {wer_text(teacher)}; generation may be broken",
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
                f"has a WER of {wer_text(teacher)}, the codec's round trip only {wer_text(codec)}",
            )
        )
    elif codec is None and teacher.wer_low is not None and teacher.wer_low > UNKNOWN_CODEC_WER:
        alarms.append(Alarm("teacher_not_understood", teacher.system, f"has a WER of {wer_text(teacher)}"))
    return alarms


def chosen_alarms(chosen: Measured, others: Iterable[Measured]) -> list[Alarm]:
    """Whether the exported finalist is far worse than another one of its ratio.

    Args:
        chosen: the exported one.
        others: the finalists of its ratio.
    """
    heard = [other for other in others if other.wer is not None and other.wer_high is not None]
    lowest = min(heard, key=lambda other: other.wer or 0.0, default=None)
    if lowest is None or chosen.wer_low is None or chosen.wer_low <= (lowest.wer_high or 0.0) + WER_GAP:
        return []
    text = f"has a WER of {wer_text(chosen)}, far above that of {lowest.system}, {wer_text(lowest)}"
    return [Alarm("far_worse_than_finalist", chosen.system, text)]


def alarm_text(alarms: Iterable[Alarm]) -> str | None:
    """The ``alarm`` column of one system; None if there is none."""
    return "; ".join(alarm.text for alarm in alarms) or None


def wer_text(measured: Measured) -> str:
    """``0.8 % [0.0, 1.8]``; empty without a WER."""
    if measured.wer is None:
        return ""
    if measured.wer_low is None or measured.wer_high is None:
        return f"{100 * measured.wer:.1f} %"
    return f"{100 * measured.wer:.1f} % [{100 * measured.wer_low:.1f}, {100 * measured.wer_high:.1f}]"


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
    if measured.wer_low is None or floor.wer is None:
        return False
    return measured.wer_low > WER_FACTOR * floor.wer + WER_POINTS
