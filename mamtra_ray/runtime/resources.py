"""What one worker asks Ray for, and how many of them a cluster can run: the one place that decides about GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mamtra_ray.config import Config, ResourcesConfig
from mamtra_ray.errors import InputError


@dataclass(frozen=True)
class WorkerResources:
    """CPUs and GPUs of one worker, which may be fractions."""

    cpus: float = 1.0
    gpus: float = 0.0

    def options(self) -> dict[str, Any]:
        """For ``ray.remote`` and Ray Data."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}

    def bundle(self) -> dict[str, float]:
        """By Ray's resource names, for Ray Tune and Ray Train."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    @property
    def num_threads(self) -> int:
        """CPU threads of a worker."""
        return max(1, int(self.cpus))

    def slots(self, cluster: Mapping[str, float]) -> int:
        """How many workers run at the same time in a cluster of these resources."""
        return int(min(cluster.get(name, 0) / amount for name, amount in self.bundle().items()))


def worker_resources(asked: ResourcesConfig, cluster: Mapping[str, float]) -> WorkerResources:
    """What the user asked for; GPUs not mentioned: one for each worker wherever the cluster has any."""
    gpus = asked.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.get("GPU", 0) >= 1 else 0.0
    return WorkerResources(asked.cpus_per_worker, gpus)


def check_resources(config: Config, worker: WorkerResources, cluster: Mapping[str, float]) -> None:
    """Refuse worker counts that would wait forever in PENDING.

    Raises:
        InputError: the cluster has too few CPUs or GPUs for a trial, a finalist or the alignment.
    """
    needs = {
        "a trial (search.workers_per_trial)": config.search.workers_per_trial,
        "a finalist (distill.workers)": config.distill.workers,
        "the alignment (align.workers)": config.align.workers,
    }
    for kind, amount in worker.bundle().items():
        for what, workers in needs.items():
            if workers * amount > cluster.get(kind, 0):
                raise InputError(
                    f"{what} needs {workers} workers x {amount:g} {kind} = {workers * amount:g}, but the cluster has "
                    f"{cluster.get(kind, 0):g}; lower the number of workers or resources.{kind.lower()}s_per_worker"
                )
