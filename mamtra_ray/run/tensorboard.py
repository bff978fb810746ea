"""Trainings as TensorBoard shows them: a run for every trial, finalist and student of `distill`, by training tokens.

Every report adds a file of its own: TensorBoard shows it while the training goes on, and a training that was stopped
leaves its files as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tensorboardX import SummaryWriter

from mamtra_ray.artifacts import disk_full_is_said
from mamtra_ray.layouts import Layout
from mamtra_ray.run.rows import CurvePoint, Trained

FOLDER = "tensorboard"
_STEPS = {
    "total": "loss/total",
    "ce": "loss/ce",
    "kl": "loss/kl",
    "hidden": "loss/hidden",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/gradient_norm",
}
_SCALARS_AT_ONCE = 20_000
"""More than one report has. The writer's thread ends where the disk is full, and would be waited for forever."""


class Scored(Trained, Protocol):
    """A report of a training: a row of the trials table is one too."""

    @property
    def tokens(self) -> int: ...
    @property
    def tokens_per_second(self) -> float: ...


def trial_folder(run_folder: Path, layout: Layout) -> Path:
    """Of a trial's events."""
    return run_folder / FOLDER / "trials" / str(layout)


def finalist_folder(run_folder: Path, layout: Layout) -> Path:
    """Of a finalist's events."""
    return run_folder / FOLDER / "finalists" / str(layout)


def distilled_folder(run_folder: Path, layout: Layout) -> Path:
    """Of the events of the student of ``python -m mamtra_ray.distill``."""
    return run_folder / FOLDER / "distilled" / str(layout)


def log_report(folder: Path, curve: Sequence[CurvePoint], report: Scored, **spoken: float | None) -> None:
    """Add a report: training batches' losses, learning rate and gradient norm, then the held-out scores.

    Args:
        folder: of the training's events.
        curve: its steps since the last report.
        report: held-out scores, and tokens per second of this session.
        spoken: scores of speech by name; None: not heard.

    Raises:
        DiskFullError: there is no space left.
    """
    writer = SummaryWriter(str(folder), max_queue=_SCALARS_AT_ONCE, filename_suffix=f".{report.tokens}")
    with disk_full_is_said(folder), writer:
        if curve and curve[0].step == 1:
            writer.add_scalar("held_out/ce", report.ce_start, 0)
            writer.add_scalar("held_out/kl", report.kl_start, 0)
        for point in curve:
            for field, name in _STEPS.items():
                value = getattr(point, field)
                if value is not None and not math.isnan(value):  # a term that is switched off
                    writer.add_scalar(name, value, point.tokens)
        writer.add_scalar("held_out/ce", report.ce, report.tokens)
        writer.add_scalar("held_out/kl", report.kl, report.tokens)
        writer.add_scalar("speed/tokens_per_second", report.tokens_per_second, report.tokens)
        for name, score in spoken.items():
            if score is not None:
                writer.add_scalar(f"speech/{name}", score, report.tokens)
