"""Ray Tune + Optuna over layouts: short distillations under successive halving, resumable."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from mamtra_ray.artifacts import disk_full_is_said
from mamtra_ray.config import SearchConfig
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate, SearchSpace
from mamtra_ray.runtime.actor_pool import RESTARTS
from mamtra_ray.runtime.stopping import run_interruptibly
from mamtra_ray.search.loggers import logger_callbacks
from mamtra_ray.search.parameter_space import sampler
from mamtra_ray.search.proposals import LayoutProposals
from mamtra_ray.search.surrogate_sampler import SurrogateSampler
from mamtra_ray.search.trial import TrialSettings, run_trial

STUDY_NAME = "layouts"


@dataclass(frozen=True)
class TrialPlan:
    """Which layouts are tried."""

    candidates: Sequence[Candidate]
    """First, in this order: those of earlier sessions, then the starting points."""
    num_known: int
    """How many of them are of earlier sessions."""
    total: int
    """Distinct layouts in all; what the candidates leave is proposed."""
    probe: Mapping[Layout, float] = field(default_factory=dict)
    """KL by layout, for the sampler ``surrogate``."""


OnResult = Callable[[Layout, Mapping[str, Any], bool, str | None], None]
"""Called on the driver with a layout, its last result, whether its trial has ended, and what ended its process."""


class _Watch(tune.Callback):
    """Hands every result to a function on the driver, and keeps the first error of it."""

    def __init__(self, on_result: OnResult) -> None:
        self.on_result = on_result
        self.error: Exception | None = None

    def __reduce__(self) -> Any:
        # Tune pickles a run's callbacks for its own restore, which is not used here; the screen cannot be pickled.
        return _Watch, (print,)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._tell(trial, result, False)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._tell(trial, trial.last_result, True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._tell(trial, trial.last_result, True, death_reason(trial.error_file))

    def _tell(self, trial: Any, result: dict[str, Any], ended: bool, death: str | None = None) -> None:
        # Tune's own way with an error of a callback is a traceback of its inside.
        if self.error is None:
            try:
                self.on_result(Layout.from_string(trial.config["layout"]), result or {}, ended, death)
            except Exception as error:
                self.error = error

    def raise_error(self) -> None:
        """Raise what the function raised, if it did."""
        if self.error is not None:
            raise self.error


class NodeOutOfMemoryError(Exception):
    """Ray has ended processes of the trials, because a node ran out of memory, and Tune ended with them."""


def run_trials(
    settings: TrialSettings, plan: TrialPlan, folder: Path, on_result: OnResult, at_once: int | None = None
) -> None:
    """Run the search's trials; their scores end in the table actor.

    Going on after a stop needs no state of Tune or Optuna: the table knows every rung of every layout, so the
    known layouts are given to a new Tuner first and their trials only repeat the recorded scores. That rebuilds the
    history of Optuna's sampler and of successive halving alike, and it works whatever was killed and when.

    Args:
        settings: what the trials share.
        plan: which layouts.
        folder: run folder; ``tune/`` holds Tune's experiment, ``optuna.journal`` the study.
        on_result: see :data:`OnResult`; what it raises ends the trials and is raised here.
        at_once: trials that run at the same time; None: as many as the cluster has room for.

    Raises:
        DiskFullError: Tune or Optuna have no space left.
        NodeOutOfMemoryError: fewer trials at the same time may go on where these stopped.
    """
    folder = folder.resolve()
    search = settings.search
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Scores are in the trials table; Tune's own files of them only trip over a full disk.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Failures are said by `on_result`, in one line each.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    shutil.rmtree(folder / "tune", ignore_errors=True)
    for stale in folder.glob("optuna.journal*"):
        stale.unlink()
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, settings=settings),
        # With workers of its own, a trial's driver only waits for them.
        {"CPU": 0} if search.workers_per_trial > 1 else settings.worker.bundle(),
    )
    watch = _Watch(on_result)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_proposals(settings, plan, folder),
            scheduler=HalvingInsideRatios(search, settings.space),
            num_samples=plan.total,
            max_concurrent_trials=at_once or max_concurrent_trials(settings),
            reuse_actors=search.workers_per_trial == 1,
        ),
        run_config=tune.RunConfig(
            name=STUDY_NAME,
            storage_path=str(folder / "tune"),
            callbacks=[watch, *logger_callbacks(search.loggers, folder)],
            # Tune counts the death of a trial's process twice: the call and the actor both fail.
            failure_config=tune.FailureConfig(max_failures=2 * RESTARTS),
            verbose=0,
        ),
    )
    with disk_full_is_said(folder / "tune"):
        try:
            run_interruptibly(tuner.fit, watch.raise_error)
        except RuntimeError as error:
            # Tune replaces the trials whose processes die, but not those that Ray ends for want of memory.
            if isinstance(error.__cause__, ray.exceptions.OutOfMemoryError):
                raise NodeOutOfMemoryError(str(error.__cause__)) from None
            raise


def death_reason(error_file: str | None) -> str:
    """Why Tune gave up a trial: what its traceback ends with, unless that is Ray's report of a dead process."""
    path = Path(error_file) if error_file else None
    text = path.read_text(errors="replace").strip() if path and path.is_file() else ""
    if not text or "ActorDiedError" in text or "The actor died" in text or "The actor is dead" in text:
        return f"its process or node ended {RESTARTS + 1} times"
    return " ".join(text.splitlines()[-1].split())[:300]


