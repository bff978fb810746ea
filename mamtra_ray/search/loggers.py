"""MLflow and Weights & Biases beside the run's own files: Ray Tune's callbacks for them, a run of theirs per trial."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamtra_ray.errors import InputError

MLFLOW_DATABASE = "mlflow.db"


def logger_callbacks(names: Sequence[str], run_folder: Path) -> list[Any]:
    """Tune's callbacks of ``search.loggers``.

    Addresses and keys are those packages' own environment variables (``MLFLOW_TRACKING_URI``, ``WANDB_API_KEY``).
    Without an address MLflow writes into ``mlflow.db`` of the run folder (since 3.17 it refuses folders), and
    without ``WANDB_DIR`` Weights & Biases into its ``wandb/``. Trials of a run stand together: as an experiment of
    MLflow, as a group of Weights & Biases.

    Args:
        names: ``mlflow``, ``wandb``; that they are installed was checked (:mod:`mamtra_ray.run.checks`).
        run_folder: of the search.

    Raises:
        InputError: MLflow cannot use its address, or Weights & Biases has no key.
    """
    return [_MAKERS[name](run_folder) for name in names]


def _mlflow(run_folder: Path) -> Any:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_folder.absolute() / MLFLOW_DATABASE}"
    try:
        MlflowClient(address)
    except MlflowException as error:
        raise InputError(
            f"search.loggers has mlflow, which cannot use {address}: {' '.join(str(error).split())[:300]}"
        ) from None
    return MLflowLoggerCallback(address, experiment_name=str(run_folder), tags={"run": str(run_folder)})


def _wandb(run_folder: Path) -> Any:
    from ray.air.integrations.wandb import WandbLoggerCallback

    project = os.environ.get("WANDB_PROJECT_NAME", "mamtra_ray")
    # Not where Ray's actors work: that is a temporary folder, of which Tune copies what is there while it is written.
    folder = os.environ.get("WANDB_DIR") or str(run_folder.absolute())
    callback = WandbLoggerCallback(project=project, group=run_folder.name, dir=folder)
    try:
        callback.setup()
    except ValueError as error:  # no key
        raise InputError(
            f"search.loggers has wandb, which has no key: set WANDB_API_KEY, or WANDB_MODE=offline ({error})"
        ) from None
    return callback


_MAKERS = {"mlflow": _mlflow, "wandb": _wandb}
