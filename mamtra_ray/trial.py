"""A Tune trial: distil one layout rung by rung, or repeat what is already known about it at no cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from mamtra_ray.candidates import layout_from_params
from mamtra_ray.config import Config
from mamtra_ray.distill import DistillJob, Report, distill, trainer_for
from mamtra_ray.layouts import Layout
from mamtra_ray.shared_cache import SharedCache


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a search share; goes to the object store once."""

    config: Config
    num_layers: int
    train: SharedCache
    validation: SharedCache
    library: str | None
    costs: dict[str, float]
    """``cost`` of a layout by its number of attention layers (as text: it goes through JSON)."""
    weights_folder: str
    """Where a trial leaves its training state after a rung; on a cluster, a folder that all nodes share."""
    records: Any
    """Handle of the :class:`mamtra_ray.records.TrialRecords` actor."""

    def job(self, layout: Layout, report_at: tuple[int, ...]) -> DistillJob:
        """The distillation of ``layout`` up to ``report_at[-1]`` tokens."""
        return DistillJob(
            layout=str(layout),
            config=self.config,
            report_at=report_at,
            train=self.train,
            validation=self.validation,
            library=self.library,
            seed=self.config.search.seed,
        )


def run_trial(params: dict[str, Any], settings: TrialSettings) -> None:
    """The function trainable: one report per rung, each with a checkpoint to go on from.

    Reports carry ``first_rung_ce``, the CE at the first rung. Optuna is told that figure and never a later one,
    so its history compares layouts at the same number of tokens however far successive halving let them go.
    """
    search = settings.config.search
    layout = layout_from_params(params, search, settings.num_layers)
    reporter = _RungReporter(layout, settings)
    known, finished = ray.get(
        [settings.records.rows_of.remote(str(layout)), settings.records.is_finished.remote(str(layout))]
    )
    for row in known:
        reporter.repeat(row)
    if finished or len(known) == len(search.rung_tokens):
        return
    job = settings.job(layout, search.rung_tokens)
    if search.workers_per_trial > 1:
        _run_on_train_workers(job, reporter)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = reporter.weights if known and (reporter.weights / "training.json").exists() else None
    for report, training in distill(job, device, start=start):
        training.save(reporter.weights)
        reporter.report(report)


def _run_on_train_workers(job: DistillJob, reporter: _RungReporter) -> None:
    """A trial of several workers is a Ray Train run whose reports are forwarded to Tune."""
    search = reporter.settings.config.search

    class Forward(ray.train.UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            reporter.report(Report(**metrics[0]))

    trainer = trainer_for(
        job,
        reporter.weights,
        workers=search.workers_per_trial,
        cpus=search.cpus_per_worker,
        gpus=search.gpus_per_worker or 0,
        callbacks=[Forward()],
    )
    trainer.fit()


class _RungReporter:
    """Turns a report of the distillation into a row of the trials table and a Tune result."""

    def __init__(self, layout: Layout, settings: TrialSettings) -> None:
        self.layout, self.settings = layout, settings
        self.rungs_reported = 0
        self.first_rung_ce = math.nan
        self.weights = Path(settings.weights_folder) / str(layout)

    def report(self, report: Report) -> None:
        """Record and report a freshly trained rung."""
        if not math.isfinite(report.ce):
            # A NaN would leave the Optuna trial running for ever; a failed trial is clean.
            raise FloatingPointError(f"held-out CE of {self.layout} is {report.ce} after {report.tokens} tokens")
        rung = self._rung_of(report.tokens)
        row = {
            "layout": str(self.layout),
            "ratio": self.layout.ratio,
            "rung": rung,
            "tokens": report.tokens,
            "seconds": report.seconds,
            "tokens_per_second": report.tokens_per_second,
            "waiting": report.waiting,
            "ce": report.ce,
            "kl": report.kl,
            "ce_start": report.ce_start,
            "trial_id": tune.get_context().get_trial_id() or "",
        }
        if rung >= self.rungs_reported:
            ray.get(self.settings.records.add.remote(row, report.curve))
            self._tell_tune(row)

    def repeat(self, row: dict[str, Any]) -> None:
        """Report a rung that an earlier trial of the same layout paid for."""
        self._tell_tune(row)

    def _rung_of(self, tokens: int) -> int:
        return max(rung for rung, target in enumerate(self.settings.config.search.rung_tokens) if tokens >= target)

    def _tell_tune(self, row: dict[str, Any]) -> None:
        search = self.settings.config.search
        if row["rung"] == 0:
            self.first_rung_ce = row["ce"]
        self.rungs_reported = row["rung"] + 1
        metrics = {
            **row,
            "first_rung_ce": self.first_rung_ce,
            "cost": self.settings.costs[str(len(self.layout.attention_layers))],
            # ASHA's milestones are powers of the reduction factor; the rungs are wherever the user put them.
            "milestone": search.reduction_factor ** row["rung"],
        }
        tune.report(metrics)
