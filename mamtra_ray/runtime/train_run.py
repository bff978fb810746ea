"""A run of Ray Train whose workers' sentences reach the user."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from mamtra_ray.artifacts import disk_full_is_said
from mamtra_ray.errors import InputError
from mamtra_ray.runtime.stopping import run_interruptibly

_ATTEMPTS = 3

NewTrainer = Callable[[], TorchTrainer]
"""A trainer of the same run each time: a new one goes on from the run's last checkpoint."""


def fit(new_trainer: NewTrainer, folder: Path) -> Any:
    """Train to the end, stopped by signals; what a worker says of its input is raised as it was, without Ray's trace.

    Args:
        new_trainer: of the run; without restarts of its own (``max_failures=0``).
        folder: where it keeps its files.

    Raises:
        InputError: of the first worker that had one, such as a training that has diverged.
        DiskFullError: a checkpoint or Ray Train's own files do not fit on the disk.
    """
    with disk_full_is_said(folder / "train"):
        return run_interruptibly(lambda: fit_again_after_failures(new_trainer))


def fit_again_after_failures(new_trainer: NewTrainer) -> Any:
    """``trainer.fit()``, up to three times: a worker may be lost with its node.

    Not left to Ray Train, which trains again as well where a worker refused its input, and is refused again.

    Raises:
        InputError: of the first worker that had one.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return new_trainer().fit()
        except ray.train.TrainingFailedError as error:
            failures = getattr(error, "worker_failures", {})
            for failure in failures.values():
                for reason in (failure, getattr(failure, "cause", None), failure.__cause__):
                    if isinstance(reason, InputError):
                        raise type(reason)(str(reason)) from None
            # Another kind, such as a controller that cannot start workers, may still hold what the next one would need.
            if not failures or attempt == _ATTEMPTS:
                raise
            logging.getLogger(__name__).warning("a worker failed, training goes on from its last checkpoint: %s", error)
    raise AssertionError("unreachable")
