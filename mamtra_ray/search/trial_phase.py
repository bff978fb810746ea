"""The trials phase of a search: starting points, Tune + Optuna, and what the user sees of it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mamtra_ray.artifacts import content_hash
from mamtra_ray.distill.job import DistillData, student_made_by
from mamtra_ray.errors import DiskFullError, InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate, without_repeats
from mamtra_ray.run.folder import latest_scores
from mamtra_ray.run.names import trial_states
from mamtra_ray.run.rows import FINISHED, TrialRow
from mamtra_ray.run.session import Session
from mamtra_ray.runtime.actor_pool import RESTARTS, result_of
from mamtra_ray.runtime.progress import repeatedly
from mamtra_ray.search.metrics import SearchMetrics
from mamtra_ray.search.trial import TrialSettings
from mamtra_ray.search.trial_table import TrialFailure, TrialTable
from mamtra_ray.search.tuning import NodeOutOfMemoryError, TrialPlan, max_concurrent_trials, run_trials

_SHOWN = 2
"""Running trials that the line on the screen names."""


def start_trial_table(session: Session, data: DistillData) -> Any:
    """The one actor that keeps the trials table, on the driver's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS, "scheduling_strategy": here}
    actor: Any = ray.remote(num_cpus=0, **options)(TrialTable)
    return actor.remote(session.folder, settings_hash(session, data))


def settings_hash(session: Session, data: DistillData) -> str:
    """What a rung's score depends on; how many trials there are and which sampler proposes them do not matter."""
    config = session.config
    return content_hash(
        [student_made_by(data, config.student, config.distill_of_trials, config.seed), list(config.search.rung_tokens)]
    )


