"""The trials phase of a search: starting points, the records actor, Tune + Optuna, and what the user sees of it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import ray

from mamtra_ray.artifacts import content_hash
from mamtra_ray.candidates import Candidate, meets_constraints, without_repeats
from mamtra_ray.layouts import Layout, num_attention_layers
from mamtra_ray.metrics import SearchMetrics
from mamtra_ray.records import TrialRecords
from mamtra_ray.run_folder import TRIAL_COLUMNS, TRIALS, read_rows
from mamtra_ray.session import TRAINED_FROM, Session
from mamtra_ray.trial import TrialSettings
from mamtra_ray.tuning import run_trials


def run_the_trials(
    session: Session,
    settings: TrialSettings,
    papers: list[Candidate],
    proposals: list[Candidate],
    metrics: SearchMetrics,
) -> tuple[list[dict[str, Any]], TrialSettings]:
    """Tune + Optuna; returns the rows of the trials table and the settings with the records actor in them."""
    search_config = session.config.search
    known = known_layouts(session)
    candidates = without_repeats([*known, *papers, *proposals])
    records: Any = (
        ray.remote(TrialRecords)
        .options(num_cpus=0, name=f"records-{session.folder.name}-{content_hash(str(session.folder.resolve()))}")
        .remote(
            session.folder.resolve(),
            _settings_hash(session),
            {str(candidate.layout): candidate.origin for candidate in candidates},
            {kept: session.costs(kept) for kept in range(session.num_layers + 1)},
        )
    )
    settings = dataclasses.replace(settings, records=records)
    total = len(candidates) if search_config.sampler == "grid" else max(search_config.trials, len(candidates))
    progress = _TrialsProgress(session, metrics, records, total)
    goes_on = f", {len(known)} known" if known else ""
    with session.screen.phase("trials", f"{total} layouts by Tune + Optuna ({search_config.sampler}){goes_on}"):
        run_trials(settings, candidates, session.folder, progress)
    return ray.get(records.all_rows.remote()), settings


class _TrialsProgress:
    """What the screen, the metrics and the records are told while trials run."""

    def __init__(self, session: Session, metrics: SearchMetrics, records: Any, total: int) -> None:
        self.session, self.metrics, self.records, self.total = session, metrics, records, total
        self.finished = 0
        self.best: dict[str, Any] | None = None

    def __call__(self, result: dict[str, Any], finished: bool) -> None:
        if finished:
            self.finished += 1
            self.metrics.trials_finished.inc()
        if "error" in result:
            self.session.screen.say(f"    a trial failed and is left out; its traceback: {result['error']}")
        elif "ce" in result:
            if finished:
                ray.get(self.records.finish.remote(result["layout"]))
                # Only an unfinished trial needs its training state again.
                shutil.rmtree(trial_weights(self.session.folder) / result["layout"], ignore_errors=True)
            if self.best is None or (result["rung"], -result["ce"]) > (self.best["rung"], -self.best["ce"]):
                self.best = result
                self.metrics.best_ce.set(result["ce"])
                self.metrics.cache_bytes.set(self.session.costs(result["layout"].count("A"))["cache_bytes"])
            self.metrics.tokens_per_second.set(result["tokens_per_second"])
        note = f"best CE {self.best['ce']:.3f} {self.best['layout']}" if self.best else ""
        self.session.screen.count(self.finished, self.total, "trials", note)


def trial_weights(run_folder: Path) -> Path:
    """Where unfinished trials keep their training states, by layout."""
    return run_folder / "trial_weights"


def known_layouts(session: Session) -> list[Candidate]:
    """Layouts that an earlier session of this run already scored under the same settings, oldest first."""
    settings_hash = _settings_hash(session)
    kept = {num_attention_layers(session.num_layers, ratio) for ratio in session.config.search.ratios}
    return without_repeats(
        candidate
        for row in read_rows(session.folder / TRIALS, TRIAL_COLUMNS)
        if row["settings_hash"] == settings_hash
        and row["layout"].count("A") in kept
        and meets_constraints(
            (candidate := Candidate(Layout(row["layout"]), row["origin"])).layout, session.config.search
        )
    )


def _settings_hash(session: Session) -> str:
    """What a rung's score depends on; how many trials there are and which sampler proposes them do not matter."""
    search = session.config.search
    return content_hash([session.made_from(*TRAINED_FROM), search.rung_tokens, search.seed])
