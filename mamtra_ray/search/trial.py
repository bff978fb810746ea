"""A Tune trial: distill one layout rung by rung, or repeat what is already known about it at no cost."""

from __future__ import annotations

import functools
import math
import shutil
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayTaskError

from mamtra_ray.config import DistillConfig, SearchConfig, StudentConfig
from mamtra_ray.distill.job import DistillData, DistillJob, Report
from mamtra_ray.distill.training import Distillation
from mamtra_ray.distill.workers import distill, trainer_for
from mamtra_ray.errors import DiskFullError, InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace
from mamtra_ray.run.rows import RUNNING, TrialRow
from mamtra_ray.runtime.actor_pool import result_of
from mamtra_ray.runtime.device import device_of_this_process
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.runtime.train_run import fit_again_after_failures
from mamtra_ray.runtime.training import is_state_of
from mamtra_ray.search.trial_speech import SpeechScore, TrialSpeech, speech_score
from mamtra_ray.search.trial_table import TrialFailure


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a search share, or all finalists; goes to the object store once."""

    space: SearchSpace
    search: SearchConfig
    settings: DistillConfig
    student: StudentConfig
    data: DistillData
    worker: WorkerResources
    seed: int
    costs: dict[int, dict[str, float]]
    """Cost columns of a layout by its number of attention layers."""
    states: Path
    """Where a trial leaves its training state after a rung; on a cluster, a folder that all nodes share."""
    table: Any
    """Handle of the :class:`mamtra_ray.search.trial_table.TrialTable` actor."""
    speech: TrialSpeech | None = None
    """What a trial speaks at the last rung; None: nothing."""
    origins: Mapping[Layout, str] = field(default_factory=dict)
    """Where layouts come from; all others are Optuna's."""

    def job(self, layout: Layout, report_at: tuple[int, ...], progress: Any = None) -> DistillJob:
        """The distillation of ``layout`` up to ``report_at[-1]`` tokens."""
        return DistillJob(layout, self.settings, self.student, self.data, report_at, self.seed, progress)


def run_trial(params: dict[str, Any], settings: TrialSettings) -> None:
    """The function trainable: one report per rung.

    Reports carry ``first_rung_ce`` and ``first_rung_kl``. Optuna is told these figures and never later ones, so its
    history compares layouts at the same number of tokens however far successive halving let them go.

    What goes wrong is noted in the table, and the trial ends: the same layout would fail again. Only a trial whose
    process dies is tried again, by Tune.
    """
    layout = Layout.from_string(params["layout"])
    try:
        _run_rungs(_RungReporter(layout, settings))
    except Exception as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        failure = TrialFailure(one_line(cause), isinstance(cause, DiskFullError))
        ray.get(settings.table.note_failure.remote(layout, failure, traceback.format_exc()))


