"""Verb ``search``: from a teacher and a corpus to the best hybrid under the budget.

Straight down: teacher cache -> aligned mixers -> probe -> Tune + Optuna -> finalists on Ray Train -> speech and WER
-> export -> report. Every step leaves its result in a folder named by what made it and is reused when that fits, so
the same command goes on after any stop.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from mamtra_ray.candidates import Candidate, importance_criteria, paper_candidates
from mamtra_ray.config import Config, add_common_arguments, config_from_arguments, explain, load_config
from mamtra_ray.cost_by_rung import cost_by_rung
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.evaluate import check_evaluation, evaluate_systems
from mamtra_ray.export import export_student
from mamtra_ray.finalists import choose_best, distill_the_finalists, student_folder
from mamtra_ray.importance import layer_importance
from mamtra_ray.layouts import num_attention_layers
from mamtra_ray.metrics import SearchMetrics
from mamtra_ray.plan import print_plan
from mamtra_ray.probe import outcome_table, probe_masks, propose
from mamtra_ray.progress import table
from mamtra_ray.report import write_report
from mamtra_ray.run_folder import (
    BEST,
    CODEC,
    FINALIST_COLUMNS,
    FINALISTS,
    TEACHER,
    TRIALS,
    Reference,
    Score,
    write_reference,
    write_rows,
)
from mamtra_ray.session import Session, check_run_folder, make_cache, make_library, start_session
from mamtra_ray.shared_batches import batches
from mamtra_ray.shared_cache import SharedCache
from mamtra_ray.training import validate
from mamtra_ray.trial import TrialSettings
from mamtra_ray.trials import run_the_trials, trial_weights


def search(config: Config, folder: Path, address: str | None) -> None:
    """Run all phases; see the module's docstring."""
    session = start_session(config, folder, phases(config), address)
    config = session.config
    budgets = ", ".join(config.search.ratios)
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
    finalists, reference = hear(session, finalists, validation, metrics)
    best = export(session, finalists)
    with session.screen.phase("report", "tables, figures, audio"):
        report = write_report([folder], folder)
    closing_words(session, finalists, reference, best, report)


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


def hear(
    session: Session, finalists: list[dict[str, Any]], validation: SharedCache, metrics: SearchMetrics
) -> tuple[list[dict[str, Any]], Reference]:
    """Generate speech with teacher and finalists, recognise it; finalists with their WER, and what to compare with."""
    config, folder = session.config, session.folder
    teacher = session.teacher
    held_out = batches(validation, teacher.sequence, batch_tokens=4 * config.distill.batch_tokens, seed=0, epoch=0)
    reference = Reference(validate(teacher.model, held_out).ce, config.evaluate.sentences)
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
        reference = dataclasses.replace(reference, teacher=scores[TEACHER], codec=scores.get(CODEC))
    write_rows(folder / FINALISTS, finalists, FINALIST_COLUMNS)
    write_reference(folder, reference)
    return finalists, reference


def export(session: Session, finalists: list[dict[str, Any]]) -> dict[str, Path]:
    """The best finalist of every budget as a checkpoint for plain transformers; ``best`` is the first budget's."""
    folders = {}
    with session.screen.phase("export", "a checkpoint that plain transformers loads"):
        for index, ratio in enumerate(session.config.search.ratios):
            kept = num_attention_layers(session.num_layers, ratio)
            row = choose_best([row for row in finalists if row["layout"].count("A") == kept])
            folder = session.folder / (BEST if index == 0 else f"{BEST}-{ratio.replace(':', '-')}")
            export_student(
                student_folder(session.folder, row["layout"]), folder, row, session.teacher, session.config.teacher
            )
            folders[row["layout"]] = folder
    return folders


def closing_words(
    session: Session, finalists: list[dict[str, Any]], reference: Reference, best: dict[str, Path], report: Path
) -> None:
    """A table of the outcome, where everything lies, and how to go on."""
    all_attention = session.costs(session.num_layers)["cache_bytes"]
    rows = [
        ["1:0", "A" * session.num_layers, "teacher", f"{reference.teacher_ce:.3f}", _wer(reference.teacher), "100 %"]
    ]
    for row in finalists:
        score = None if row["wer"] is None else Score(row["wer"], row["wer_low"], row["wer_high"])
        origin = row["origin"] + (" *" if row["layout"] in best else "")
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
        *[f"checkpoint  {path}  ({layout})" for layout, path in best.items()],
        f"report      {report}",
        f"trials      {folder / TRIALS}",
        "",
        f"more trials:     python -m mamtra_ray.search --resume --run {folder} search.trials={more}",
        f"another layout:  python -m mamtra_ray.export --run {folder} --layout {finalists[0]['layout']}",
    ]
    session.screen.say("\n".join(lines))


def _wer(score: Score | None) -> str:
    return "" if score is None else f"{score.wer:.1%} [{score.wer_low:.1%}, {score.wer_high:.1%}]"


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
        search(config, folder, options.address)
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: python -m mamtra_ray.search --resume --run {folder}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
