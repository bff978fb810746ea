"""Score hundreds of layouts by forward passes, and find the best of every ratio.

Half of the scores go to ratios and placements drawn uniformly and to the paper's placements; a surrogate with linear
and pairwise terms is fitted; the rest goes, round by round, to the layouts that it holds for best, until the best one
is scored and hardly any unscored one can be better. The last eighth confirms: it goes to the predicted optima alone, a
few at a time. Every score is in ``probe.parquet`` before the next round begins, and is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mamtra_ray.config import ProbeConfig
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace
from mamtra_ray.layouts.constraints import Constraints, sample_layouts
from mamtra_ray.probe.pool import ProbeData, ProbePool
from mamtra_ray.run.rows import ProbeRow
from mamtra_ray.runtime.progress import table
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.surrogate.acquisition import (
    CONFIDENT,
    best_unscored,
    confidence,
    fit_log,
    next_layouts,
    ranked_layouts,
)

# Part of the scores that does not depend on the surrogate, and of the rest that a round takes.
_FIRST_SHARE, _ROUND_SHARE = 0.5, 0.25
# The last part of all, that confirms optima, and how many of a ratio are scored before the next fit.
_LAST_SHARE, _CONFIRMED_AT_ONCE = 0.125, 2
_FEWEST_TO_FIT = 3

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
    by_ratio = ratio_constraints(space)
    rng = np.random.default_rng(seed)
    with ProbePool(data, folder, worker) as pool:
        total = config.num_layouts
        before_last, confirms = total - int(total * _LAST_SHARE), False
        wanted = first_layouts(list(by_ratio.values()), given, round(total * _FIRST_SHARE), rng)
        while True:
            new = [layout for layout in wanted if layout not in pool.rows]
            base = _inside(by_ratio, pool.rows)
            for done in pool.score(new[: max((total if confirms else before_last) - base, 0)]):
                on_progress(min(base + done, total), total)
            spent = _inside(by_ratio, pool.rows)
            if spent >= total or len(pool.rows) < _FEWEST_TO_FIT:
                break
            # Equal scores must lead to equal proposals, so that a resumed run does what an uninterrupted one does.
            rng = np.random.default_rng([seed, len(pool.rows)])
            scores = {layout: row.kl for layout, row in sorted(pool.rows.items())}
            surrogate = fit_log(scores)
            unsettled = [c for c in by_ratio.values() if confidence(surrogate, scores, c, rng) < CONFIDENT]
            confirms = spent >= before_last
            share = round(total * (1 - _FIRST_SHARE) * _ROUND_SHARE / max(len(unsettled), 1))
            wanted = [
                layout
                for constraints in unsettled
                for layout in (
                    best_unscored(surrogate, scores, constraints, _CONFIRMED_AT_ONCE)
                    if confirms
                    else next_layouts(surrogate, scores, constraints, max(share, 2), rng)
                )
            ]
            if not wanted:
                break
        return list(pool.rows.values())


def _inside(by_ratio: Mapping[str, Constraints], layouts: Iterable[Layout]) -> int:
    """How many of ``layouts`` belong to one of the ratios: those of an earlier search's ratios are no part of the
    scores that this one may spend."""
    return sum(any(constraints.allows(layout) for constraints in by_ratio.values()) for layout in layouts)


def propose(space: SearchSpace, rows: Sequence[ProbeRow], ratio: str, count: int) -> list[Layout]:
    """The ``count`` best layouts of a ratio: scored ones by their KL, others by the surrogate, best first.

    Raises:
        InputError: no rows, or constraints that leave no layout of this ratio.
    """
    if not rows:
        raise InputError("no layout was scored, so none can be proposed: raise probe.num_layouts")
    constraints = ratio_constraints(space)[ratio]
    scores = {row.layout: row.kl for row in rows}
    if len(scores) < _FEWEST_TO_FIT:
        return sorted((layout for layout in scores if constraints.allows(layout)), key=scores.__getitem__)[:count]
    return [layout for layout, _, _ in ranked_layouts(fit_log(scores), scores, constraints, count)]


def ratio_constraints(space: SearchSpace) -> dict[str, Constraints]:
    """ratio -> the layouts that the search may use at it."""
    return {
        ratio: Constraints.from_ratio(space.num_layers, ratio, space.keep_attention, space.always_mamba)
        for ratio in space.ratios
    }


def first_layouts(
    ratios: Sequence[Constraints], paper_placements: Sequence[Layout], count: int, rng: np.random.Generator
) -> list[Layout]:
    """The paper's layouts, then ratios drawn uniformly and placements drawn uniformly inside them."""
    chosen = list(dict.fromkeys(paper_placements))
    share = np.bincount(rng.integers(len(ratios), size=max(count - len(chosen), 0)), minlength=len(ratios))
    for constraints, number in zip(ratios, share, strict=True):
        chosen += sample_layouts(constraints, int(number), rng, exclude=chosen)
    return chosen


def outcome_table(space: SearchSpace, rows: Sequence[ProbeRow], seed: int = 0) -> str:
    """The best scored layout of every ratio, whether anything else may be better, and how well the surrogate
    predicts left-out scores there; empty with too few scores for a surrogate."""
    if len(rows) < _FEWEST_TO_FIT:
        return ""
    scores = {row.layout: row.kl for row in sorted(rows, key=lambda row: row.layout)}
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
