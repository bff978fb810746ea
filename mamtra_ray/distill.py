"""Verb ``distill``: train one layout with Eq. 5 from the teacher cache, on Ray Train workers.

The same :func:`distill` serves a Tune trial (one process, ``trial.py``) and the workers of a Ray Train run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from mamtra_ray.config import Config, add_common_arguments, config_from_arguments
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.session import cached_library, cached_teacher, make_cache, make_library, start_session
from mamtra_ray.shared_batches import batches
from mamtra_ray.shared_cache import SharedCache
from mamtra_ray.teachers.base import SpeechLM, make_student
from mamtra_ray.training import Distillation, Stopwatch, validate


@dataclass(frozen=True)
class DistillJob:
    """Everything a worker needs to distil one layout; small, since the data stays in the object store."""

    layout: str
    config: Config
    report_at: tuple[int, ...]
    """Training tokens after which the student is validated and reported; the last one ends the training."""
    train: SharedCache
    validation: SharedCache
    library: str | None
    """Folder of the mixer library, for the initialisation ``aligned``."""
    seed: int = 0
    progress: Any = None
    """Handle of an actor with ``note_tokens(layout, tokens)``, told about every second; none for silence."""


@dataclass(frozen=True)
class Report:
    """What :func:`distill` yields at each of ``report_at``; all figures are plain numbers."""

    layout: str
    tokens: int
    step: int
    seconds: float
    """Of training since its first step, over all sessions, validation included."""
    tokens_per_second: float
    waiting: float
    """Share of the time spent waiting for data."""
    ce: float
    """Held-out cross-entropy, nats per token."""
    kl: float
    """Held-out KL(teacher || student), nats per token."""
    ce_start: float
    """Held-out cross-entropy before the first step."""
    curve: list[dict[str, float]]
    """Training loss terms since the last report, about 100 steps of them: step, tokens, total, ce, logits, emb."""


def initial_student(job: DistillJob) -> SpeechLM:
    """The student of ``job`` before training, initialised as its configuration says."""
    config = job.config
    teacher = cached_teacher(config.teacher.kind, config.teacher.path)
    aligned = config.student.initialisation == "aligned"
    library = cached_library(job.library, teacher.fingerprint) if aligned and job.library else None
    return make_student(
        teacher.model,
        Layout.from_string(job.layout),
        initialisation=config.student.initialisation,
        mixer_library=library,
        state_sharing=config.student.state_sharing,
        seed=job.seed,
    )


def distill(
    job: DistillJob,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    start: Path | None = None,
) -> Iterator[tuple[Report, Distillation]]:
    """Train ``job``'s student; at each of ``job.report_at`` yield the scores and the training, ready to be saved.

    Args:
        job: what to train.
        device: where.
        rank, world_size: this process among those that train together.
        start: folder of a saved :class:`Distillation` to go on from.

    Yields:
        every process yields at the same steps; the held-out scores are computed by each process itself.
    """
    config = job.config
    teacher = cached_teacher(config.teacher.kind, config.teacher.path)
    training = Distillation(initial_student(job), config.distill, job.report_at[-1], device, world_size)
    held_out = functools.partial(
        batches, job.validation, teacher.sequence, batch_tokens=4 * config.distill.batch_tokens, seed=0, epoch=0
    )
    # The initial student is cheap to score and shows that training trains.
    ce_start = validate(training.student, held_out(device=device)).ce
    if start is not None:
        training.load(start)
    stopwatch, seconds_before = Stopwatch(), training.seconds
    first_tokens = training.position.tokens
    curve: list[dict[str, float]] = []
    for target in job.report_at:
        if target <= first_tokens:
            continue
        while training.position.tokens < target:
            epoch_batches = batches(
                job.train,
                teacher.sequence,
                batch_tokens=config.distill.batch_tokens // world_size,
                seed=job.seed,
                epoch=training.position.epoch,
                rank=rank,
                world_size=world_size,
                skip_batches=training.position.batch,
                device=device,
            )
            for batch in stopwatch.watch(epoch_batches):
                terms = training.step(batch)
                if rank == 0 and job.progress is not None and stopwatch.a_second_passed():
                    job.progress.note_tokens.remote(job.layout, training.position.tokens)
                curve.append({"step": training.position.step, "tokens": training.position.tokens, **terms})
                if training.position.tokens >= target:
                    break
            else:
                training.next_epoch()
        scores = validate(training.student, held_out(device=device))
        seconds = stopwatch.seconds
        training.seconds = seconds_before + seconds
        report = Report(
            layout=job.layout,
            tokens=training.position.tokens,
            step=training.position.step,
            seconds=training.seconds,
            tokens_per_second=(training.position.tokens - first_tokens) / seconds,
            waiting=stopwatch.waited / seconds,
            ce=scores.ce,
            kl=scores.kl,
            ce_start=ce_start,
            curve=curve[:: max(1, len(curve) // 100)],
        )
        curve = []
        yield report, training


def train_fn_per_worker(train_loop_config: dict[str, DistillJob]) -> None:
    """Ray Train's worker function: distil, report and save a checkpoint at each of the job's ``report_at``."""
    job = train_loop_config["job"]
    context = ray.train.get_context()
    start = ray.train.get_checkpoint()
    device = ray.train.torch.get_device()
    with start.as_directory() if start else contextlib.nullcontext() as folder:
        for report, training in distill(
            job, device, context.get_world_rank(), context.get_world_size(), Path(folder) if folder else None
        ):
            metrics = vars(report)
            if context.get_world_rank() == 0:
                with tempfile.TemporaryDirectory() as saved:
                    training.save(Path(saved))
                    ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(saved))
            else:
                ray.train.report(metrics)


def trainer_for(
    job: DistillJob, folder: Path, *, workers: int, cpus: float, gpus: float, callbacks: list[Any] | None = None
) -> TorchTrainer:
    """A Ray Train run of ``job`` whose checkpoints lie in ``folder/train``; a stopped one goes on from the last."""
    return TorchTrainer(
        train_fn_per_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(folder.resolve()),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=2),
            callbacks=callbacks or [],
        ),
    )


def distill_on_workers(
    job: DistillJob, folder: Path, *, workers: int, cpus: float, gpus: float, callbacks: list[Any] | None = None
) -> Report:
    """Distil ``job`` on Ray Train workers; the trained student ends in ``folder/student``."""
    result = trainer_for(job, folder, workers=workers, cpus=cpus, gpus=gpus, callbacks=callbacks).fit()
    assert result.checkpoint is not None and result.metrics is not None
    with result.checkpoint.as_directory() as checkpoint:
        shutil.copytree(Path(checkpoint) / "student", folder / "student", dirs_exist_ok=True)
    return Report(**{name: result.metrics[name] for name in Report.__dataclass_fields__})


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = argparse.ArgumentParser(prog="python -m mamtra_ray.distill", description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--layout", required=True, help="one letter per layer, such as AMAM...; or STRATEGY:RATIO")
    parser.add_argument("--address", help="Ray cluster (default: $RAY_ADDRESS, else a new local one)")
    options = parser.parse_intermixed_args(arguments)
    config, folder = config_from_arguments(options)
    num_layers = cached_teacher(config.teacher.kind, config.teacher.path).model.layout.num_layers
    layout = layout_from_argument(options.layout, num_layers)
    if options.dry_run:
        print(f"distil {layout} ({layout.ratio}) with {config.distill.tokens:,} tokens into {folder / 'student'}")
        return 0
    session = start_session(config, folder, ("cache", "align", "distill"), options.address)
    config = session.config
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    total, every = config.distill.tokens, config.distill.checkpoint_tokens
    job = DistillJob(
        layout=str(layout),
        config=config,
        report_at=(*range(every, total, every), total),
        train=train,
        validation=validation,
        library=str(library.resolve()) if library else None,
        seed=config.search.seed,
    )
    with session.screen.phase("distill", f"{layout} on {config.distill.workers} Ray Train workers"):
        report = distill_on_workers(
            job,
            folder,
            workers=config.distill.workers,
            cpus=config.search.cpus_per_worker,
            gpus=config.search.gpus_per_worker or 0,
        )
    print(
        f"held-out CE {report.ce:.4f} (from {report.ce_start:.4f}), KL {report.kl:.4f}; student in {folder / 'student'}"
    )
    return 0


def layout_from_argument(text: str, num_layers: int) -> Layout:
    """``AMAM`` or ``block_beginning:1:3`` as a layout of ``num_layers``.

    Raises:
        InputError: neither form, or another number of layers.
    """
    strategy, separator, ratio = text.partition(":")
    if separator:
        return from_strategy(strategy, num_layers, ratio)
    layout = Layout.from_string(text)
    if layout.num_layers != num_layers:
        raise InputError(f"layout {text} has {layout.num_layers} layers, the teacher {num_layers}")
    return layout


if __name__ == "__main__":
    # Workers must find the classes of this module by its name, not as part of __main__.
    from mamtra_ray.distill import main as imported_main

    sys.exit(imported_main())