def max_concurrent_trials(settings: TrialSettings) -> int:
    """Trials that fit into the cluster at the same time."""
    return max(1, settings.worker.slots(ray.cluster_resources()) // settings.search.workers_per_trial)


def _proposals(settings: TrialSettings, plan: TrialPlan, folder: Path) -> LayoutProposals:
    search = settings.search
    metrics = objectives(search)
    # Not the seed of an earlier session, whose proposals would all come again.
    proposes = sampler(search.sampler, settings.seed + plan.num_known)
    if search.sampler == "surrogate":
        proposes = SurrogateSampler(settings.space, plan.probe, settings.seed, hears="wer" in metrics)
    names = {"first_rung_ce": "CE after the first rung", "cost": search.cost, "wer": "WER"}
    study = new_study(folder, proposes, [names[metric] for metric in metrics])
    return LayoutProposals(
        settings.space,
        plan.candidates,
        study,
        metrics,
        settings.seed,
        asks_study=search.sampler not in ("random", "grid"),
    )


def new_study(folder: Path, proposes: optuna.samplers.BaseSampler, metric_names: Sequence[str]) -> optuna.Study:
    """A study whose values are all minimized, in a journal that optuna-dashboard opens.

    Args:
        folder: gets ``optuna.journal``.
        proposes: its sampler.
        metric_names: of the values of a trial, as the dashboard shows them.
    """
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "optuna.journal"))),
        sampler=proposes,
        study_name=STUDY_NAME,
        directions=["minimize"] * len(metric_names),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(metric_names))
    return study


def objectives(search: SearchConfig) -> list[str]:
    """What Optuna minimizes, by the names of a trial's result: CE at the first rung, which every trial has."""
    wanted = {"first_rung_ce": True, "cost": len(search.ratios) > 1, "wer": "wer" in search.objectives}
    return [name for name, is_wanted in wanted.items() if is_wanted]


class HalvingInsideRatios(FIFOScheduler):
    """Asynchronous successive halving (ASHA) of every ratio by itself.

    A layout with more attention nearly always has the lower CE: compared over all ratios, those of the smallest one
    would never pass a rung.
    """

    def __init__(self, search: SearchConfig, space: SearchSpace) -> None:
        super().__init__()
        self._of_ratio = {space.num_attention(ratio): _successive_halving(search) for ratio in space.ratios}

    def _halving(self, trial: Trial) -> AsyncHyperBandScheduler:
        return self._of_ratio[Layout.from_string(trial.config["layout"]).num_attention]

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._halving(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        return self._halving(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._halving(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        self._halving(trial).on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        self._halving(trial).on_trial_remove(tune_controller, trial)


def _successive_halving(search: SearchConfig) -> AsyncHyperBandScheduler:
    return AsyncHyperBandScheduler(
        time_attr="milestone",
        metric="ce",
        mode="min",
        grace_period=1,
        reduction_factor=search.reduction_factor,
        max_t=search.reduction_factor ** (len(search.rung_tokens) - 1),
    )
