"""Spreads chunks of an evaluation over Ray actors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray

from mamtra_ray.config import Config
from mamtra_ray.errors import InputError
from mamtra_ray.evaluation_worker import Chunk, EvaluationWorker, Row


def evaluated(config: Config, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[Row], dict[str, np.ndarray], int]]:
    """Yield every chunk with its rows, kept waveforms and their sample rate, in the order they finish.

    Chunks go to actors as these become ready, so an actor that waits for a busy CPU holds nothing up. An actor whose
    node or process dies is started again by Ray, and its chunk with it.

    Raises:
        InputError: an actor cannot load the teacher, a system, the codec or the recogniser.
        GenerationCheckError: a system does not generate what it computes.
    """
    if not chunks:
        return
    cpus, gpus = config.search.cpus_per_worker, _gpus_per_actor(config)
    cluster = ray.cluster_resources()
    slots = min(cluster.get("CPU", 1) // cpus, cluster.get("GPU", 0) // gpus if gpus else len(chunks))
    if slots < 1:
        raise InputError(f"an evaluation actor needs {cpus:g} CPU and {gpus:g} GPU, the cluster has {cluster}")
    actors = [_actor(config) for _ in range(min(int(slots), len(chunks)))]
    waiting = deque(chunks)
    running: dict[Any, tuple[Any, Chunk | None]] = {actor.prepare.remote(): (actor, None) for actor in actors}
    unfinished = len(chunks)
    try:
        while unfinished:
            (reference,), _ = ray.wait(list(running), num_returns=1)
            actor, chunk = running.pop(reference)
            result = result_of(reference)
            if waiting:
                following = waiting.popleft()
                running[actor.run.remote(following)] = (actor, following)
            if chunk is not None:
                unfinished -= 1
                yield chunk, *result
    finally:
        for actor in actors:
            ray.kill(actor)


def check_speech_stack(config: Config) -> None:
    """Load recogniser, codec and metrics once, so that a wrong path is said before hours of training.

    Raises:
        InputError: one of their files or packages is missing where evaluation actors run.
    """
    actor = _actor(config)
    try:
        result_of(actor.prepare.remote())
    finally:
        ray.kill(actor)


def _actor(config: Config) -> Any:
    cpus, gpus = config.search.cpus_per_worker, _gpus_per_actor(config)
    actor_class: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=3, max_task_retries=3)(EvaluationWorker)
    return actor_class.remote(config, max(1, int(cpus)))


def _gpus_per_actor(config: Config) -> float:
    if config.search.gpus_per_worker is not None:
        return config.search.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def result_of(reference: Any) -> Any:
    """What a Ray task returned; an :class:`InputError` of its own is raised as it was, without Ray's traceback."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise type(error.cause)(str(error.cause)) from None
        raise
