"""One Mamba mixer per layer learns its attention's output, all layers in one pass over the corpus.

The result is a mixer library (``mixer_library.py``), from which any layout starts without further training.

One worker is a plain Ray task, since a Ray Train run takes 10 s and more to begin; several are a Ray Train run with
data-parallel mixers. (Splitting the layers over the workers instead would need no gradient exchange, but every worker
would repeat the teacher's pass: a third of the work on the demo.)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

from mamtra_ray.align.mixer_library import MANIFEST, LibraryManifest, read_library_manifest, save_library
from mamtra_ray.align.mixer_training import Batch, MixerTraining
from mamtra_ray.artifacts import content_hash
from mamtra_ray.config import AlignConfig
from mamtra_ray.models.mamba import StateSharing
from mamtra_ray.runtime.actor_pool import result_of
from mamtra_ray.runtime.device import device_of_this_process
from mamtra_ray.runtime.progress import repeatedly
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.runtime.train_run import fit
from mamtra_ray.runtime.training import has_state, remove_state
from mamtra_ray.teacher_cache.batches import batches, batches_holding
from mamtra_ray.teacher_cache.shared import SharedCache
from mamtra_ray.teachers.shared import SharedTeacher

# Tokens of the least-squares start, per channel of the projection that it fits.
_TOKENS_PER_CHANNEL = 40
_SECONDS_PER_CHECKPOINT = 20.0
_SECONDS_PER_REPORT = 0.5
_ATTEMPTS = 3

Progress = Callable[[int, int], None]
"""Called with (done, total) training tokens."""


@dataclass(frozen=True)
class AlignJob:
    """What a worker needs; small, since data and teacher stay in the object store."""

    config: AlignConfig
    state_sharing: StateSharing
    seed: int
    folder: str
    made_by: dict[str, str]
    teacher: SharedTeacher
    train: SharedCache
    validation: SharedCache


def align_mixers(
    config: AlignConfig,
    state_sharing: StateSharing,
    folder: Path,
    *,
    teacher: SharedTeacher,
    train: SharedCache,
    validation: SharedCache,
    worker: WorkerResources,
    seed: int = 0,
    on_progress: Progress = lambda done, total: None,
) -> LibraryManifest:
    """Train the library into ``folder``, or go on with one that was stopped; one that fits is not trained again.

    Ray must be initialized.

    Args:
        config: how long, how many workers.
        state_sharing: of the mixers.
        folder: of the library.
        teacher, train, validation: what to learn from; validation gives the reported errors.
        worker: what a worker asks Ray for.
        seed: of the order of the data and of the new weights.
        on_progress: called with (done, total) training tokens.

    Raises:
        InputError: ``folder`` holds a library, or half of one, of another teacher, corpus or other settings.
    """
    made_by = library_made_by(config, state_sharing, teacher.fingerprint, train, seed)
    if (folder / MANIFEST).exists():
        return read_library_manifest(folder, made_by)
    folder.mkdir(parents=True, exist_ok=True)
    job = AlignJob(config, state_sharing, seed, str(folder.resolve()), made_by, teacher, train, validation)
    if config.workers == 1:
        _align_in_a_task(job, worker, on_progress)
    else:
        _align_on_ray_train(job, worker, on_progress)
    on_progress(config.tokens, config.tokens)
    return read_library_manifest(folder, made_by)


def library_made_by(
    config: AlignConfig, state_sharing: StateSharing, teacher_fingerprint: str, train: SharedCache, seed: int
) -> dict[str, str]:
    """Identifies a library: teacher, corpus, and the settings that its weights depend on.

    Not what form the cache has: alignment reads its tokens only. Nor how many workers share a batch: equal but for
    rounding.
    """
    settings = config.model_dump(exclude={"workers"}) | {
        "state_sharing": state_sharing,
        "selection": train.manifest.made_by["selection"],
        "train_speech_tokens": train.speech_tokens,
        "seed": seed,
    }
    corpus = train.manifest.made_by["corpus"]
    return {"teacher": teacher_fingerprint, "corpus": corpus, "settings": content_hash(settings)}


def align(job: AlignJob, device: torch.device, rank: int = 0, world_size: int = 1) -> Iterator[int]:
    """Train in this process, as one of ``world_size``; yields the tokens done about every half second.

    The process of rank 0 keeps a checkpoint in the library's folder and writes the library at the end. A checkpoint
    of the same job is taken up.
    """
    config, folder = job.config, Path(job.folder)
    teacher = job.teacher.load()
    training = MixerTraining(teacher.model, config, job.state_sharing, device, world_size, job.seed)

    def train_batches(epoch: int, skip: int = 0) -> Iterator[Batch]:
        return batches(
            job.train,
            teacher.sequence,
            tokens_per_batch=config.tokens_per_batch,
            seed=job.seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            skip_batches=skip,
            device=device,
        )

    def held_out() -> dict[int, float]:
        size = config.tokens_per_batch
        return training.errors(
            batches(job.validation, teacher.sequence, tokens_per_batch=size, seed=0, epoch=0, device=device)
        )

    if has_state(folder):
        content = training.load(folder, job.made_by)
        transferred, start = (_by_layer(content[name]) for name in ("transferred", "start"))
        seconds_before = float(content["seconds"])
    else:
        transferred = held_out()
        wanted = _TOKENS_PER_CHANNEL * teacher.model.config.mixer.inner_size
        count = batches_holding(
            job.train, teacher.sequence, wanted, tokens_per_batch=config.tokens_per_batch, seed=job.seed, epoch=0
        )
        training.fit_output_projections(itertools.islice(train_batches(epoch=0), count))
        start, seconds_before = held_out(), 0.0

    began = last_yield = last_save = time.monotonic()

    def seconds() -> float:
        return seconds_before + time.monotonic() - began

    while training.position.tokens < config.tokens:
        for batch in train_batches(training.position.epoch, training.position.batch):
            training.step(batch)
            now = time.monotonic()
            if rank == 0 and now - last_save > _SECONDS_PER_CHECKPOINT:
                training.save(folder, job.made_by, transferred=transferred, start=start, seconds=seconds())
                last_save = now
            if now - last_yield > _SECONDS_PER_REPORT:
                yield training.position.tokens
                last_yield = now
            if training.position.tokens >= config.tokens:
                break
        else:
            training.next_epoch()
    spent = seconds()
    errors = held_out()
    if rank == 0:
        manifest = LibraryManifest(
            transferred, start, errors, training.position.tokens, training.position.step, round(spent, 2), world_size
        )
        save_library(folder, training.library(), job.made_by, manifest)
        remove_state(folder)
    yield training.position.tokens


def _align_in_a_task(job: AlignJob, worker: WorkerResources, report: Progress) -> None:
    total = job.config.tokens
    # Not Ray's own retries: they replay what a generator yielded, which a resumed training does not repeat.
    for attempt in range(1, _ATTEMPTS + 1):
        task = _align_task.options(**worker.options())
        try:
            for tokens in cast(Iterable[Any], task.remote(job)):
                report(min(result_of(tokens), total), total)
            return
        except (WorkerCrashedError, RayActorError, NodeDiedError, ObjectLostError):
            if attempt == _ATTEMPTS:
                raise


@ray.remote(num_returns="streaming", max_retries=0)
def _align_task(job: AlignJob) -> Iterator[int]:
    yield from align(job, device_of_this_process())


def _align_on_ray_train(job: AlignJob, worker: WorkerResources, report: Progress) -> None:
    counter = _Counter.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    trainer = ray.train.torch.TorchTrainer(
        train_fn_per_worker,
        train_loop_config={"job": job, "counter": counter},
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.config.workers, use_gpu=worker.gpus > 0, resources_per_worker=worker.bundle()
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(Path(job.folder) / "train"),
            failure_config=ray.train.FailureConfig(max_failures=_ATTEMPTS - 1),
        ),
    )
    total = job.config.tokens
    with repeatedly(lambda: report(min(ray.get(counter.get.remote()), total), total)):
        fit(trainer, Path(job.folder))


def train_fn_per_worker(train_loop_config: dict[str, Any]) -> None:
    """Ray Train's worker function. Its checkpoint lies in the library's folder, which all nodes must see."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    for tokens in align(train_loop_config["job"], ray.train.torch.get_device(), rank, context.get_world_size()):
        if rank == 0:
            train_loop_config["counter"].set.remote(tokens)


@ray.remote
class _Counter:
    """The tokens that rank 0 has seen."""

    def __init__(self) -> None:
        self.tokens = 0

    def set(self, tokens: int) -> None:
        self.tokens = tokens

    def get(self) -> int:
        return self.tokens


def _by_layer(errors: dict[str, float]) -> dict[int, float]:
    """JSON has texts for keys."""
    return {int(layer): float(error) for layer, error in errors.items()}
