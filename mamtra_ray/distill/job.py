"""What a worker needs to distill one layout, what it reports, and what identifies the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mamtra_ray.align.alignment import library_made_by
from mamtra_ray.artifacts import content_hash
from mamtra_ray.config import Config, DistillConfig, StudentConfig
from mamtra_ray.layouts import Layout
from mamtra_ray.teacher_cache.shared import SharedCache
from mamtra_ray.teachers.shared import SharedTeacher

_CHANGE_NO_WEIGHT = {
    *("tokens", "workers", "checkpoint_every_tokens"),
    # These by rounding only, as the number of workers does.
    *("micro_batch_tokens", "activation_checkpointing", "loss_chunk_tokens", "compile", "fully_shard"),
}
"""Keys of :class:`DistillConfig` that identify no student; ``tokens`` is said beside it."""


@dataclass(frozen=True)
class DistillData:
    """What all distillations of a run share; small, since the data stays in the object store."""

    teacher: SharedTeacher
    train: SharedCache
    validation: SharedCache
    library: str | None
    """Folder of the mixer library, for the initialization ``aligned``."""
    library_made_by: Mapping[str, str] | None = None
    """Identity of that library."""


@dataclass(frozen=True)
class DistillJob:
    """One distillation."""

    layout: Layout
    settings: DistillConfig
    student: StudentConfig
    data: DistillData
    report_at: tuple[int, ...]
    """Training tokens after which the student is validated and reported; the last one ends the training."""
    seed: int = 0
    progress: Any = None
    """Handle of an actor that is a :class:`~mamtra_ray.distill.progress.TrainingProgress`, told about every second;
    none: nobody is told."""

    @property
    def made_by(self) -> dict[str, str]:
        """Identifies the training: :func:`student_made_by`, its layout and where its schedule ends."""
        common = student_made_by(self.data, self.student, self.settings, self.seed)
        return common | {"layout": str(self.layout), "total_tokens": str(self.report_at[-1])}


@dataclass(frozen=True)
class Report:
    """The scores at one of ``report_at``; all figures are plain numbers."""

    layout: str
    tokens: int
    step: int
    seconds: float
    """Of training since its first step, over all sessions, validation included."""
    tokens_per_second: float
    data_wait_fraction: float
    """Share of the time spent waiting for data."""
    ce: float
    """Held-out cross-entropy, nats per token."""
    kl: float
    """Held-out KL(teacher || student), nats per token."""
    ce_start: float
    """Held-out cross-entropy before the first step."""
    kl_start: float
    """Held-out KL before the first step."""
    curve: list[dict[str, float]]
    """Training steps since the last report, about 100 of them: step, tokens, the loss terms total, ce, kl and hidden,
    learning_rate, grad_norm."""


def student_made_by(data: DistillData, student: StudentConfig, settings: DistillConfig, seed: int) -> dict[str, str]:
    """Identifies what students depend on beside their layout: only what changes a weight by more than rounding."""
    train, validation = data.train, data.validation
    aligned = student.initialization == "aligned"
    return {
        "teacher": data.teacher.fingerprint,
        "corpus": train.manifest.made_by["corpus"],
        "cache": content_hash(
            [
                *(train.manifest.made_by[name] for name in ("format", "selection")),
                train.speech_tokens,
                validation.speech_tokens,
            ]
        ),
        "start": content_hash([student.model_dump(), data.library_made_by if aligned else None]),
        "settings": content_hash(settings.model_dump(exclude=_CHANGE_NO_WEIGHT)),
        "seed": str(seed),
    }


def distill_data(
    config: Config, teacher: SharedTeacher, train: SharedCache, validation: SharedCache, library: str | None
) -> DistillData:
    """The shared part of all jobs of a run."""
    made_by = None
    if library is not None:
        made_by = library_made_by(config.align, config.student.state_sharing, teacher.fingerprint, train, config.seed)
    return DistillData(teacher, train, validation, library, made_by)
