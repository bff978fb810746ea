"""The student of ``python -m mamtra_ray.distill`` in a run folder: found, named, its scores kept like a finalist's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mamtra_ray.artifacts import read_json
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.run.names import DISTILLED_ROW, distilled_student
from mamtra_ray.run.rows import FinalistRow, read_table, write_table

ORIGIN = "distill"
BESIDE_A_FINALIST = "distilled "
"""Before its layout in the name that an evaluation gives it, where a finalist has the same layout."""


def saved_layout(folder: Path) -> Layout:
    """The layout of a saved SpeechLM.

    Raises:
        InputError: the folder holds none.
    """
    content = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    model = content.get("model") if isinstance(content, dict) and content.get("kind") == "speech_lm" else None
    layout = model.get("layout") if isinstance(model, dict) else None
    if not isinstance(layout, str):
        raise InputError(f"{folder} holds no saved student (config.json of one is expected)")
    return Layout.from_string(layout)


def distilled_layout(run_folder: Path) -> Layout | None:
    """The layout of the run's distilled student; None where there is none."""
    student = distilled_student(run_folder)
    return saved_layout(student) if (student / "config.json").is_file() else None


def distilled_system(run_folder: Path) -> str | None:
    """What an evaluation calls it: its layout, unless a finalist has the same."""
    layout = distilled_layout(run_folder)
    if layout is None:
        return None
    is_finalist = (run_folder / "finalists" / str(layout) / "student").is_dir()
    return f"{BESIDE_A_FINALIST}{layout}" if is_finalist else str(layout)


def read_distilled(run_folder: Path) -> FinalistRow | None:
    """Its row; None where there is no student, or none with scores (an earlier version's)."""
    rows = read_table(run_folder / DISTILLED_ROW, FinalistRow)
    return rows[0] if rows and rows[0].layout == distilled_layout(run_folder) else None


def write_distilled(run_folder: Path, row: FinalistRow) -> None:
    """Replace its row."""
    write_table(run_folder / DISTILLED_ROW, [row], FinalistRow)


def distilled_row(layout: Layout, report: Any, costs: Mapping[str, Any]) -> FinalistRow:
    """The row of a student that was not heard yet, from its training's report."""
    names = ("tokens", "seconds", "ce", "kl", "ce_start", "kl_start")
    scores: dict[str, Any] = {name: getattr(report, name) for name in names}
    return FinalistRow(layout=layout, origin=ORIGIN, steps=report.step, **scores, **costs)
