"""Ray Tune + Optuna over layouts: short distillations under successive halving, resumable."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from mamtra_ray.config import SearchConfig
from mamtra_ray.layouts.candidates import Candidate
from mamtra_ray.runtime.stopping import run_interruptibly
from mamtra_ray.search.parameter_space import param_space, params_from_layout, sampler
from mamtra_ray.search.trial import TrialSettings, run_trial

STUDY_NAME = "layouts"


class _OnResult(tune.Callback):
    """Calls a function on the driver with every result and with the last one of every finished trial."""

    def __init__(self, function: Callable[[dict[str, Any], bool], None]) -> None:
        self.function = function

    def __reduce__(self) -> Any:
        # Tune pickles a run's callbacks for its own restore, which is not used here; the screen cannot be pickled.
        return _OnResult, (print,)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self.function(result, False)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.function(trial.last_result, True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.function({"error": trial.error_file, "params": trial.config}, True)


def run_trials(
    settings: TrialSettings,
    candidates: list[Candidate],
    folder: Path,
    on_result: Callable[[dict[str, Any], bool], None],
) -> None:
    """Run the search's trials; their scores end in the table actor.

    Going on after a stop needs no state of Tune or Optuna: the table knows every rung of every layout, so the
    known layouts are given to a new Tuner first and their trials only repeat the recorded scores. That rebuilds the
    history of Optuna's sampler and of successive halving alike, and it works whatever was killed and when.

    Args:
        settings: what the trials share.
        candidates: layouts tried first, in this order: the known ones, then the starting points.
        folder: run folder; ``tune/`` holds Tune's experiment, ``optuna.journal`` the study.
        on_result: called on the driver with ``(result, trial_is_finished)``.
    """
    folder = folder.resolve()
    search = settings.search
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    shutil.rmtree(folder / "tune", ignore_errors=True)
    for stale in folder.glob("optuna.journal*"):
        stale.unlink()
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, settings=settings),
        # With workers of its own, a trial's driver only waits for them.
        {"CPU": 0} if search.workers_per_trial > 1 else settings.worker.bundle(),
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_optuna_search(settings, candidates, folder),
            scheduler=HalvingInsideRatios(search),
            num_samples=len(candidates) if search.sampler == "grid" else max(search.trials, len(candidates)),
            max_concurrent_trials=max_concurrent_trials(settings),
            reuse_actors=search.workers_per_trial == 1,
        ),
        run_config=tune.RunConfig(
            name=STUDY_NAME,
            storage_path=str(folder / "tune"),
            callbacks=[_OnResult(on_result)],
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )
    run_interruptibly(tuner.fit)


def max_concurrent_trials(settings: TrialSettings) -> int:
    """Trials that fit into the cluster at the same time."""
    return max(1, settings.worker.slots(ray.cluster_resources()) // settings.search.workers_per_trial)


def _optuna_search(settings: TrialSettings, candidates: list[Candidate], folder: Path) -> OptunaSearch:
    search = settings.search
    several = len(search.ratios) > 1
    return OptunaSearch(
        param_space(settings.space),
        metric=["first_rung_ce", "cost"] if several else "first_rung_ce",
        mode=["min", "min"] if several else "min",
        points_to_evaluate=[params_from_layout(candidate.layout, settings.space) for candidate in candidates],
        sampler=sampler(search.sampler, settings.seed),
        study_name=STUDY_NAME,
        # A journal that optuna-dashboard opens.
        storage=JournalStorage(JournalFileBackend(str(folder / "optuna.journal"))),
    )


class HalvingInsideRatios(FIFOScheduler):
    """Asynchronous successive halving (ASHA) of every ratio by itself.

    A layout with more attention nearly always has the lower CE: compared over all ratios, those of the smallest one
    would never pass a rung.
    """

    def __init__(self, search: SearchConfig) -> None:
        super().__init__()
        self._of_ratio = {ratio: _successive_halving(search) for ratio in search.ratios}
        self._only = search.ratios[0]

    def _halving(self, trial: Trial) -> AsyncHyperBandScheduler:
        return self._of_ratio[trial.config.get("ratio", self._only)]

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
