"""The scores that the methods of ``search_quality.py`` ask for, and what one of them costs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from search_methods import Scores

from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints, sample_layouts
from mamtra_ray.probe.layout_scoring import LayoutScorer
from mamtra_ray.probe.phase import probe_data
from mamtra_ray.probe.pool import ProbePool, first_utterances
from mamtra_ray.run.folder import read_run
from mamtra_ray.run.session import Session
from mamtra_ray.teacher_cache.batches import DistillBatch, batches
from mamtra_ray.teacher_cache.shared import SharedCache


def every_layout(num_layers: int) -> list[Layout]:
    """All 2^L layouts."""
    return [
        Layout(format(bits, f"0{num_layers}b").replace("0", "A").replace("1", "M")) for bits in range(2**num_layers)
    ]


def exhaustive_truth(session: Session, library: Path, validation: SharedCache) -> dict[Layout, float]:
    """KL of every layout; scores are kept in the run folder."""
    every = every_layout(session.num_layers)
    with (
        session.screen.phase("truth", f"{len(every)} layouts by forward passes"),
        ProbePool(probe_data(session, library, validation), session.folder, session.worker) as pool,
    ):
        new = [layout for layout in every if layout not in pool.rows]
        for done in pool.score(new, layouts_per_task=64):
            session.screen.count(done, len(new), "layouts")
        return {layout: pool.rows[layout].kl for layout in every}


class ScoredOnDemand:
    """Scores layouts in this process when they are asked for; all scores are kept in a file of the run folder."""

    def __init__(self, scorer: LayoutScorer, held_out: Sequence[DistillBatch], path: Path) -> None:
        self.scorer, self.held_out, self.path = scorer, held_out, path
        lines = path.read_text().splitlines() if path.exists() else []
        self.known = {Layout(row["layout"]): row["kl"] for row in map(json.loads, lines)}

    def __getitem__(self, layout: Layout) -> float:
        if layout not in self.known:
            [row] = self.scorer.score([layout], self.held_out)
            self.known[layout] = row.kl
            with self.path.open("a") as file:
                file.write(json.dumps({"layout": str(layout), "kl": row.kl}) + "\n")
        return self.known[layout]


class TimedScores(Scores):
    """Counts the CPU seconds that scoring took, so that they are not the method's."""

    seconds = 0.0

    def __call__(self, layout: Layout) -> float:
        began = time.process_time()
        try:
            return super().__call__(layout)
        finally:
            self.seconds += time.process_time() - began


def cost_rows(
    scorer: LayoutScorer, held_out: Sequence[DistillBatch], num_layers: int, layouts: int
) -> list[dict[str, Any]]:
    """CPU seconds of one score in this process."""
    rows: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    chosen = sorted(sample_layouts(Constraints.from_ratio(num_layers, "1:1"), layouts, rng))
    for name, tasks, share in (
        ("one by one", [chosen], False),
        ("prefixes shared in tasks of 8", [chosen[i : i + 8] for i in range(0, len(chosen), 8)], True),
        ("prefixes shared by all", [chosen], True),
    ):
        began = time.process_time()
        for task in tasks:
            scorer.score(task, held_out, share_prefixes=share)
        seconds = (time.process_time() - began) / len(chosen)
        rows.append({"scoring": name, "layouts": len(chosen), "CPU s a layout": seconds})
    for row in rows:
        row["of one by one"] = row["CPU s a layout"] / rows[0]["CPU s a layout"]
    return rows


def made_batches(shared: SharedCache, session: Session, tokens: int, tokens_per_batch: int) -> list[DistillBatch]:
    """The first utterances of a split that hold so many tokens."""
    return list(
        batches(
            first_utterances(shared, tokens),
            session.teacher.sequence,
            tokens_per_batch=tokens_per_batch,
            seed=session.config.seed,
            epoch=0,
        )
    )


def known_scores(run: Path, session: Session, library: Path, validation: SharedCache) -> dict[Layout, float]:
    """Probe scores of another run, if they were made with the same mixers and tokens."""
    with ProbePool(probe_data(session, library, validation), session.folder, session.worker) as pool:
        return {row.layout: row.kl for row in read_run(run).probe if row.made_by == pool.made_by}
