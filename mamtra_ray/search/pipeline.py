"""From a teacher and a corpus to the best hybrid of every ratio.

Straight down: teacher cache -> aligned mixers -> probe -> Tune + Optuna -> finalists on Ray Train -> speech and WER
-> export -> report. Every step leaves its result in a folder named by what made it and is reused when that fits, so
the same command goes on after any stop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import ray

from mamtra_ray.align.phase import make_library
from mamtra_ray.config import Config
from mamtra_ray.distill.job import distill_data
from mamtra_ray.distill.learning_rate import with_learning_rate
from mamtra_ray.evaluate.evaluation import check_evaluation
from mamtra_ray.evaluate.run_scores import choose
from mamtra_ray.evaluate.verdict import EXIT_UNUSABLE, is_unusable
from mamtra_ray.export.checkpoint import export_note
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate, given_candidates, importance_criteria
from mamtra_ray.probe.phase import probe_data, run_probe
from mamtra_ray.probe.probing import propose
from mamtra_ray.report.report import write_report
from mamtra_ray.run.folder import write_reference
from mamtra_ray.run.names import FINALISTS
from mamtra_ray.run.open_run import OpenRun
from mamtra_ray.run.rows import FinalistRow, TrialRow, write_table
from mamtra_ray.run.session import Session, start_session
from mamtra_ray.runtime.actor_pool import result_of
from mamtra_ray.runtime.progress import repeatedly, said_while
from mamtra_ray.search.costs import cost_by_rung
from mamtra_ray.search.finalists import distill_the_finalists
from mamtra_ray.search.importance import layer_importance
from mamtra_ray.search.loggers import logger_callbacks
from mamtra_ray.search.metrics import SECONDS_BETWEEN_EXPORTS, SearchMetrics
from mamtra_ray.search.outcome import export, measure_wer, print_summary, race_the_finalists
from mamtra_ray.search.proposals import UniformLayouts
from mamtra_ray.search.trial_phase import run_the_trials, start_trial_table, trial_settings
from mamtra_ray.search.trial_speech import prepare_trial_speech
from mamtra_ray.teacher_cache.phase import make_cache
from mamtra_ray.teacher_cache.shared import SharedCache
from mamtra_ray.teachers.generation_check import check_shared_teacher, check_teacher_and_hybrid


def search(run: OpenRun, address: str | None) -> int:
    """Run all phases; see the module's docstring.

    Returns:
        The exit code: 0, or :data:`EXIT_UNUSABLE` if the run is complete but nothing it found can be used.
    """
    session = start_session(run, phases(run.config), address)
    config, folder, screen = session.config, session.folder, session.screen
    with said_while("checking that teacher and hybrid generate what they compute"):
        check_decoding(session)
    if config.evaluate.sentences:
        with said_while("loading recognizer, codec and metrics, to see whether they are there"):
            check_evaluation(config, session.shared_teacher, session.worker)
    logger_callbacks(config.search.loggers, folder)  # an address that cannot be used is said before any training
    ratios = ", ".join(config.search.ratios)
    screen.say(f"run {folder}: {session.num_layers} layers, ratios {ratios}; dashboard {session.dashboard}")
    if note := export_note(session.teacher.model.config):
        screen.say(note.rstrip())
    metrics = SearchMetrics(str(folder))

    def export_metrics() -> None:
        metrics.note_progress(*screen.progress())
        metrics.set_again()

    with repeatedly(export_metrics, SECONDS_BETWEEN_EXPORTS):
        return _run_phases(session, metrics)


def _run_phases(session: Session, metrics: SearchMetrics) -> int:
    config, folder, screen = session.config, session.folder, session.screen
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    proposals = probe(session, library, validation)
    measured = importance(session, library, validation)
    given = given_candidates(session.space, config.search.strategies, config.search.layouts, measured)
    data = distill_data(config, session.shared_teacher, train, validation, str(library) if library else None)
    session = with_learning_rate(session, data, layout_for_rates(session, [*proposals, *given]))
    table = start_trial_table(session, data)
    settings = dataclasses.replace(trial_settings(session, data, table), speech=prepare_trial_speech(session))
    rows, failures = run_the_trials(session, settings, given, proposals, metrics)
    note_costs(session, train, library, rows, [])
    finalists = distill_the_finalists(session, settings, given, rows)
    metrics.finalists_distilled(finalists)
    note_costs(session, train, library, rows, finalists)
    finalists, reference = measure_wer(session, finalists, validation, metrics)
    race = race_the_finalists(session, finalists, reference)
    finalists, best = choose(finalists, config.search.ratios, race)
    write_table(folder / FINALISTS, finalists, FinalistRow)
    write_reference(folder, reference)
    exported, refusals = export(session, best)
    with screen.phase("report", "tables, figures, audio" if config.evaluate.sentences else "tables and figures"):
        report = write_report([folder], folder)
    print_summary(session, finalists, reference, best, exported, report, rows, failures)
    if refusals:
        raise refusals[0]
    unusable = is_unusable({row.layout: row.alarm for row in finalists}, reference.teacher_alarm)
    return EXIT_UNUSABLE if unusable else 0


def phases(config: Config) -> tuple[str, ...]:
    """What this search goes through, in order."""
    aligned = config.student.initialization == "aligned"
    wanted = {
        "cache": True,
        "align": aligned,
        "probe": aligned and config.probe.num_layouts > 0,
        "importance": bool(importance_criteria(config.search.strategies)),
        "learning rate": "auto" in (config.distill.learning_rate, config.search.learning_rate),
        "trials": True,
        "finalists": True,
        "speech": config.evaluate.sentences > 0,
        "race": config.evaluate.race_sentences > 0,
        "export": True,
        "report": True,
    }
    return tuple(phase for phase, is_wanted in wanted.items() if is_wanted)


def check_decoding(session: Session) -> None:
    """Before anything long: the teacher and a hybrid generate what they compute, where workers will run.

    Raises:
        InputError: they do not, see :func:`mamtra_ray.speech_lm.generation_check.check_generation`.
    """
    ratio, sharing = session.config.search.ratios[0], session.config.student.state_sharing
    if session.worker.gpus:
        # The driver may have no GPU, and other kernels than the workers.
        task = ray.remote(num_gpus=session.worker.gpus)(check_shared_teacher)
        found = result_of(task.remote(session.shared_teacher, ratio, sharing))
    else:
        found = check_teacher_and_hybrid(session.teacher, ratio, sharing)
    session.screen.say(f"generation equals a full forward pass, up to {found.relative:.0e} of the logits' spread")


def probe(session: Session, library: Path | None, validation: SharedCache) -> list[Candidate]:
    """Forward-only scores of many layouts, and the surrogate's optimum of every ratio."""
    if library is None or session.config.probe.num_layouts == 0:
        return []
    rows = run_probe(session, library, validation)
    return [
        Candidate(layout, "probe")
        for ratio in session.config.search.ratios
        for layout in propose(session.space, rows, ratio, 3)
    ]


