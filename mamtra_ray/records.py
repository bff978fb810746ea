"""The trials table: one row per layout and rung, written by one actor, so that no layout is paid for twice."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mamtra_ray.run_folder import CURVE_COLUMNS, CURVES, TRIAL_COLUMNS, TRIALS, read_rows, write_rows


class TrialRecords:
    """Keeps rows in memory and on disk; every added row is on disk before ``add`` returns.

    Runs as a Ray actor beside the driver, so that trials on other nodes need no shared disk for their results.

    Args:
        folder: run folder; holds ``trials.parquet`` and ``curves.parquet``.
        settings_hash: identifies teacher, corpus, initialisation and training; rows of another hash are kept in the
            table but not reused.
        origins: where a layout comes from, by layout; all others are Optuna's.
        costs: columns to add, by number of attention layers.
    """

    def __init__(
        self, folder: Path, settings_hash: str, origins: dict[str, str], costs: dict[int, dict[str, float]]
    ) -> None:
        self.folder, self.settings_hash, self.origins, self.costs = folder, settings_hash, origins, costs
        self.rows = read_rows(folder / TRIALS, TRIAL_COLUMNS)
        self.curves = read_rows(folder / CURVES, CURVE_COLUMNS)
        self.tokens: dict[str, int] = {}

    def note_tokens(self, layout: str, tokens: int) -> None:
        """A training tells how far it is."""
        self.tokens[layout] = tokens

    def tokens_of(self, layout: str) -> int:
        """What the training of ``layout`` told last."""
        return self.tokens.get(layout, 0)

    def rows_of(self, layout: str) -> list[dict[str, Any]]:
        """What is known about ``layout`` under the present settings, by rung; stops at the first gap."""
        rows = {
            row["rung"]: row
            for row in self.rows
            if row["layout"] == layout and row["settings_hash"] == self.settings_hash
        }
        return [rows[rung] for rung in range(len(rows)) if rung in rows]

    def is_finished(self, layout: str) -> bool:
        """Whether successive halving is done with ``layout``, so that nothing is left to pay for."""
        return any(row["status"] == "finished" for row in self.rows_of(layout))

    def finish(self, layout: str) -> None:
        """Mark the rows of ``layout`` as final: its trial has ended, by its own end or by successive halving."""
        for row in self.rows_of(layout):
            row["status"] = "finished"
        write_rows(self.folder / TRIALS, self.rows, TRIAL_COLUMNS)

    def all_rows(self) -> list[dict[str, Any]]:
        """Every row under the present settings."""
        return [row for row in self.rows if row["settings_hash"] == self.settings_hash]

    def add(self, row: dict[str, Any], curve: Iterable[dict[str, float]]) -> None:
        """Append ``row`` and its training curve, and write both tables."""
        layout = row["layout"]
        self.tokens[layout] = row["tokens"]
        self.rows.append(
            {
                **row,
                "origin": self.origins.get(layout, "optuna"),
                **self.costs[layout.count("A")],
                "status": "running",
                "settings_hash": self.settings_hash,
            }
        )
        self.add_curve(row["trial_id"], layout, row["rung"], curve)
        write_rows(self.folder / TRIALS, self.rows, TRIAL_COLUMNS)

    def add_curve(self, trial_id: str, layout: str, rung: int, curve: Iterable[dict[str, float]]) -> None:
        """Append a part of a training curve and write the table."""
        self.curves += [{"trial_id": trial_id, "layout": layout, "rung": rung, **step} for step in curve]
        write_rows(self.folder / CURVES, self.curves, CURVE_COLUMNS)

    def curve_of(self, trial_id: str, layout: str) -> list[dict[str, Any]]:
        """All of a training's curve, also what an earlier session recorded."""
        return [point for point in self.curves if (point["trial_id"], point["layout"]) == (trial_id, layout)]
