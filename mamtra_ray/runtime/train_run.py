"""A run of Ray Train whose workers' sentences reach the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from mamtra_ray.artifacts import disk_full_is_said
from mamtra_ray.errors import InputError
from mamtra_ray.runtime.stopping import run_interruptibly


def fit(trainer: TorchTrainer, folder: Path) -> Any:
    """``trainer.fit()``, stopped by signals; what a worker says of its input is raised as it was, without Ray's trace.

    Args:
        trainer: of the run.
        folder: where it keeps its files.

    Raises:
        InputError: of the first worker that had one, such as a training that has diverged.
        DiskFullError: a checkpoint or Ray Train's own files do not fit on the disk.
    """
    try:
        with disk_full_is_said(folder / "train"):
            return run_interruptibly(trainer.fit)
    except ray.train.TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            for reason in (failure, getattr(failure, "cause", None), failure.__cause__):
                if isinstance(reason, InputError):
                    raise type(reason)(str(reason)) from None
        raise
