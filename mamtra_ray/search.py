"""Verb ``search``: from a teacher and a corpus to the best hybrid under the budget.

Straight down: teacher cache -> aligned mixers -> probe -> Tune + Optuna -> finalists on Ray Train -> speech and WER
-> export -> report. Every step leaves its result in a folder named by what made it and is reused when that fits, so
the same command goes on after any stop.

Exit codes: 0 a result that can be used; 2 input or an installation that cannot; 3 the run is complete and its report
written, but nothing it found can be used (:mod:`mamtra_ray.verdict`); 130 stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ray

from mamtra_ray.alarms import COLUMNS as ALARM_COLUMNS
from mamtra_ray.candidates import Candidate, importance_criteria, paper_candidates
from mamtra_ray.config import Config, add_common_arguments, config_from_arguments, explain, load_config
from mamtra_ray.cost_by_rung import cost_by_rung
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.evaluate import check_evaluation
from mamtra_ray.evaluation_pool import result_of
from mamtra_ray.finalists import distill_the_finalists
from mamtra_ray.generation_check import check_teacher_and_hybrid, check_teacher_on_worker
from mamtra_ray.importance import layer_importance
from mamtra_ray.metrics import SearchMetrics
from mamtra_ray.outcome import choose, export, measure_wer, print_summary
from mamtra_ray.plan import print_plan
from mamtra_ray.probe import outcome_table, probe_masks, propose
from mamtra_ray.report import write_report
from mamtra_ray.run_folder import FINALIST_COLUMNS, FINALISTS, write_reference, write_rows
from mamtra_ray.session import Session, check_run_folder, make_cache, make_library, start_session
from mamtra_ray.shared_cache import SharedCache
from mamtra_ray.trial import TrialSettings
from mamtra_ray.trials import run_the_trials, trial_weights
from mamtra_ray.verdict import EXIT_UNUSABLE, is_unusable


def search(config: Config, folder: Path, address: str | None) -> int:
    """Run all phases; see the module's docstring.

    Returns:
        The exit code: 0, or :data:`EXIT_UNUSABLE` if the run is complete but nothing it found can be used.
    """
    session = start_session(config, folder, phases(config), address)
    config = session.config
    budgets = ", ".join(config.search.ratios)
    check_decoding(session)
    if config.evaluate.sentences:
        check_evaluation(config)
    session.screen.say(f"run {folder}: {session.num_layers} layers, budgets {budgets}; dashboard {session.dashboard}")
    metrics = SearchMetrics(folder.name)
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    proposals = probe(session, library, validation)
    papers = paper_candidates(config.search, session.num_layers, importance(session, library, validation))
    settings = TrialSettings(
        config=config,
        num_layers=session.num_layers,
        train=train,
        validation=validation,
        library=str(library.resolve()) if library else None,
        costs={str(kept): session.costs(kept)[config.search.cost] for kept in range(session.num_layers + 1)},
        weights_folder=str(trial_weights(folder).resolve()),
        records=None,
    )
    rows, settings = run_the_trials(session, settings, papers, proposals, metrics)
    note_costs(session, train, library, rows, [])
    finalists = distill_the_finalists(session, settings, papers, rows)
    note_costs(session, train, library, rows, finalists)
    finalists, reference = measure_wer(session, finalists, validation, metrics)
    best = choose(finalists, config.search.ratios, session.num_layers)
    write_rows(folder / FINALISTS, finalists, FINALIST_COLUMNS + ALARM_COLUMNS)
    write_reference(folder, reference)
    exported, refusals = export(session, best)
    with session.screen.phase("report", "tables, figures, audio"):
        report = write_report([folder], folder)
    print_summary(session, finalists, reference, best, exported, report)
    if refusals:
        raise refusals[0]
    unusable = is_unusable({row["layout"]: row["alarm"] for row in finalists}, reference.teacher_alarm)
    return EXIT_UNUSABLE if unusable else 0


def phases(config: Config) -> tuple[str, ...]:
    """What this search goes through, in order."""
    aligned = config.student.initialisation == "aligned"
    wanted = {
        "cache": True,
        "align": aligned,
        "probe": aligned and config.probe.masks > 0,
        "importance": bool(importance_criteria(config.search)),
        "trials": True,
        "finalists": True,
        "speech": config.evaluate.sentences > 0,
        "export": True,
        "report": True,
    }
    return tuple(phase for phase, is_wanted in wanted.items() if is_wanted)


def check_decoding(session: Session) -> None:
    """Before anything long: the teacher and a hybrid generate what they compute, where workers will run.

    Raises:
        InputError: they do not, see :func:`mamtra_ray.generation_check.check_generation`.
    """
    config, ratio = session.config, session.config.search.ratios[0]
    if gpus := config.search.gpus_per_worker:
        # The driver may have no GPU, and other kernels than the workers.
        task = ray.remote(num_gpus=gpus)(check_teacher_on_worker)
        found = result_of(task.remote(config.teacher.kind, config.teacher.path, ratio, config.student.state_sharing))
    else:
        found = check_teacher_and_hybrid(session.teacher, ratio, config.student.state_sharing)
    session.screen.say(f"generation equals a full forward pass, up to {found.relative:.0e} of the logits' spread")


def probe(session: Session, library: Path | None, validation: SharedCache) -> list[Candidate]:
    """Forward-only scores of many layouts, and the surrogate's optimum of every budget."""
    if library is None or session.config.probe.masks == 0:
        return []
    with session.screen.phase("probe", f"{session.config.probe.masks} layouts by forward passes"):
        rows = probe_masks(
            session.config,
            session.folder,
            teacher=session.teacher,
            library=library,
            validation=validation,
            on_progress=lambda done, total: session.screen.count(done, total, "layouts"),
        )
        session.screen.say(outcome_table(session.config, rows))
        return [
            Candidate(layout, "probe")
            for ratio in session.config.search.ratios
            for layout in propose(session.config, rows, ratio, 3)
        ]


