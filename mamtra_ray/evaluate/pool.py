"""Spreads chunks of an evaluation over Ray actors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray

from mamtra_ray.evaluate.worker import Chunk, EvaluationSettings, EvaluationWorker, Row
from mamtra_ray.runtime.actor_pool import ActorPool, result_of
from mamtra_ray.runtime.resources import WorkerResources


def evaluated(
    settings: EvaluationSettings, chunks: Sequence[Chunk], worker: WorkerResources
) -> Iterator[tuple[Chunk, list[Row], dict[str, np.ndarray], int]]:
    """Yield every chunk with its rows, kept waveforms and their sample rate, in the order they finish.

    An actor whose node or process dies is started again by Ray, and its chunk with it.

    Raises:
        InputError: an actor cannot load a system, the codec or the recognizer; or none fits into the cluster.
        GenerationCheckError: a system does not generate what it computes.
    """
    if not chunks:
        return
    size = worker.slots(ray.cluster_resources())
    arguments = (settings, worker.num_threads)
    with ActorPool(EvaluationWorker, arguments, worker.options(), size) as pool:
        for chunk, result in pool.map_unordered(lambda actor, chunk: actor.run.remote(chunk), chunks):
            yield chunk, *result


def check_speech_stack(settings: EvaluationSettings, worker: WorkerResources) -> None:
    """Load recognizer, codec and metrics once, so that a wrong path is said before hours of training.

    Raises:
        InputError: one of their files or packages is missing where evaluation actors run.
    """
    remote: Any = ray.remote(**worker.options())(EvaluationWorker)
    actor = remote.remote(settings, worker.num_threads)
    try:
        result_of(actor.prepare.remote())
    finally:
        ray.kill(actor)
