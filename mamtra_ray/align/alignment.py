"""One Mamba mixer per layer learns its attention's output, all layers in one pass over the corpus.

The result is a mixer library (``mixer_library.py``), from which any layout starts without further training.

One worker is a plain Ray task, since a Ray Train run takes 10 s and more to begin; several are a Ray Train run with
data-parallel mixers. (Splitting the layers over the workers instead would need no gradient exchange, but every worker
would repeat the teacher's pass: a third of the work on the demo.)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

from mamtra_ray.align.mixer_library import MANIFEST, LibraryManifest, read_library_manifest, save_library
from mamtra_ray.align.mixer_training import Batch, ErrorSums, MixerTraining
from mamtra_ray.artifacts import content_hash
from mamtra_ray.config import AlignConfig
from mamtra_ray.models.mamba import StateSharing
from mamtra_ray.runtime.actor_pool import result_of
from mamtra_ray.runtime.device import device_of_this_process
from mamtra_ray.runtime.progress import repeatedly
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.runtime.shard_files import remove_shards
from mamtra_ray.runtime.sharding import is_sharded
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
Activity = Callable[[str, float | None], None]
"""Called with what is done beside training, and the part of it that is done, if that is known."""


@dataclass(frozen=True)
class AlignStep:
    """What an alignment tells while it runs."""

    tokens: int
    """Training tokens done."""
    doing: str = ""
    """What it is doing that is no training; empty while it trains."""
    part: float | None = None
    """Of that, 0 to 1."""


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
    on_activity: Activity = lambda what, part: None,
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
        on_activity: called with what else is done, in words, and the part of it that is done if that is known.

    Raises:
        InputError: ``folder`` holds a library, or half of one, of another teacher, corpus or other settings.
    """
    made_by = library_made_by(config, state_sharing, teacher.fingerprint, train, seed)
    if (folder / MANIFEST).exists():
        return read_library_manifest(folder, made_by)
    folder.mkdir(parents=True, exist_ok=True)
    job = AlignJob(config, state_sharing, seed, str(folder.resolve()), made_by, teacher, train, validation)

    def report(step: AlignStep) -> None:
        if step.doing:
            on_activity(step.doing, step.part)
        else:
            on_progress(min(step.tokens, config.tokens), config.tokens)

    if config.workers == 1:
        on_activity("starting a worker that loads the teacher", None)
        _align_in_a_task(job, worker, report)
    else:
        on_activity(f"starting {config.workers} Ray Train workers", None)
        _align_on_ray_train(job, worker, report)
    on_progress(config.tokens, config.tokens)
    return read_library_manifest(folder, made_by)


def library_made_by(
    config: AlignConfig, state_sharing: StateSharing, teacher_fingerprint: str, train: SharedCache, seed: int
) -> dict[str, str]:
    """Identifies a library: teacher, corpus, and the settings that its weights depend on.

    Not what form the cache has: alignment reads its tokens only. Nor how many workers share a batch: equal but for
    rounding.
    """
    settings = config.model_dump(exclude={"workers", "fully_shard"}) | {
        "state_sharing": state_sharing,
        "selection": train.manifest.made_by["selection"],
        "train_speech_tokens": train.speech_tokens,
        "seed": seed,
    }
    corpus = train.manifest.made_by["corpus"]
    return {"teacher": teacher_fingerprint, "corpus": corpus, "settings": content_hash(settings)}


