"""The trials phase of a search: starting points, Tune + Optuna, and what the user sees of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ray

from mamtra_ray.artifacts import content_hash
from mamtra_ray.distill.job import DistillData, student_made_by
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate, without_repeats
from mamtra_ray.run.names import trial_states
from mamtra_ray.run.rows import TrialRow
from mamtra_ray.run.session import Session
from mamtra_ray.runtime.actor_pool import result_of
from mamtra_ray.search.metrics import SearchMetrics
from mamtra_ray.search.trial import TrialSettings
from mamtra_ray.search.trial_table import TrialTable
from mamtra_ray.search.tuning import run_trials


def start_trial_table(session: Session, data: DistillData) -> Any:
    """The one actor that keeps the trials table."""
    actor: Any = ray.remote(num_cpus=0)(TrialTable)
    return actor.remote(session.folder, settings_hash(session, data))


def settings_hash(session: Session, data: DistillData) -> str:
    """What a rung's score depends on; how many trials there are and which sampler proposes them do not matter."""
    config = session.config
    return content_hash(
        [student_made_by(data, config.student, config.distill, config.seed), list(config.search.rung_tokens)]
    )


def trial_settings(session: Session, data: DistillData, table: Any) -> TrialSettings:
    """What trials and finalists of this run share."""
    config, layers = session.config, session.num_layers
    return TrialSettings(
        space=session.space,
        search=config.search,
        settings=config.distill,
        student=config.student,
        data=data,
        worker=session.worker,
        seed=config.seed,
        costs={kept: session.costs(Layout.attention_first(kept, layers)) for kept in range(layers + 1)},
        states=trial_states(session.folder),
        table=table,
    )


def run_the_trials(
    session: Session,
    settings: TrialSettings,
    paper_placements: list[Candidate],
    proposals: list[Candidate],
    metrics: SearchMetrics,
) -> tuple[list[TrialRow], list[str]]:
    """Tune + Optuna.

    Returns:
        The rows of the trials table, and why trials failed, one reason each.

    Raises:
        InputError: all trials failed.
    """
    search, table = session.config.search, settings.table
    known = known_layouts(session, result_of(table.all_rows.remote()))
    candidates = without_repeats([*known, *paper_placements, *proposals])
    ray.get(table.set_origins.remote({candidate.layout: candidate.origin for candidate in candidates}))
    total = len(candidates) if search.sampler == "grid" else max(search.trials, len(candidates))
    progress = _TrialsProgress(session, metrics, table, total)
    goes_on = f", {len(known)} known" if known else ""
    with session.screen.phase("trials", f"{total} layouts by Tune + Optuna ({search.sampler}){goes_on}"):
        run_trials(settings, candidates, session.folder, progress)
        ray.get(table.compact.remote())
    rows, failures = ray.get(table.all_rows.remote()), progress.failures
    if failures and not any(session.space.allows(row.layout) for row in rows):
        raise InputError(f"all {len(failures)} trials failed; the first one: {failures[0]}")
    return rows, failures


class _TrialsProgress:
    """What the screen, the metrics and the table are told while trials run."""

    def __init__(self, session: Session, metrics: SearchMetrics, table: Any, total: int) -> None:
        self.session, self.metrics, self.table, self.total = session, metrics, table, total
        self.finished = 0
        self.failures: list[str] = []
        self.best: dict[str, Any] | None = None

    def __call__(self, result: dict[str, Any], finished: bool) -> None:
        if finished:
            self.finished += 1
            self.metrics.trials_finished.inc()
        if "error" in result:
            reason = failure_reason(result["error"])
            self.failures.append(f"{reason} (traceback: {result['error']})")
            self.session.screen.say(f"    a trial failed and is left out: {self.failures[-1]}")
        elif "ce" in result:
            layout = Layout.from_string(result["layout"])
            if finished:
                ray.get(self.table.finish.remote(layout))
                # Only an unfinished trial needs its training state again.
                shutil.rmtree(trial_states(self.session.folder) / str(layout), ignore_errors=True)
            if self.best is None or (result["rung"], -result["ce"]) > (self.best["rung"], -self.best["ce"]):
                self.best = result
                self.metrics.best_ce.set(result["ce"])
                self.metrics.cache_bytes.set(self.session.costs(layout)["cache_bytes"])
            self.metrics.tokens_per_second.set(result["tokens_per_second"])
        note = f"best CE {self.best['ce']:.3f} {self.best['layout']}" if self.best else ""
        self.session.screen.count(self.finished, self.total, "trials", note)


def failure_reason(error_file: str | None) -> str:
    """The last line of a trial's traceback, which says what happened."""
    path = Path(error_file) if error_file else None
    lines = path.read_text(errors="replace").strip().splitlines() if path and path.is_file() else []
    return " ".join(lines[-1].split())[:300] if lines else "no reason known: its process or node ended"


def known_layouts(session: Session, rows: list[TrialRow]) -> list[Candidate]:
    """Layouts that an earlier session of this run already scored under the same settings, oldest first."""
    return without_repeats(Candidate(row.layout, row.origin) for row in rows if session.space.allows(row.layout))