def one_line(error: BaseException) -> str:
    """An error's sentence; of one that is no sentence for users, its kind too."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _run_rungs(reporter: _RungReporter) -> None:
    settings, layout = reporter.settings, reporter.layout
    search = settings.search
    known, finished = ray.get([getattr(settings.table, name).remote(layout) for name in ("rows_of", "is_finished")])
    for row in known:
        reporter.tell_tune(row)
    if finished or len(known) == len(search.rung_tokens):
        return
    job = settings.job(layout, search.rung_tokens, settings.table)
    if search.workers_per_trial > 1:
        _run_on_train_workers(job, reporter)
        return
    device = device_of_this_process()
    start = latest_state(reporter.state, job)
    for report, training in distill(job, device, start=start):
        save_rung(training, reporter.state)
        student = reporter.state / str(training.position.step) / "student"
        is_last = report.tokens >= search.rung_tokens[-1]
        if settings.speech and is_last:
            doing = f"speaking {len(settings.speech.sentences)} sentences"
            settings.table.note_progress.remote(str(layout), report.tokens, doing)
        heard = speech_score(settings.speech, str(layout), student) if settings.speech and is_last else None
        reporter.report(report, heard)


def save_rung(training: Distillation, states: Path) -> None:
    """Keep a training after a rung: a folder of its own, which appears whole; then older ones go."""
    folder = states / str(training.position.step)
    if is_state_of(folder, training.made_by):  # what it went on from
        return
    new = folder.with_suffix(".partial")
    for path in (new, folder):
        shutil.rmtree(path, ignore_errors=True)
    training.save(new)
    new.rename(folder)
    for other in states.iterdir():
        if other != folder:
            shutil.rmtree(other)


def latest_state(states: Path, job: DistillJob) -> Path | None:
    """The folder that :func:`save_rung` wrote last, if it is of this very training."""
    folders = [path for path in states.glob("*") if path.name.isdigit()]
    latest = max(folders, key=lambda path: int(path.name), default=None)
    return latest if latest is not None and is_state_of(latest, job.made_by) else None


def _run_on_train_workers(job: DistillJob, reporter: _RungReporter) -> None:
    """A trial of several workers is a Ray Train run whose reports are forwarded to Tune."""

    class Forward(ray.train.UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            reporter.report(Report(**metrics[0]))

    new_trainer = functools.partial(
        trainer_for,
        job,
        reporter.state,
        workers=reporter.settings.search.workers_per_trial,
        worker=reporter.settings.worker,
        callbacks=[Forward()],
    )
    fit_again_after_failures(new_trainer)


class _RungReporter:
    """Turns a report of the distillation into a row of the trials table and a Tune result."""

    def __init__(self, layout: Layout, settings: TrialSettings) -> None:
        self.layout, self.settings = layout, settings
        self.rungs_reported = 0
        self.first_rung_ce = self.first_rung_kl = math.nan
        self.state = settings.states / str(layout)

    def report(self, report: Report, heard: SpeechScore | None = None) -> None:
        """Record and report a freshly trained rung, and what was heard of it."""
        if not math.isfinite(report.ce):
            raise FloatingPointError(f"held-out CE of {self.layout} is {report.ce} after {report.tokens} tokens")
        row = TrialRow(
            trial_id=tune.get_context().get_trial_id() or "",
            layout=self.layout,
            origin=self.settings.origins.get(self.layout, "optuna"),
            rung=self._rung_of(report.tokens),
            tokens=report.tokens,
            seconds=report.seconds,
            tokens_per_second=report.tokens_per_second,
            data_wait_fraction=report.data_wait_fraction,
            ce=report.ce,
            kl=report.kl,
            ce_start=report.ce_start,
            kl_start=report.kl_start,
            status=RUNNING,
            settings_hash="",
            wer=heard.wer if heard else None,
            token_error_rate=heard.token_error_rate if heard else None,
            evaluation=self.settings.speech.identity if heard and self.settings.speech else "",
            **self.settings.costs[self.layout.num_attention],
        )
        if row.rung >= self.rungs_reported:
            result_of(self.settings.table.add.remote(row, report.curve))
            self.tell_tune(row)

    def _rung_of(self, tokens: int) -> int:
        return max(rung for rung, target in enumerate(self.settings.search.rung_tokens) if tokens >= target)

    def tell_tune(self, row: TrialRow) -> None:
        """Report ``row`` as this trial's result, whichever session computed it."""
        search = self.settings.search
        if row.rung == 0:
            self.first_rung_ce, self.first_rung_kl = row.ce, row.kl
        self.rungs_reported = row.rung + 1
        spoken: dict[str, float | None] = {}
        speech = self.settings.speech
        # An earlier session may have heard other sentences.
        if row.wer is not None and speech is not None and row.evaluation == speech.identity:
            spoken = {"wer": row.wer.value, "wer_low": row.wer.low, "wer_high": row.wer.high}
            spoken["token_error_rate"] = row.token_error_rate
        tune.report(
            {
                **spoken,
                "layout": str(row.layout),
                "ratio": row.layout.ratio,
                "origin": row.origin,
                "rung": row.rung,
                "tokens": row.tokens,
                "seconds": row.seconds,
                "tokens_per_second": row.tokens_per_second,
                "data_wait_fraction": row.data_wait_fraction,
                "ce": row.ce,
                "kl": row.kl,
                "ce_start": row.ce_start,
                "kl_start": row.kl_start,
                "first_rung_ce": self.first_rung_ce,
                "first_rung_kl": self.first_rung_kl,
                "cost": self.settings.costs[row.layout.num_attention][search.cost],
                # ASHA's milestones are powers of the reduction factor; the rungs are wherever the user put them.
                "milestone": search.reduction_factor**row.rung,
            }
        )
