"""Whether a result is good, in plain words: one sentence for every ratio of a search.

Plain Python; the sentences stand here so that screen, report and checkpoint card say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mamtra_ray.evaluate.alarms import Measured
from mamtra_ray.layouts import Layout
from mamtra_ray.run.rows import FinalistRow, TrialRow, is_worse_than_start
from mamtra_ray.speech.error_rate import ErrorRate

EXIT_UNUSABLE = 3
"""Exit code of a search that is complete but found nothing that can be used; 2 is input that cannot be used."""
UNCERTAIN_POINTS = 0.05
"""An upper bound of the paired difference above this is said: "as good as" then says little."""


@dataclass(frozen=True)
class Outcome:
    """What one ratio of a search came to."""

    best: Measured
    """The exported finalist."""
    alarm: str | None
    """Its alarms."""
    is_any_without_alarm: bool
    """Whether a finalist of its ratio has none."""
    difference: ErrorRate | None
    """Its WER minus the teacher's, paired; None if nothing was heard."""
    cache_share: float
    """Its cache's size over the teacher's, at the run's context length."""
    speaks: bool = True
    """Whether it is a model of speech, about which CE says too little."""


def verdict(outcome: Outcome, teacher: Measured, teacher_alarm: str | None, sentences: int) -> str:
    """One sentence: may the exported checkpoint be used, and how good is it?

    Args:
        outcome: of the ratio.
        teacher: what it is compared with.
        teacher_alarm: what is wrong with the teacher's own speech, if anything.
        sentences: how many were spoken; 0 if none.
    """
    best = outcome.best
    cache = f"at {outcome.cache_share:.0%} of its cache".replace("%", " %")
    if teacher_alarm:
        also = f", and it {outcome.alarm}" if outcome.alarm else ""
        return f"{best.system}: cannot be judged, because the teacher itself {teacher_alarm}{also}"
    if outcome.alarm:
        no_other = "" if outcome.is_any_without_alarm else "; every finalist of its ratio has an alarm"
        return f"{best.system}: do not use: it {outcome.alarm}{no_other}"
    if best.wer is None or teacher.wer is None:
        scores = f"{best.system}: CE {_ce(best)} (teacher {_ce(teacher)}), {cache}"
        if not outcome.speaks:
            return scores
        return (
            f"{scores}; whether it speaks as well is not known, because no speech was generated (evaluate.sentences=0)"
        )
    return f"{best.system}: WER {best.wer}, {_compared(outcome, teacher, sentences)}, {cache}"


def training_warnings(trials: Sequence[TrialRow], finalists: Sequence[FinalistRow]) -> list[str]:
    """Trainings that did harm: successive halving then ranks the damage, and a finalist is better left undistilled."""
    last = {row.layout: row for row in sorted(trials, key=lambda row: row.rung)}
    worse = [layout for layout, row in last.items() if is_worse_than_start(row)]
    warnings = []
    if worse:
        warnings.append(
            f"{len(worse)} of {len(last)} trials ended worse than they began (held-out CE or KL), such as {worse[0]}: "
            "lower search.learning_rate, or lengthen search.rung_tokens, in another run"
        )
    for row in finalists:
        if is_worse_than_start(row):
            warnings.append(
                f"{row.layout} ended worse than it began: CE {row.ce_start:.3f} -> {row.ce:.3f}, "
                f"KL {row.kl_start:.3f} -> {row.kl:.3f}"
            )
    return warnings


def is_unusable(alarm_of_layout: Mapping[Layout, str | None], teacher_alarm: str | None) -> bool:
    """Whether nothing that a search found can be used: the exit code is then :data:`EXIT_UNUSABLE`.

    A search with one good ratio of two, or one good finalist, has done its work. One whose every finalist has an
    alarm has not, and a script that goes on with ``best/`` must not take it for a success; nor where the teacher's
    own speech is not understood, with which every finalist is compared.

    Args:
        alarm_of_layout: of all finalists of all ratios.
        teacher_alarm: the teacher's.
    """
    return teacher_alarm is not None or (bool(alarm_of_layout) and all(alarm_of_layout.values()))


def _compared(outcome: Outcome, teacher: Measured, sentences: int) -> str:
    """The clause about the teacher; a paired difference says more than two intervals."""
    best, other = outcome.best, f"the teacher's {teacher.wer}"
    if outcome.difference is None:
        if best.wer is not None and teacher.wer is not None and best.wer.low > teacher.wer.high:
            return f"worse than {other}"
        return f"as good as {other} within the intervals"
    difference = 100 * outcome.difference.value
    low, high = 100 * outcome.difference.low, 100 * outcome.difference.high
    if low > 0:
        return f"worse than {other} by {difference:.1f} points [{low:.1f}, {high:.1f}]"
    if high < 0:
        return f"better than {other} by {-difference:.1f} points [{-high:.1f}, {-low:.1f}]"
    room = ""
    if high > 100 * UNCERTAIN_POINTS:
        room = f" ({sentences} sentences leave room for {high:.0f} points more errors)"
    return f"as good as {other} within the intervals{room}"


def _ce(measured: Measured) -> str:
    return "unknown" if measured.ce is None else f"{measured.ce:.3f}"