def layout_for_rates(session: Session, candidates: Sequence[Candidate]) -> Layout:
    """The layout on which learning rates are tried: the first candidate; where there is none, any allowed one."""
    if candidates:
        return candidates[0].layout
    return UniformLayouts(session.space, session.config.seed).next_untried(set())


def importance(session: Session, library: Path | None, validation: SharedCache) -> dict[str, list[float]]:
    """How much each layer's attention matters, by every criterion that a strategy asks for."""
    found: dict[str, list[float]] = {}
    for criterion in importance_criteria(session.config.search.strategies):
        assert library is not None  # checked with the configuration
        with session.screen.phase("importance", f"every layer's attention replaced alone, by {criterion}"):
            found[criterion] = layer_importance(
                criterion,
                session.config,
                session.folder,
                probe_data(session, library, validation),
                session.worker,
                on_progress=lambda done, total: session.screen.count(done, total, "replacements"),
            )
    return found


def note_costs(
    session: Session,
    train: SharedCache,
    library: Path | None,
    trials: Sequence[TrialRow],
    finalists: Sequence[FinalistRow],
) -> None:
    """What every rung cost so far, into ``costs.json``."""
    costs = session.screen.costs
    seconds = costs.phases["cache"]["seconds"]
    costs.set_rungs(
        cost_by_rung(session.folder, session.architecture, train.manifest, seconds, library, trials, finalists)
    )
