"""The training curves of the verb ``distill`` in its run folder, where TensorBoard shows them while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray.train

from mamtra_ray.distill.job import Report
from mamtra_ray.layouts import Layout
from mamtra_ray.run.rows import CurvePoint
from mamtra_ray.run.tensorboard import distilled_folder, log_report

CURVE_ID = "distill"


class TensorBoardCurves(ray.train.UserCallback):
    """Every report is logged before the training goes on; runs where Ray Train's controller does.

    A training that goes on from its checkpoint reports that once more: TensorBoard then has the same points twice.

    Args:
        run_folder: of the run; absolute.
        layout: what is trained.
    """

    def __init__(self, run_folder: Path, layout: Layout) -> None:
        self.folder, self.layout = distilled_folder(run_folder, layout), layout

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Log the first worker's report; all workers have the same scores."""
        report = Report(**{name: metrics[0][name] for name in Report.__dataclass_fields__})
        points = [CurvePoint(layout=self.layout, trial_id=CURVE_ID, rung=0, **step) for step in report.curve]  # type: ignore[arg-type]
        log_report(self.folder, points, report)
