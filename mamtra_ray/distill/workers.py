"""Training one layout with Eq. 5 from the teacher cache: in one process (a Tune trial) or on Ray Train workers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from torch import Tensor

from mamtra_ray.align.mixer_library import load_library
from mamtra_ray.distill.curve import StepTerms, read_curve
from mamtra_ray.distill.job import DistillJob, Report
from mamtra_ray.distill.training import VALIDATION_PARTS, Distillation, Stopwatch
from mamtra_ray.errors import DivergedError
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.runtime.sharding import is_sharded
from mamtra_ray.runtime.train_run import fit
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teacher_cache.batches import batches


@functools.lru_cache(maxsize=1)
def _library_of_this_process(folder: str, teacher_fingerprint: str) -> dict[int, dict[str, Tensor]]:
    return load_library(Path(folder), teacher_fingerprint=teacher_fingerprint)


def initial_student(job: DistillJob, share_weights: bool = False) -> SpeechLM:
    """The student of ``job`` before training, initialized as its configuration says.

    ``share_weights``: with the teacher's own tensors, which training would change.
    """
    teacher, library = job.data.teacher.load(), None
    if job.student.initialization == "aligned" and job.data.library:
        library = _library_of_this_process(job.data.library, teacher.fingerprint)
    return make_student(
        teacher.model,
        job.layout,
        initialization=job.student.initialization,
        mixer_library=library,
        state_sharing=job.student.state_sharing,
        seed=job.seed,
        share_weights=share_weights,
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
        start: folder of a saved :class:`Distillation` of the same job to go on from. The report that was saved with it
            comes first, since a kill may have come between the saving and the noting of it.

    Raises:
        DivergedError: a gradient or a held-out score that is not finite.

    Yields:
        every process yields at the same steps; the held-out scores are computed by each process itself.
    """

    def tell(doing: str = "", tokens: int = 0) -> None:
        if rank == 0 and job.progress is not None:
            job.progress.note_progress.remote(str(job.layout), tokens, doing)

    def say(sentence: str) -> None:
        logging.getLogger(__name__).warning("%s: %s", job.layout, sentence)
        if rank == 0 and job.progress is not None:
            job.progress.say.remote(f"{job.layout}: {sentence}")

    tell("loading the teacher and its student")
    sequence, size = job.data.teacher.load().sequence, job.settings.tokens_per_batch
    # Cutting a student copies it.
    student = initial_student(job, share_weights=is_sharded(job.settings.fully_shard, world_size))
    training = Distillation(student, job.settings, job.report_at[-1], device, world_size, made_by=job.made_by, say=say)
    held_out = functools.partial(
        batches,
        job.data.validation,
        sequence,
        tokens_per_batch=VALIDATION_PARTS * size,
        seed=0,
        epoch=0,
        device=device,
    )
    # The initial student is cheap to score and shows that training trains.
    tell("measuring held-out scores before the first step")
    before = training.validate(held_out)
    if start is not None:
        training.load(start)
        if training.report is not None:
            yield Report(**training.report), training
    stopwatch, seconds_before = Stopwatch(), training.seconds
    first_tokens = training.position.tokens
    tell(tokens=first_tokens)
    curve: list[StepTerms] = []
    for target in job.report_at:
        if target <= first_tokens:
            continue
        while training.position.tokens < target:
            epoch_batches = batches(
                job.data.train,
                sequence,
                tokens_per_batch=size,
                seed=job.seed,
                epoch=training.position.epoch,
                rank=rank,
                world_size=world_size,
                skip_batches=training.position.batch,
                device=device,
            )
            for batch in stopwatch.watch(epoch_batches):
                curve.append(training.step(batch))
                if stopwatch.a_second_passed():
                    tell(tokens=training.position.tokens)
                if training.position.tokens >= target:
                    break
            else:
                training.next_epoch()
        tell("measuring held-out scores", training.position.tokens)
        scores = training.validate(held_out)
        if not (math.isfinite(scores.ce) and math.isfinite(scores.kl)):
            raise DivergedError(
                f"the held-out CE of {job.layout} is {scores.ce} and its KL {scores.kl} after "
                f"{training.position.tokens:,} tokens: lower distill.learning_rate, or use distill.precision=float32"
            )
        seconds = stopwatch.seconds
        training.seconds = seconds_before + seconds
        report = Report(
            layout=str(job.layout),
            tokens=training.position.tokens,
            step=training.position.step,
            seconds=training.seconds,
            tokens_per_second=(training.position.tokens - first_tokens) / seconds,
            data_wait_fraction=stopwatch.waited / seconds,
            ce=scores.ce,
            kl=scores.kl,
            ce_start=before.ce,
            kl_start=before.kl,
            curve=read_curve(curve),
        )
        curve, training.report = [], dataclasses.asdict(report)
        tell("saving", training.position.tokens)
        yield report, training
        tell(tokens=training.position.tokens)


def train_fn_per_worker(train_loop_config: dict[str, DistillJob]) -> None:
    """Ray Train's worker function: distill, report and save a checkpoint at each of the job's ``report_at``."""
    job = train_loop_config["job"]
    context = ray.train.get_context()
    start = ray.train.get_checkpoint()
    device = ray.train.torch.get_device()
    with start.as_directory() if start else contextlib.nullcontext() as folder:
        for report, training in distill(
            job, device, context.get_world_rank(), context.get_world_size(), Path(folder) if folder else None
        ):
            metrics = vars(report)
            if training.is_sharded or context.get_world_rank() == 0:
                with tempfile.TemporaryDirectory() as saved:
                    training.save(Path(saved))
                    ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(saved))
            else:
                ray.train.report(metrics)


def trainer_for(
    job: DistillJob, folder: Path, *, workers: int, worker: WorkerResources, callbacks: list[Any] | None = None
) -> TorchTrainer:
    """A Ray Train run of ``job`` whose checkpoints lie in ``folder/train``; a stopped one goes on from the last."""
    return TorchTrainer(
        train_fn_per_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=worker.gpus > 0, resources_per_worker=worker.bundle()
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(folder.resolve()),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=callbacks or [],
        ),
    )


def distill_on_workers(
    job: DistillJob, folder: Path, *, workers: int, worker: WorkerResources, callbacks: list[Any] | None = None
) -> Report:
    """Distill ``job`` on Ray Train workers; the trained student ends in ``folder/student``."""
    new_trainer = functools.partial(trainer_for, job, folder, workers=workers, worker=worker, callbacks=callbacks)
    result = fit(new_trainer, folder)
    assert result.checkpoint is not None and result.metrics is not None
    with result.checkpoint.as_directory() as checkpoint:
        shutil.copytree(Path(checkpoint) / "student", folder / "student", dirs_exist_ok=True)
    return Report(**{name: result.metrics[name] for name in Report.__dataclass_fields__})


def checkpoints_at(total: int, every: int) -> tuple[int, ...]:
    """``report_at`` of a training of ``total`` tokens with a checkpoint every so many."""
    return (*range(every, total, every), total)
