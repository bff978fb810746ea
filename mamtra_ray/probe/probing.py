"""Score hundreds of layouts by forward passes, and find the best of every ratio.

Every score is in ``probe.parquet`` before the next round begins, and is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mamtra_ray.config import ProbeConfig
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace
from mamtra_ray.probe.pool import ProbeData, ProbePool
from mamtra_ray.probe.rounds import FEWEST_TO_FIT, num_spent, ratio_constraints, rounds, without_singles
from mamtra_ray.run.rows import ProbeRow
from mamtra_ray.runtime.progress import table
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.surrogate.acquisition import confidence, fit_log, ranked_layouts

Progress = Callable[[int, int], None]
"""Called with (done, total) layouts."""


def probe_layouts(
    config: ProbeConfig,
    space: SearchSpace,
    given: Sequence[Layout],
    folder: Path,
    data: ProbeData,
    worker: WorkerResources,
    *,
    seed: int = 0,
    on_progress: Progress = lambda done, total: None,
) -> list[ProbeRow]:
    """Spend ``config.num_layouts`` scores on the ratios of ``space``; Ray must be initialized.

    Ends earlier if every ratio's best layout is settled. Scores of an earlier session with the same teacher, library
    and tokens count.

    Args:
        config: how many layouts.
        space: the layouts that may be scored.
        given: what is scored in any case: the user's own layouts and the paper's placements.
        folder: run folder; ``probe.parquet`` is written there after every few layouts.
        data: what is scored with.
        worker: what an actor asks Ray for.
        seed: of the layouts drawn at random.
        on_progress: called with (done, total); it ends below the total where every ratio is settled earlier.

    Raises:
        InputError: a library of another teacher, or ratios that the constraints do not leave.
    """
    total = config.num_layouts
    with ProbePool(data, folder, worker) as pool:
        scores = {layout: row.kl for layout, row in pool.rows.items()}
        for wanted in rounds(space, given, total, seed, scores):
            before = num_spent(space, total, scores)
            for done in pool.score(wanted):
                on_progress(min(before + done, total), total)
            scores |= {layout: row.kl for layout, row in pool.rows.items()}
        return list(pool.rows.values())


def propose(space: SearchSpace, rows: Sequence[ProbeRow], ratio: str, count: int) -> list[Layout]:
    """The ``count`` best layouts of a ratio: scored ones by their KL, others by the surrogate, best first.

    Raises:
        InputError: no rows, or constraints that leave no layout of this ratio.
    """
    if not rows:
        raise InputError("no layout was scored, so none can be proposed: raise probe.num_layouts")
    constraints = ratio_constraints(space)[ratio]
    scores = without_singles(space, {row.layout: row.kl for row in rows})
    if len(scores) < FEWEST_TO_FIT:
        return sorted((layout for layout in scores if constraints.allows(layout)), key=scores.__getitem__)[:count]
    return [layout for layout, _, _ in ranked_layouts(fit_log(scores), scores, constraints, count)]


def outcome_table(space: SearchSpace, rows: Sequence[ProbeRow], seed: int = 0) -> str:
    """The best scored layout of every ratio, whether anything else may be better, and how well the surrogate
    predicts left-out scores there; empty with too few scores for a surrogate."""
    scores = without_singles(space, {row.layout: row.kl for row in sorted(rows, key=lambda row: row.layout)})
    if len(scores) < FEWEST_TO_FIT:
        return ""
    surrogate = fit_log(scores)
    fits = surrogate.held_out_fit()
    cells: list[list[object]] = []
    for ratio, constraints in ratio_constraints(space).items():
        known = {layout: kl for layout, kl in scores.items() if constraints.allows(layout)}
        if not known:
            cells.append([ratio, 0, "", "", "", "", "", ""])
            continue
        best = min(known, key=known.__getitem__)
        settled = confidence(surrogate, scores, constraints, np.random.default_rng(seed))
        fit = fits[constraints.attention_counts[0]]
        spearman = "" if fit.spearman is None else f"{fit.spearman:.2f}"
        accuracy = [spearman, f"{fit.rmse:.3f}", f"{fit.coverage:.0%}"]
        cells.append([ratio, len(known), best, f"{known[best]:.4f}", f"{settled:.0%}", *accuracy])
    header = ["ratio", "scored", "best", "KL", "nothing 2 % better", "held-out Spearman", "RMSE of log KL"]
    return table([*header, "in 90 % interval"], cells)