def trial_settings(session: Session, data: DistillData, table: Any) -> TrialSettings:
    """What trials of this run share."""
    config, layers = session.config, session.num_layers
    return TrialSettings(
        space=session.space,
        search=config.search,
        settings=config.distill_of_trials,
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
    failures: list[str] = []
    at_once = max_concurrent_trials(settings)
    with session.screen.phase("trials", f"by Tune + Optuna ({session.config.search.sampler})"):
        if settings.speech is not None:
            session.screen.say(
                f"    the teacher's WER on the trials' {len(settings.speech.sentences)} sentences: "
                f"{settings.speech.teacher_wer}"
            )
        while True:
            try:
                _run_to_the_end(session, settings, [*paper_placements, *proposals], metrics, at_once, failures)
                break
            except NodeOutOfMemoryError as error:
                at_once = fewer_at_once(at_once, error)
                session.screen.say(
                    f"    a node ran out of memory and Ray ended trials; they go on, {at_once} at a time from now on"
                )
        result_of(settings.table.compact.remote())
    rows = result_of(settings.table.all_rows.remote())
    if failures and not any(session.space.allows(row.layout) for row in rows):
        raise InputError(f"all {len(failures)} trials failed; the first one: {failures[0]}")
    return rows, failures


def fewer_at_once(at_once: int, error: NodeOutOfMemoryError) -> int:
    """Half as many trials.

    Raises:
        InputError: it was one alone.
    """
    if at_once == 1:
        reason = str(error).partition("\n")[0][:200]
        raise InputError(
            "a node ran out of memory with one trial at a time: lower distill.micro_batch_tokens, or end "
            f"what else needs memory there ({reason}); the same command goes on"
        )
    return at_once // 2


def _run_to_the_end(
    session: Session,
    settings: TrialSettings,
    starting_points: list[Candidate],
    metrics: SearchMetrics,
    at_once: int,
    failures: list[str],
) -> None:
    """All trials that are left; why some failed is added to ``failures``."""
    search, table = session.config.search, settings.table
    known = known_layouts(session, result_of(table.all_rows.remote()))
    candidates = without_repeats([*known, *starting_points])
    settings = replace(settings, origins={candidate.layout: candidate.origin for candidate in candidates})
    asked = len(candidates) if search.sampler == "grid" else max(search.trials, len(candidates))
    probed = {row.layout: row.kl for row in latest_scores(session.folder)}
    plan = TrialPlan(candidates, len(known), min(asked, session.space.num_layouts), probed)
    progress = _TrialsProgress(session, metrics, table, plan, failures)
    goes_on = f", {len(known)} known" if known else ""
    every_one = f", all there are (search.trials={asked})" if plan.total < asked else ""
    session.screen.say(f"    {plan.total} layouts{every_one}{goes_on}")
    progress.show()
    if every_trial_is_finished(plan, result_of(table.all_rows.remote())):
        session.screen.say("    all of them are finished")
        return
    with repeatedly(progress.show):
        run_trials(settings, plan, session.folder, progress, at_once)


def every_trial_is_finished(plan: TrialPlan, rows: list[TrialRow]) -> bool:
    """Whether an earlier session has left nothing to try, so that Tune need not be started to repeat its scores."""
    finished = {row.layout for row in rows if row.status == FINISHED}
    candidates = {candidate.layout for candidate in plan.candidates}
    return candidates <= finished and len(candidates) >= plan.total


class _TrialsProgress:
    """What the screen, the metrics and the table are told while trials run."""

    def __init__(
        self, session: Session, metrics: SearchMetrics, table: Any, plan: TrialPlan, failures: list[str]
    ) -> None:
        self.session, self.metrics, self.table, self.total = session, metrics, table, plan.total
        self.known = {candidate.layout for candidate in plan.candidates[: plan.num_known]}
        self.ended = 0
        self.failures = failures
        self.best: Mapping[str, Any] | None = None
        # Reentrant: what has ended is counted and shown in one.
        self._showing = threading.RLock()

    def __call__(self, layout: Layout, result: Mapping[str, Any], ended: bool, death: str | None) -> None:
        """See :data:`~mamtra_ray.search.tuning.OnResult`.

        Raises:
            DiskFullError: the reason why this trial failed.
        """
        if "ce" in result:
            self._note_score(layout, result)
            if not ended:  # The end repeats the last result.
                self.metrics.trial_scored(result)
        if ended:
            self._end(layout, death)
        with self._showing:
            self.ended += ended
            # A trial that repeats what an earlier session found says nothing about how long others take.
            self.show(is_work=layout not in self.known)

    def show(self, is_work: bool = True) -> None:
        """How many trials have ended, the best one, and what runs; also called from a thread, every second."""
        with self._showing:
            for sentence in result_of(self.table.new_sentences.remote()):
                self.session.screen.say(f"    {sentence}")
            self._show(result_of(self.table.running.remote()), is_work)

    def _show(self, running: Mapping[str, tuple[int, str]], is_work: bool) -> None:
        now = [f"{layout} {doing or f'{tokens:,} tokens'}" for layout, (tokens, doing) in sorted(running.items())]
        more = f" and {len(now) - _SHOWN} more" if len(now) > _SHOWN else ""
        best = f"best CE {self.best['ce']:.3f} {self.best['layout']}" if self.best else ""
        runs = f"running {', '.join(now[:_SHOWN])}{more}" if now else "starting trials"
        note = "; ".join(filter(None, (best, runs)))
        self.session.screen.count(self.ended, self.total, "trials", note, is_work=is_work)

    def _note_score(self, layout: Layout, result: Mapping[str, Any]) -> None:
        if self.best is None or (result["rung"], -result["ce"]) > (self.best["rung"], -self.best["ce"]):
            self.best = result
            self.metrics.best_trial(result["ce"], self.session.costs(layout)["cache_bytes"])

    def _end(self, layout: Layout, death: str | None) -> None:
        failure = TrialFailure(death) if death else result_of(self.table.failure_of.remote(layout))
        self.metrics.trial_ended(failed=failure is not None)
        if failure is None:
            result_of(self.table.finish.remote(layout))
            # Only an unfinished trial needs its training state again.
            shutil.rmtree(trial_states(self.session.folder) / str(layout), ignore_errors=True)
            return
        if failure.is_disk_full:
            raise DiskFullError(failure.reason)
        self.failures.append(f"{layout}: {failure}")
        self.session.screen.say(f"    a trial failed and is left out: {self.failures[-1]}")


def known_layouts(session: Session, rows: list[TrialRow]) -> list[Candidate]:
    """Layouts that an earlier session of this run already scored under the same settings, oldest first."""
    return without_repeats(Candidate(row.layout, row.origin) for row in rows if session.space.allows(row.layout))
