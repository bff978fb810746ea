"""The end of a search: from distilled finalists to what a user gets.

Speech and WER, alarms, the best of every ratio, its checkpoint, and the words on the screen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mamtra_ray.alarms import COLUMNS as ALARM_COLUMNS
from mamtra_ray.alarms import Measured, alarm_text, chosen_alarms, finalist_alarms, teacher_alarms, wer_text
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate import evaluate_systems
from mamtra_ray.export import export_student
from mamtra_ray.finalists import choose_best, student_folder
from mamtra_ray.layouts import num_attention_layers
from mamtra_ray.metrics import SearchMetrics
from mamtra_ray.progress import table
from mamtra_ray.run_folder import BEST, CODEC, TEACHER, TRIALS, Reference, Score
from mamtra_ray.session import Session
from mamtra_ray.shared_batches import batches
from mamtra_ray.shared_cache import SharedCache
from mamtra_ray.training import validate
from mamtra_ray.verdict import Outcome, verdict

Row = dict[str, Any]


def measure_wer(
    session: Session, finalists: list[Row], validation: SharedCache, metrics: SearchMetrics
) -> tuple[list[Row], Reference]:
    """Let teacher and finalists speak and a recogniser listen.

    Returns:
        The finalists' rows with their error rates and alarms, and what to compare them with.
    """
    config, folder = session.config, session.folder
    teacher = session.teacher
    held_out = batches(validation, teacher.sequence, batch_tokens=4 * config.distill.batch_tokens, seed=0, epoch=0)
    reference = Reference(validate(teacher.model, held_out).ce, config.evaluate.sentences)
    teacher_measured = Measured(TEACHER, reference.teacher_ce)
    measured = {row["layout"]: Measured(row["layout"], row["ce"]) for row in finalists}
    if config.evaluate.sentences:
        systems = {row["layout"]: student_folder(folder, row["layout"]) for row in finalists}
        with session.screen.phase("speech", f"{config.evaluate.sentences} sentences by teacher and finalists"):
            heard = evaluate_systems(
                config, systems, folder, on_progress=lambda done, total: session.screen.count(done, total, "utterances")
            )
        scores = {name: Score(e.wer, e.wer_low, e.wer_high, e.cer, dict(e.metrics)) for name, e in heard.items()}
        finalists = [
            {**row, **scores[row["layout"]].columns(), **heard[row["layout"]].difference_columns()} for row in finalists
        ]
        metrics.best_wer.set(min(row["wer"] for row in finalists))
        measured = {layout: heard[layout].measured(one.ce) for layout, one in measured.items()}
        teacher_measured = heard[TEACHER].measured(reference.teacher_ce)
        alarms = teacher_alarms(teacher_measured, heard[CODEC].measured() if CODEC in heard else None)
        reference = dataclasses.replace(
            reference, teacher=scores[TEACHER], codec=scores.get(CODEC), teacher_alarm=alarm_text(alarms)
        )
    for row in finalists:
        one = measured[row["layout"]]
        row |= one.ends.columns() if one.ends else dict.fromkeys(ALARM_COLUMNS)
        row["alarm"] = alarm_text(finalist_alarms(one, teacher_measured))
    return finalists, reference


def choose(finalists: list[Row], ratios: Sequence[str], num_layers: int) -> dict[str, Row]:
    """By ratio the finalist to export; one that is far worse than a finalist beside it gets an alarm for that."""
    best = {}
    for ratio in ratios:
        kept = num_attention_layers(num_layers, ratio)
        same_ratio = [row for row in finalists if row["layout"].count("A") == kept]
        row = choose_best(same_ratio)
        far_worse = alarm_text(chosen_alarms(Measured.from_row(row), map(Measured.from_row, same_ratio)))
        row["alarm"] = "; ".join(filter(None, (row["alarm"], far_worse))) or None
        best[ratio] = row
    return best


def export(session: Session, best: Mapping[str, Row]) -> tuple[dict[str, Path], list[InputError]]:
    """The best finalist of every ratio as a checkpoint for plain transformers; ``best/`` is the first ratio's.

    Returns:
        Folders by layout, and why others could not be written: what a search found is worth a report all the same.
    """
    folders, refusals = {}, []
    with session.screen.phase("export", "a checkpoint that plain transformers loads"):
        for index, (ratio, row) in enumerate(best.items()):
            folder = session.folder / (BEST if index == 0 else f"{BEST}-{ratio.replace(':', '-')}")
            student = student_folder(session.folder, row["layout"])
            try:
                export_student(student, folder, row, session.teacher, session.config.teacher)
                folders[row["layout"]] = folder
            except InputError as error:
                refusals.append(error)
    return folders, refusals


def print_summary(
    session: Session,
    finalists: list[Row],
    reference: Reference,
    best: Mapping[str, Row],
    folders: Mapping[str, Path],
    report: Path,
) -> None:
    """A table of the outcome, where everything lies, how to go on, and in plain words whether the result is good."""
    all_attention = session.costs(session.num_layers)["cache_bytes"]
    rows = [
        ["1:0", "A" * session.num_layers, "teacher", f"{reference.teacher_ce:.3f}", _wer(reference.teacher), "100 %"]
    ]
    for row in finalists:
        score = None if row["wer"] is None else Score(row["wer"], row["wer_low"], row["wer_high"])
        origin = row["origin"] + (" *" if row["layout"] in folders else "")
        cache = f"{row['cache_bytes'] / all_attention:.0%}"
        rows.append([row["ratio"], row["layout"], origin, f"{row['ce']:.3f}", _wer(score), cache])
    if reference.codec is not None:
        rows.append(["", "", "codec round trip", "", _wer(reference.codec), ""])
    context, folder = session.config.search.context_length, session.folder
    more = 2 * session.config.search.trials
    lines = [
        "",
        table(["ratio", "layout", "from", "CE", "WER [95 %]", f"cache at {context:,}"], rows),
        "* exported",
        "",
        *[f"checkpoint  {path}  ({layout})" for layout, path in folders.items()],
        f"report      {report}",
        f"trials      {folder / TRIALS}",
        "",
        f"more trials:     python -m mamtra_ray.search --resume --run {folder} search.trials={more}",
        f"another layout:  python -m mamtra_ray.export --run {folder} --layout {finalists[0]['layout']}",
        "",
        *verdict_lines(finalists, reference, best, all_attention),
    ]
    session.screen.say("\n".join(lines))


def verdict_lines(
    finalists: Sequence[Row], reference: Reference, best: Mapping[str, Row], teacher_cache_bytes: float
) -> list[str]:
    """Alarms of all systems, then for every ratio whether its result is good."""
    score = reference.teacher
    teacher = Measured(TEACHER, reference.teacher_ce)
    if score is not None:
        teacher = dataclasses.replace(teacher, wer=score.wer, wer_low=score.wer_low, wer_high=score.wer_high)
    alarms = {row["layout"]: row["alarm"] for row in finalists} | {"the teacher": reference.teacher_alarm}
    lines = [f"alarm: {name} {text}" for name, text in alarms.items() if text]
    for row in best.values():
        outcome = Outcome(
            best=Measured.from_row(row),
            alarm=row["alarm"],
            is_any_without_alarm=any(not one["alarm"] for one in finalists if one["ratio"] == row["ratio"]),
            difference=_difference(row),
            cache_share=row["cache_bytes"] / teacher_cache_bytes,
        )
        lines.append(verdict(outcome, teacher, reference.teacher_alarm, reference.evaluation_sentences))
    return lines


def _difference(row: Row) -> tuple[float, float, float] | None:
    """WER minus the teacher's and its interval."""
    if row.get("wer_difference") is None:
        return None
    return row["wer_difference"], row["wer_difference_low"], row["wer_difference_high"]


def _wer(score: Score | None) -> str:
    if score is None:
        return ""
    return wer_text(Measured("", wer=score.wer, wer_low=score.wer_low, wer_high=score.wer_high))
