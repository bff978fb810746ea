"""Verb ``align``: one Mamba mixer per layer learns its attention's output, all layers in one pass over the corpus.

The result is a mixer library (``mixer_library.py``), from which any layout starts without further training.

One worker is a plain Ray task, since a Ray Train run takes 10 s and more to begin; several are a Ray Train run with
data-parallel mixers. (Splitting the layers over the workers instead would need no gradient exchange, but every worker
would repeat the teacher's pass: a third of the work on the demo.)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayActorError, WorkerCrashedError

from mamtra_ray.artifacts import content_hash
from mamtra_ray.config import Config, add_common_arguments, config_from_arguments
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.mixer_library import (
    MANIFEST,
    LibraryManifest,
    error_table,
    load_library,
    read_library_manifest,
    save_library,
)
from mamtra_ray.mixer_training import Batch, MixerTraining
from mamtra_ray.progress import every_second
from mamtra_ray.shared_batches import batches
from mamtra_ray.shared_cache import SharedCache
from mamtra_ray.teachers.base import Teacher

STATE = "state.pt"

__all__ = ["LibraryManifest", "align_mixers", "load_library", "main"]

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

    config: Config
    folder: str
    made_by: dict[str, str]
    teacher: Any
    """Reference of the :class:`Teacher`."""
    train: SharedCache
    validation: SharedCache


def align_mixers(
    config: Config,
    folder: Path,
    *,
    teacher: Teacher,
    train: SharedCache,
    validation: SharedCache,
    on_progress: Progress | None = None,
) -> LibraryManifest:
    """Train the library into ``folder``, or go on with one that was stopped; one that fits is not trained again.

    Ray must be initialised.

    Args:
        config: sections align (how long, how many workers), student (state sharing) and search (CPUs and GPUs of a
            worker) count.
        folder: of the library.
        teacher, train, validation: what to learn from; validation gives the reported errors.
        on_progress: called with (done, total) training tokens.

    Raises:
        InputError: ``folder`` holds a library of another teacher, corpus or other settings.
    """
    made_by = library_made_by(config, teacher, train)
    if (folder / MANIFEST).exists():
        return read_library_manifest(folder, made_by)
    folder.mkdir(parents=True, exist_ok=True)
    job = AlignJob(config, str(folder.resolve()), made_by, [ray.put(teacher)], train, validation)
    report = on_progress or (lambda _done, _total: None)
    if config.align.workers == 1:
        _align_in_a_task(job, report)
    else:
        _align_on_ray_train(job, report)
    report(config.align.tokens, config.align.tokens)
    return read_library_manifest(folder, made_by)


def library_made_by(config: Config, teacher: Teacher, train: SharedCache) -> dict[str, str]:
    """Identifies a library: teacher, corpus, and the settings that its weights depend on."""
    settings = config.align.model_dump(exclude={"workers"}) | {
        "state_sharing": config.student.state_sharing,
        "train_speech_tokens": train.speech_tokens,
    }
    corpus = train.manifest.made_by["corpus"]
    return {"teacher": teacher.fingerprint, "corpus": corpus, "settings": content_hash(settings)}


def align(job: AlignJob, device: torch.device, rank: int = 0, world_size: int = 1) -> Iterator[int]:
    """Train in this process, as one of ``world_size``; yields the tokens done about every half second.

    The process of rank 0 keeps a checkpoint in the library's folder and writes the library at the end. A checkpoint
    of the same job is taken up.
    """
    config, folder = job.config, Path(job.folder)
    teacher: Teacher = ray.get(job.teacher[0])
    training = MixerTraining(teacher.model, config.align, config.student.state_sharing, device, world_size)

    def train_batches(epoch: int, skip: int = 0) -> Iterator[Batch]:
        return batches(
            job.train,
            teacher.sequence,
            batch_tokens=max(1, config.align.batch_tokens // world_size),
            seed=0,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            skip_batches=skip,
            device=device,
        )

    def held_out() -> dict[int, float]:
        return training.errors(
            batches(
                job.validation,
                teacher.sequence,
                batch_tokens=config.align.batch_tokens,
                seed=0,
                epoch=0,
                device=device,
            )
        )

    state = _saved_state(folder / STATE, job.made_by)
    if state is None:
        transferred = held_out()
        wanted = _TOKENS_PER_CHANNEL * teacher.model.config.mixer.inner_size // world_size
        training.fit_output_projections(_first_tokens(train_batches(epoch=0), wanted))
        start, seconds_before = held_out(), 0.0
    else:
        training.load(folder / STATE)
        transferred, start, seconds_before = state["transferred"], state["start"], state["seconds"]

    began = last_yield = last_save = time.monotonic()

    def seconds() -> float:
        return seconds_before + time.monotonic() - began

    while training.position.tokens < config.align.tokens:
        for batch in train_batches(training.position.epoch, training.position.batch):
            training.step(batch)
            now = time.monotonic()
            if rank == 0 and now - last_save > _SECONDS_PER_CHECKPOINT:
                training.save(
                    folder / STATE, made_by=job.made_by, transferred=transferred, start=start, seconds=seconds()
                )
                last_save = now
            if now - last_yield > _SECONDS_PER_REPORT:
                yield training.position.tokens
                last_yield = now
            if training.position.tokens >= config.align.tokens:
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
        (folder / STATE).unlink(missing_ok=True)
    yield training.position.tokens


def _align_in_a_task(job: AlignJob, report: Progress) -> None:
    total = job.config.align.tokens
    # Not Ray's own retries: they replay what a generator yielded, which a resumed training does not repeat.
    for attempt in range(1, _ATTEMPTS + 1):
        task = _align_task.options(
            num_cpus=job.config.search.cpus_per_worker, num_gpus=job.config.search.gpus_per_worker or 0
        )
        try:
            for tokens in cast(Iterable[Any], task.remote(job)):
                report(min(ray.get(tokens), total), total)
            return
        except (WorkerCrashedError, RayActorError):
            if attempt == _ATTEMPTS:
                raise


@ray.remote(num_returns="streaming", max_retries=0)
def _align_task(job: AlignJob) -> Iterator[int]:
    yield from align(job, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _align_on_ray_train(job: AlignJob, report: Progress) -> None:
    config = job.config
    gpus = config.search.gpus_per_worker or 0
    counter = _Counter.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    trainer = ray.train.torch.TorchTrainer(
        train_fn_per_worker,
        train_loop_config={"job": job, "counter": counter},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.align.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": config.search.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(Path(job.folder) / "train"),
            failure_config=ray.train.FailureConfig(max_failures=_ATTEMPTS - 1),
        ),
    )
    total = config.align.tokens
    with every_second(lambda: report(min(ray.get(counter.get.remote()), total), total)):
        trainer.fit()


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


def _saved_state(path: Path, made_by: dict[str, str]) -> dict[str, Any] | None:
    """A checkpoint of the same job; none if there is none, or if it belongs to another job."""
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True, map_location="cpu")
    return state if state["made_by"] == made_by else None


def _first_tokens(source: Iterable[Batch], tokens: int) -> Iterator[Batch]:
    """Batches until they hold ``tokens`` positions."""
    seen = 0
    for batch in source:
        yield batch
        seen += batch.input_ids_BL.numel()
        if seen >= tokens:
            return


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    from mamtra_ray.session import make_cache, make_library, start_session

    parser = argparse.ArgumentParser(prog="python -m mamtra_ray.align", description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--address", help="Ray cluster (default: $RAY_ADDRESS, else a new local one)")
    options = parser.parse_intermixed_args(arguments)
    config, folder = config_from_arguments(options)
    if options.dry_run:
        print(f"align: {config.align.tokens:,} tokens on {config.align.workers} worker(s), into {folder.parent}/shared")
        return 0
    session = start_session(config, folder, ("cache", "align"), options.address)
    library = make_library(session, *make_cache(session))
    if library is None:
        raise InputError(
            f"student.initialisation is {config.student.initialisation}: nothing to align (set it to aligned)"
        )
    manifest = read_library_manifest(library)
    print(error_table(manifest))
    print(f"\n{manifest.tokens:,} tokens in {manifest.seconds:.0f} s, {library}")
    return 0


if __name__ == "__main__":
    # As an imported module: Ray must find its functions by name.
    from mamtra_ray.align import main as imported_main

    raise SystemExit(imported_main())
