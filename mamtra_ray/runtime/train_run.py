"""A run of Ray Train whose workers' sentences reach the user."""

from __future__ import annotations

from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from mamtra_ray.errors import InputError
from mamtra_ray.runtime.stopping import run_interruptibly


def fit(trainer: TorchTrainer) -> Any:
    """``trainer.fit()``, stopped by signals; what a worker says of its input is raised as it was, without Ray's trace.

    Raises:
        InputError: of the first worker that had one, such as a training that has diverged.
    """
    try:
        return run_interruptibly(trainer.fit)
    except ray.train.TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            for reason in (failure, getattr(failure, "cause", None), failure.__cause__):
                if isinstance(reason, InputError):
                    raise type(reason)(str(reason)) from None
        raise
