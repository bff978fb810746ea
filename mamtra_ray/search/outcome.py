"""The end of a search: from distilled finalists to what a user gets.

Speech and WER, alarms, the best of every ratio, its checkpoint, and the words on the screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mamtra_ray.distill.training import VALIDATION_PARTS, validate
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.alarms import Measured
from mamtra_ray.evaluate.evaluation import evaluate_systems
from mamtra_ray.evaluate.race import Race, run_race
from mamtra_ray.evaluate.results import Evaluation
from mamtra_ray.evaluate.run_scores import contenders, measured_of, with_scores, write_race
from mamtra_ray.evaluate.verdict import Outcome, training_warnings, verdict
from mamtra_ray.export.checkpoint import export_student, form_of
from mamtra_ray.layouts import Layout
from mamtra_ray.run.folder import Reference, Score
from mamtra_ray.run.names import TEACHER, TRIALS, best_folder, student_folder
from mamtra_ray.run.rows import FinalistRow, TrialRow
from mamtra_ray.run.session import Session
from mamtra_ray.runtime.progress import said_while, table
from mamtra_ray.search.metrics import SearchMetrics
from mamtra_ray.teacher_cache.batches import batches
from mamtra_ray.teacher_cache.shared import SharedCache


def measure_wer(
    session: Session, finalists: Sequence[FinalistRow], validation: SharedCache, metrics: SearchMetrics
) -> tuple[list[FinalistRow], Reference]:
    """Let teacher and finalists speak and a recognizer listen.

    Returns:
        The finalists' rows with their error rates and alarms, and what to compare them with.
    """
    config, teacher = session.config, session.teacher
    size = VALIDATION_PARTS * config.distill.tokens_per_batch
    held_out = batches(validation, teacher.sequence, tokens_per_batch=size, seed=0, epoch=0)
    heard = _evaluate(session, finalists) if config.evaluate.sentences else {}
    with said_while("measuring the teacher's held-out cross-entropy"):
        teacher_ce = validate(teacher.model, held_out).ce
    finalists, reference = with_scores(finalists, heard, teacher_ce)
    if heard:
        metrics.finalists_heard(finalists)
    return finalists, reference


def _evaluate(session: Session, finalists: Sequence[FinalistRow]) -> dict[str, Evaluation]:
    sentences = session.config.evaluate.sentences
    with session.screen.phase("speech", f"{sentences} sentences by teacher and finalists"):
        return _heard(session, [str(row.layout) for row in finalists], sentences)


def _heard(
    session: Session, layouts: Sequence[str], sentences: int, adds_references: bool = True
) -> dict[str, Evaluation]:
    """The first ``sentences`` of the test split by some finalists; what was heard before is not spoken again."""
    config, folder = session.config, session.folder
    evaluate = config.evaluate.model_copy(update={"sentences": sentences})
    return evaluate_systems(
        config.model_copy(update={"evaluate": evaluate}),
        {layout: student_folder(folder, layout) for layout in layouts},
        folder,
        teacher=session.shared_teacher,
        worker=session.worker,
        on_progress=lambda done, total: session.screen.count(done, total, "utterances"),
        on_activity=session.screen.now,
        adds_references=adds_references,
    )


def race_the_finalists(session: Session, finalists: Sequence[FinalistRow], reference: Reference) -> Race | None:
    """Further sentences for those of a ratio that are not told apart, if the settings have a race.

    What all have said stays the source of every table; ``race.json`` has what the race says of them.
    """
    config, screen = session.config, session.screen
    most = config.evaluate.race_sentences
    if not most:
        return None
    everybody = [str(row.layout) for row in finalists]
    with screen.phase("race", f"at most {most} sentences by finalists that are not told apart"):
        heard = _heard(session, everybody, config.evaluate.sentences)
        groups = contenders(finalists, config.search.ratios)
        race = run_race(groups, heard, lambda layouts, count: _heard(session, layouts, count, False), most)
        for layout, why in race.lost.items():
            screen.say(f"    {layout} is out: {why}")
        if any(said > heard[layout].sentences for layout, said in race.sentences.items()):
            # The tables of the evaluation are again of what all have said.
            _heard(session, everybody, config.evaluate.sentences)
        write_race(session.folder, race, reference.evaluation)
    return race


def export(session: Session, best: Mapping[str, FinalistRow]) -> tuple[dict[Layout, Path], list[InputError]]:
    """The best finalist of every ratio as a checkpoint; ``best/`` is the first ratio's.

    Returns:
        Folders by layout, and why others could not be written: what a search found is worth a report all the same.
    """
    folders: dict[Layout, Path] = {}
    refusals = []
    form = form_of(session.teacher.model.config)
    what = "a checkpoint that plain transformers loads" if form == "transformers" else "a checkpoint in our own form"
    with session.screen.phase("export", what):
        for ratio, row in best.items():
            session.screen.now(f"checking and writing {row.layout}, {len(folders) + 1} of {len(best)}")
            folder = best_folder(session.folder, ratio, list(best))
            student = student_folder(session.folder, row.layout)
            try:
                export_student(student, folder, row, session.teacher, session.config.teacher, form)
                folders[row.layout] = folder
            except InputError as error:
                refusals.append(error)
    return folders, refusals


def print_summary(
    session: Session,
    finalists: Sequence[FinalistRow],
    reference: Reference,
    best: Mapping[str, FinalistRow],
    folders: Mapping[Layout, Path],
    report: Path,
    trials: Sequence[TrialRow],
    failures: Sequence[str] = (),
) -> None:
    """A table of the outcome, where everything lies, how to go on, and in plain words whether the result is good."""
    teacher = Layout.all_attention(session.num_layers)
    all_attention = session.costs(teacher)["cache_bytes"]
    context, folder = session.config.context_length, session.folder
    header = ["ratio", "layout", "from", "CE", f"cache at {context:,}"]
    rows = [["1:0", teacher, "teacher", f"{reference.teacher_ce:.3f}", "100 %"]]
    rates = [_wer(reference.teacher)]
    for row in finalists:
        origin = row.origin + (" *" if row.layout in folders else "")
        cache = f"{row.cache_bytes / all_attention:.0%}"
        rows.append([row.layout.ratio, row.layout, origin, f"{row.ce:.3f}", cache])
        rates.append(str(row.wer or ""))
    if reference.codec is not None:
        rows.append(["", "", "codec round trip", "", ""])
        rates.append(_wer(reference.codec))
    if any(rates):
        header.insert(-1, "WER [95 %]")
        rows = [[*row[:-1], rate, row[-1]] for row, rate in zip(rows, rates, strict=True)]
    more = 2 * session.config.search.trials
    lines = [
        "",
        table(header, rows),
        "* exported",
        "",
        *[f"checkpoint  {path}  ({layout})" for layout, path in folders.items()],
        f"report      {report}",
        f"trials      {folder / TRIALS}",
        "",
        f"more trials:     python -m mamtra_ray.search --resume --run {folder} search.trials={more}",
        f"another layout:  python -m mamtra_ray.export --run {folder} --layout {finalists[0].layout}",
        "",
        *(f"warning: {text}" for text in training_warnings(trials, finalists)),
        *failure_lines(failures),
        *verdict_lines(finalists, reference, best, all_attention, session.config.teacher.speaks),
    ]
    session.screen.say("\n".join(lines))


def failure_lines(failures: Sequence[str]) -> list[str]:
    """How many trials failed, and why the first one did; none if none did."""
    if not failures:
        return []
    many = f"{len(failures)} trials failed, the first one" if len(failures) > 1 else "1 trial failed"
    return [f"alarm: {many}: {failures[0]}"]


def verdict_lines(
    finalists: Sequence[FinalistRow],
    reference: Reference,
    best: Mapping[str, FinalistRow],
    teacher_cache_bytes: float,
    speaks: bool = True,
) -> list[str]:
    """Alarms of all systems, then for every ratio whether its result is good."""
    score = reference.teacher
    teacher = Measured(TEACHER, reference.teacher_ce, score.wer if score else None)
    alarms = {str(row.layout): row.alarm for row in finalists} | {"the teacher": reference.teacher_alarm}
    lines = [f"alarm: {name} {text}" for name, text in alarms.items() if text]
    for row in best.values():
        outcome = Outcome(
            best=measured_of(row),
            alarm=row.alarm,
            is_any_without_alarm=any(not one.alarm for one in finalists if one.layout.ratio == row.layout.ratio),
            difference=row.wer_difference,
            cache_share=row.cache_bytes / teacher_cache_bytes,
            speaks=speaks,
        )
        lines.append(verdict(outcome, teacher, reference.teacher_alarm, reference.evaluation_sentences))
    return lines


def _wer(score: Score | None) -> str:
    return "" if score is None else str(score.wer)
