"""The trials table: one row per layout and rung, written by one actor, so that no layout is trained twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mamtra_ray.artifacts import write_text
from mamtra_ray.distill.job import Report
from mamtra_ray.distill.progress import TrainingProgress
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.run.journal import CURVE_KEY, TRIAL_KEY, Journal
from mamtra_ray.run.names import CURVES, TRIAL_FAILURES, TRIALS
from mamtra_ray.run.rows import FINALIST_CURVE, FINISHED, CurvePoint, TrialRow
from mamtra_ray.run.tensorboard import finalist_folder, log_report, trial_folder


@dataclass(frozen=True)
class TrialFailure:
    """Why a trial ended without all of its scores."""

    reason: str
    """One line."""
    is_disk_full: bool = False
    """Then no other trial can succeed either."""
    traceback: Path | None = None
    """Where it can be read."""

    def __str__(self) -> str:
        return self.reason + (f" (traceback: {self.traceback})" if self.traceback else "")


class TrialTable(TrainingProgress):
    """Keeps rows in memory and on disk; every added row is on disk before ``add`` returns.

    Runs as a Ray actor beside the driver, so that trials on other nodes need no shared disk for their results. There is
    one in a search, and everybody who writes is given its handle. Where its process dies Ray starts it again, from what
    is on disk, and repeats the call.

    Args:
        folder: run folder; holds ``trials.parquet``, ``curves.parquet`` and ``tensorboard/``.
        settings_hash: identifies teacher, corpus, initialization and training; rows of another hash are kept in the
            table but not reused.
    """

    def __init__(self, folder: Path, settings_hash: str) -> None:
        super().__init__()
        self.folder, self.settings_hash = folder, settings_hash
        self.trials = Journal(folder / TRIALS, TrialRow, TRIAL_KEY)
        self.curves = Journal(folder / CURVES, CurvePoint, CURVE_KEY)
        self.failures_folder = folder / TRIAL_FAILURES
        self.failures: dict[Layout, TrialFailure] = {}

    def note_failure(self, layout: Layout, failure: TrialFailure, traceback: str) -> None:
        """A trial says why it has no further score; its traceback is kept in a file, if there is space for one."""
        with contextlib.suppress(InputError):
            path = self.failures_folder / f"{layout}.txt"
            write_text(path, traceback)
            failure = replace(failure, traceback=path)
        self.failures[layout] = failure
        self.end_progress(str(layout))

    def failure_of(self, layout: Layout) -> TrialFailure | None:
        """Why the trial of ``layout`` failed in this session."""
        return self.failures.get(layout)

    def rows_of(self, layout: Layout) -> list[TrialRow]:
        """What is known about ``layout`` under the present settings, by rung; stops at the first gap."""
        rows = {row.rung: row for row in self.all_rows() if row.layout == layout}
        known: list[TrialRow] = []
        while len(known) in rows:
            known.append(rows[len(known)])
        return known

    def is_finished(self, layout: Layout) -> bool:
        """Whether successive halving is done with ``layout``, so that nothing is left to compute."""
        return any(row.status == FINISHED for row in self.rows_of(layout))

    def finish(self, layout: Layout) -> None:
        """Mark the rows of ``layout`` as final: its trial has ended, by its own end or by successive halving."""
        self.trials.append(replace(row, status=FINISHED) for row in self.rows_of(layout) if row.status != FINISHED)
        self.end_progress(str(layout))
        # Readers of the Parquet file see how far the search is. (The curves are large and are written at the end.)
        self.trials.compact()

    def all_rows(self) -> list[TrialRow]:
        """Every row under the present settings."""
        return [row for row in self.trials.rows if row.settings_hash == self.settings_hash]

    def add(self, row: TrialRow, curve: Iterable[Mapping[str, float]]) -> None:
        """Append ``row`` and its training curve."""
        # The curve first: a row says that its rung is complete.
        points = self._add_curve(row.trial_id, row.layout, row.rung, curve)
        spoken = {"wer": row.wer.value if row.wer else None, "token_error_rate": row.token_error_rate}
        log_report(trial_folder(self.folder, row.layout), points, row, **spoken)
        self.trials.append([replace(row, settings_hash=self.settings_hash)])

    def add_finalist_report(self, layout: Layout, rung: int, report: Report) -> None:
        """Append a part of a finalist's training curve."""
        points = self._add_curve(FINALIST_CURVE, layout, rung, report.curve)
        log_report(finalist_folder(self.folder, layout), points, report)

    def _add_curve(
        self, trial_id: str, layout: Layout, rung: int, curve: Iterable[Mapping[str, float]]
    ) -> list[CurvePoint]:
        points = [CurvePoint(trial_id=trial_id, layout=layout, rung=rung, **step) for step in curve]  # type: ignore[arg-type]
        self.curves.append(points)
        return points

    def curve_of(self, trial_id: str, layout: Layout) -> list[CurvePoint]:
        """All of a training's curve, also what an earlier session recorded."""
        return [point for point in self.curves.rows if (point.trial_id, point.layout) == (trial_id, layout)]

    def compact(self) -> None:
        """Write both Parquet files: at the end of a phase."""
        self.trials.compact()
        self.curves.compact()
