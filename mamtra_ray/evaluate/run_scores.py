"""What was heard of a search's finalists, as its tables have it: rates, alarms, the one to export of every ratio.

The search writes these tables, and ``evaluate`` on a finished run writes them anew: report, export and screen read the
same figures, those of the last evaluation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mamtra_ray.artifacts import read_manifest_of, write_manifest
from mamtra_ray.evaluate.alarms import Measured, alarm_text, chosen_alarms, finalist_alarms, teacher_alarms
from mamtra_ray.evaluate.race import Race
from mamtra_ray.evaluate.results import Evaluation
from mamtra_ray.run.folder import Reference, Score, read_reference, write_reference
from mamtra_ray.run.names import CODEC, FINALISTS, RACE, TEACHER
from mamtra_ray.run.rows import FinalistRow, read_table, write_table

_RACE, _RACE_VERSION = "race", 1


def with_scores(
    finalists: Sequence[FinalistRow], heard: Mapping[str, Evaluation], teacher_ce: float
) -> tuple[list[FinalistRow], Reference]:
    """Finalists with their rates and alarms, and what to compare them with.

    Args:
        finalists: all of a run.
        heard: evaluations of all of them, of the teacher and perhaps of the codec; empty if nothing was spoken.
        teacher_ce: held out, nats per token.
    """
    teacher, reference = Measured(TEACHER, teacher_ce), Reference(teacher_ce, 0)
    if heard:
        teacher = heard[TEACHER].measured(teacher_ce)
        codec = heard.get(CODEC)
        reference = Reference(
            teacher_ce,
            heard[TEACHER].sentences,
            teacher=_score(heard[TEACHER]),
            codec=_score(codec) if codec else None,
            teacher_alarm=alarm_text(teacher_alarms(teacher, codec.measured() if codec else None)),
            evaluation=heard[TEACHER].identity,
        )
        finalists = [_with_speech(row, heard[str(row.layout)]) for row in finalists]
    return [
        dataclasses.replace(row, alarm=alarm_text(finalist_alarms(measured_of(row), teacher))) for row in finalists
    ], reference


def choose(
    finalists: Sequence[FinalistRow], ratios: Sequence[str], race: Race | None = None
) -> tuple[list[FinalistRow], dict[str, FinalistRow]]:
    """By ratio the finalist to export; one that is far worse than a finalist beside it gets an alarm for that.

    Args:
        finalists: all of a run.
        ratios: of the search.
        race: of these finalists, if there was one.

    Returns:
        All finalists, and the chosen ones by ratio.
    """
    rows, best = {row.layout: row for row in finalists}, {}
    for ratio in ratios:
        same_ratio = [row for row in rows.values() if row.layout.ratio == ratio]
        row = choose_best(same_ratio, race)
        far_worse = alarm_text(chosen_alarms(measured_of(row), map(measured_of, same_ratio)))
        alarm = "; ".join(filter(None, (row.alarm, far_worse))) or None
        best[ratio] = rows[row.layout] = dataclasses.replace(row, alarm=alarm)
    return list(rows.values()), best


def choose_best(rows: Sequence[FinalistRow], race: Race | None = None) -> FinalistRow:
    """The finalist to export among those of one ratio: one without an ``alarm``, if there is any.

    A WER from a few dozen sentences is noisy, so it only rules layouts out: among those whose WER lies within the
    95 % interval of the lowest one, or that a race has left, the lowest held-out CE wins. Without a WER the CE decides
    alone.
    """
    rows = [row for row in rows if not row.alarm] or list(rows)
    if race is not None and {str(row.layout) for row in rows} <= race.sentences.keys():
        rows = [row for row in rows if str(row.layout) not in race.lost]
        return min(rows, key=lambda row: (not math.isfinite(row.ce), row.ce))
    heard = [(row.wer, row) for row in rows if row.wer is not None]
    if heard:
        lowest, _ = min(heard, key=lambda pair: (pair[0].value, pair[1].ce))
        rows = [row for wer, row in heard if wer.value <= lowest.high]
    return min(rows, key=lambda row: (not math.isfinite(row.ce), row.ce))


def update_run(folder: Path, heard: Mapping[str, Evaluation], ratios: Sequence[str]) -> dict[str, FinalistRow] | None:
    """Write what was heard into the tables of a finished search.

    Returns:
        The finalist to export of every ratio; None if there are no tables yet: the search writes them at its end.
    """
    finalists, reference = read_table(folder / FINALISTS, FinalistRow), read_reference(folder)
    if not finalists or reference is None:
        return None
    finalists, reference = with_scores(finalists, heard, reference.teacher_ce)
    finalists, best = choose(finalists, ratios, read_race(folder, reference.evaluation))
    # A stop between the two leaves tables of different evaluations, which reading the run then says.
    write_table(folder / FINALISTS, finalists, FinalistRow)
    write_reference(folder, reference)
    return best


def contenders(finalists: Sequence[FinalistRow], ratios: Sequence[str]) -> list[list[str]]:
    """Layouts of each ratio that may become the exported one: those without an alarm."""
    return [[str(row.layout) for row in finalists if row.layout.ratio == ratio and not row.alarm] for ratio in ratios]


def write_race(folder: Path, race: Race, evaluation: str) -> None:
    """``race.json``; ``evaluation`` identifies what was heard of all finalists before."""
    content = dataclasses.asdict(race)
    write_manifest(folder / RACE, _RACE, _RACE_VERSION, {"evaluation": evaluation}, **content)


def read_race(folder: Path, evaluation: str) -> Race | None:
    """The race that followed an evaluation, if there was one."""
    found = read_manifest_of(folder / RACE, _RACE, _RACE_VERSION, {"evaluation": evaluation})
    return None if found is None else Race(found["lost"], found["sentences"])


def measured_of(row: FinalistRow) -> Measured:
    """A finalist as :mod:`mamtra_ray.evaluate.alarms` looks at it."""
    return Measured(str(row.layout), row.ce, row.wer, row.ends)


def _score(evaluation: Evaluation) -> Score:
    return Score(evaluation.wer, evaluation.cer, dict(evaluation.metrics))


def _with_speech(row: FinalistRow, evaluation: Evaluation) -> FinalistRow:
    paired = evaluation.difference_to_teacher
    return dataclasses.replace(
        row,
        wer=evaluation.wer,
        cer=evaluation.cer,
        wer_difference=paired.difference if paired else None,
        ends=evaluation.measured().ends,
        metrics=dict(evaluation.metrics),
        evaluation=evaluation.identity,
    )