def importance(session: Session, library: Path | None, validation: SharedCache) -> dict[str, list[float]]:
    """How much each layer's attention matters, by every criterion that a strategy asks for."""
    found = {}
    for criterion in importance_criteria(session.config.search):
        if library is None:
            raise InputError("the importance strategies need aligned mixers: set student.initialisation=aligned")
        with session.screen.phase("importance", f"every layer's attention replaced alone, by {criterion}"):
            found[criterion] = layer_importance(
                session.config,
                session.folder,
                criterion,
                teacher=session.teacher,
                library=library,
                validation=validation,
                on_progress=lambda done, total: session.screen.count(done, total, "replacements"),
            )
    return found


def note_costs(
    session: Session,
    train: SharedCache,
    library: Path | None,
    trials: list[dict[str, Any]],
    finalists: list[dict[str, Any]],
) -> None:
    """What every rung cost so far, into the ledger."""
    ledger = session.screen.ledger
    seconds = ledger.phases["cache"]["seconds"]
    ledger.set_rungs(
        cost_by_rung(session.folder, session.architecture, train.manifest, seconds, library, trials, finalists)
    )


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = argparse.ArgumentParser(prog="python -m mamtra_ray.search", description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run, also with other settings")
    parser.add_argument("--address", help="Ray cluster (default: $RAY_ADDRESS, else a new local one)")
    parser.add_argument("--explain", action="store_true", help="print every key of a search-space file and stop")
    options = parser.parse_intermixed_args(arguments)
    if options.explain:
        print(explain())
        return 0
    config, folder = config_from_arguments(options)
    if options.resume and options.space is None and (folder / "config.yaml").exists():
        config = load_config(folder / "config.yaml", options.overrides)
    check_run_folder(config, folder, options.resume)
    if options.dry_run:
        print_plan(config, folder)
        return 0
    try:
        return search(config, folder, options.address)
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: python -m mamtra_ray.search --resume --run {folder}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