def align(job: AlignJob, device: torch.device, rank: int = 0, world_size: int = 1) -> Iterator[AlignStep]:
    """Train in this process, as one of ``world_size``; yields how far it is about every half second.

    The process of rank 0 keeps a checkpoint in the library's folder and writes the library at the end. A checkpoint
    of the same job is taken up.
    """
    config, folder = job.config, Path(job.folder)
    teacher = job.teacher.load()
    model = teacher.model if is_sharded(config.fully_shard, world_size) else job.teacher.model_on(device)
    training = MixerTraining(model, config, job.state_sharing, device, world_size, job.seed)

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

    def held_out(doing: str) -> Generator[AlignStep, None, dict[int, float]]:
        sums, size = ErrorSums(training), config.tokens_per_batch
        last = 0.0
        for batch in batches(job.validation, teacher.sequence, tokens_per_batch=size, seed=0, epoch=0, device=device):
            if time.monotonic() - last > _SECONDS_PER_REPORT:
                yield AlignStep(training.position.tokens, doing, min(sums.tokens / job.validation.speech_tokens, 1.0))
                last = time.monotonic()
            sums.add(batch)
        return sums.errors()

    if has_state(folder):
        content = training.load(folder, job.made_by)
        transferred, start = (_by_layer(content[name]) for name in ("transferred", "start"))
        seconds_before = float(content["seconds"])
    else:
        transferred = yield from held_out("measuring the held-out errors of transferred mixers")
        wanted = _TOKENS_PER_CHANNEL * teacher.model.config.mixer.inner_size
        count = batches_holding(
            job.train, teacher.sequence, wanted, tokens_per_batch=config.tokens_per_batch, seed=job.seed, epoch=0
        )
        yield AlignStep(0, "fitting the mixers' output projections by least squares")
        training.fit_output_projections(itertools.islice(train_batches(epoch=0), count))
        start = yield from held_out("measuring the held-out errors before the first step")
        seconds_before = 0.0

    yield AlignStep(training.position.tokens)
    began = last_yield = last_save = time.monotonic()

    def seconds() -> float:
        return seconds_before + time.monotonic() - began

    while training.position.tokens < config.tokens:
        for batch in train_batches(training.position.epoch, training.position.batch):
            training.step(batch)
            now = time.monotonic()
            if training.is_asked_by_first(now - last_save > _SECONDS_PER_CHECKPOINT):
                training.save(folder, job.made_by, transferred=transferred, start=start, seconds=seconds())
                last_save = now
            if now - last_yield > _SECONDS_PER_REPORT:
                yield AlignStep(training.position.tokens)
                last_yield = now
            if training.position.tokens >= config.tokens:
                break
        else:
            training.next_epoch()
    spent = seconds()
    errors = yield from held_out("measuring the held-out errors of the trained mixers")
    yield AlignStep(training.position.tokens, "saving the mixers")
    library = training.library() if rank == 0 or training.is_sharded else {}
    if rank == 0:
        manifest = LibraryManifest(
            transferred, start, errors, training.position.tokens, training.position.step, round(spent, 2), world_size
        )
        save_library(folder, library, job.made_by, manifest)
        remove_state(folder)
        remove_shards(folder)
    yield AlignStep(training.position.tokens)


def _align_in_a_task(job: AlignJob, worker: WorkerResources, report: Callable[[AlignStep], None]) -> None:
    # Not Ray's own retries: they replay what a generator yielded, which a resumed training does not repeat.
    for attempt in range(1, _ATTEMPTS + 1):
        task = _align_task.options(**worker.options())
        try:
            for step in cast(Iterable[Any], task.remote(job)):
                report(result_of(step))
            return
        except (WorkerCrashedError, RayActorError, NodeDiedError, ObjectLostError):
            if attempt == _ATTEMPTS:
                raise


@ray.remote(num_returns="streaming", max_retries=0)
def _align_task(job: AlignJob) -> Iterator[AlignStep]:
    yield from align(job, device_of_this_process())


def _align_on_ray_train(job: AlignJob, worker: WorkerResources, report: Callable[[AlignStep], None]) -> None:
    latest: Any = ray.remote(num_cpus=0)(_Latest).remote()  # type: ignore[attr-defined]

    def new_trainer() -> ray.train.torch.TorchTrainer:
        return ray.train.torch.TorchTrainer(
            train_fn_per_worker,
            train_loop_config={"job": job, "latest": latest},
            scaling_config=ray.train.ScalingConfig(
                num_workers=job.config.workers, use_gpu=worker.gpus > 0, resources_per_worker=worker.bundle()
            ),
            run_config=ray.train.RunConfig(name="train", storage_path=str(Path(job.folder) / "train")),
        )

    def tell() -> None:
        if (step := ray.get(latest.get.remote())) is not None:
            report(step)

    with repeatedly(tell):
        fit(new_trainer, Path(job.folder))


def train_fn_per_worker(train_loop_config: dict[str, Any]) -> None:
    """Ray Train's worker function. Its checkpoint lies in the library's folder, which all nodes must see."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    for step in align(train_loop_config["job"], ray.train.torch.get_device(), rank, context.get_world_size()):
        if rank == 0:
            train_loop_config["latest"].set.remote(step)


class _Latest:
    """What rank 0 has told last."""

    def __init__(self) -> None:
        self.step: AlignStep | None = None

    def set(self, step: AlignStep) -> None:
        self.step = step

    def get(self) -> AlignStep | None:
        return self.step


def _by_layer(errors: dict[str, float]) -> dict[int, float]:
    """JSON has texts for keys."""
    return {int(layer): float(error) for layer, error in errors.items()}
