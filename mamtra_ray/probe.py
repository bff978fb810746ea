"""Verb ``probe``: score hundreds of layouts by forward passes, and find the best of every budget.

Half of the scores go to budgets and placements drawn uniformly and to the paper's placements; a surrogate with linear
and pairwise terms is fitted; the rest goes, round by round, to the layouts that it holds for best, until the best one
is scored and hardly any unscored one can be better. The last eighth confirms: it goes to the predicted optima alone, a
few at a time. Every score is in ``probe.parquet`` before the next round begins, and is not paid for again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mamtra_ray.acquisition import CONFIDENT, best_unscored, confidence, fit_log, next_layouts, ranked_layouts
from mamtra_ray.candidates import paper_candidates
from mamtra_ray.config import Config, add_common_arguments, config_from_arguments
from mamtra_ray.constraints import Constraints, sample_layouts
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.layouts import Layout
from mamtra_ray.mask_scoring import ProbeRow
from mamtra_ray.probe_pool import ProbePool
from mamtra_ray.progress import table
from mamtra_ray.run_folder import PROBE
from mamtra_ray.shared_cache import SharedCache
from mamtra_ray.teachers.base import Teacher

# Part of the scores that does not depend on the surrogate, and of the rest that a round takes.
_FIRST_SHARE, _ROUND_SHARE = 0.5, 0.25
# The last part of all, that confirms optima, and how many of a budget are scored before the next fit.
_LAST_SHARE, _CONFIRMED_AT_ONCE = 0.125, 2
_FEWEST_TO_FIT = 3

Progress = Callable[[int, int], None]
"""Called with (done, total) layouts."""


def probe_masks(
    config: Config,
    folder: Path,
    *,
    teacher: Teacher,
    library: Path,
    validation: SharedCache,
    on_progress: Progress | None = None,
) -> list[ProbeRow]:
    """Spend ``config.probe.masks`` scores on the budgets of ``config.search.ratios``; Ray must be initialised.

    Ends earlier if every budget's best layout is settled. Scores of an earlier session with the same teacher, library
    and tokens count.

    Args:
        config: sections probe, search (budgets, constraints, CPUs and GPUs of an actor, seed) and student.
        folder: run folder; ``probe.parquet`` is written there after every few layouts.
        teacher: of the library and the validation cache.
        library: folder of :func:`~mamtra_ray.align.align_mixers`.
        validation: held-out tokens; the first ``config.probe.validation_tokens`` are used.
        on_progress: called with (done, total).

    Raises:
        InputError: a library of another teacher, or budgets that the constraints do not leave.
    """
    num_layers = teacher.model.config.num_layers
    budgets = budget_constraints(config, num_layers)
    report = on_progress or (lambda _done, _total: None)
    rng = np.random.default_rng(config.search.seed)
    papers = [candidate.layout for candidate in paper_candidates(config.search, num_layers)]
    with ProbePool(config, folder, teacher, library, validation) as pool:
        total = config.probe.masks
        before_last, confirms = total - int(total * _LAST_SHARE), False
        wanted = first_layouts(list(budgets.values()), papers, round(total * _FIRST_SHARE), rng)
        while True:
            new = [layout for layout in wanted if layout not in pool.rows]
            base = _inside(budgets, pool.rows)
            for done in pool.score(new[: max((total if confirms else before_last) - base, 0)]):
                report(min(base + done, total), total)
            spent = _inside(budgets, pool.rows)
            if spent >= total or len(pool.rows) < _FEWEST_TO_FIT:
                break
            # Equal scores must lead to equal proposals, so that a resumed run does what an uninterrupted one does.
            rng = np.random.default_rng([config.search.seed, len(pool.rows)])
            scores = {layout: row.kl for layout, row in sorted(pool.rows.items())}
            surrogate = fit_log(scores)
            open_budgets = [c for c in budgets.values() if confidence(surrogate, scores, c, rng) < CONFIDENT]
            confirms = spent >= before_last
            share = round(total * (1 - _FIRST_SHARE) * _ROUND_SHARE / max(len(open_budgets), 1))
            wanted = [
                layout
                for constraints in open_budgets
                for layout in (
                    best_unscored(surrogate, scores, constraints, _CONFIRMED_AT_ONCE)
                    if confirms
                    else next_layouts(surrogate, scores, constraints, max(share, 2), rng)
                )
            ]
            if not wanted:
                break
        report(total, total)
        return list(pool.rows.values())


def _inside(budgets: Mapping[str, Constraints], layouts: Iterable[Layout]) -> int:
    """How many of ``layouts`` belong to one of the budgets: those of an earlier search's budgets are no part of the
    scores that this one may spend."""
    return sum(any(constraints.allows(layout) for constraints in budgets.values()) for layout in layouts)


def propose(config: Config, rows: Sequence[ProbeRow], ratio: str, count: int) -> list[Layout]:
    """The ``count`` best layouts of a budget: scored ones by their KL, others by the surrogate, best first.

    Raises:
        InputError: no rows, or constraints that leave no layout of this budget.
    """
    if not rows:
        raise InputError("no layout was scored, so none can be proposed: raise probe.masks")
    search = config.search
    constraints = Constraints.from_ratio(rows[0].layout.num_layers, ratio, search.keep_attention, search.always_mamba)
    scores = {row.layout: row.kl for row in rows}
    if len(scores) < _FEWEST_TO_FIT:
        return sorted((layout for layout in scores if constraints.allows(layout)), key=scores.__getitem__)[:count]
    return [layout for layout, _, _ in ranked_layouts(fit_log(scores), scores, constraints, count)]


def budget_constraints(config: Config, num_layers: int) -> dict[str, Constraints]:
    """ratio -> the layouts that the search may use at it."""
    search = config.search
    return {
        ratio: Constraints.from_ratio(num_layers, ratio, search.keep_attention, search.always_mamba)
        for ratio in search.ratios
    }


def first_layouts(
    budgets: Sequence[Constraints], papers: Sequence[Layout], count: int, rng: np.random.Generator
) -> list[Layout]:
    """The paper's layouts, then budgets drawn uniformly and placements drawn uniformly inside them."""
    chosen = list(dict.fromkeys(papers))
    share = np.bincount(rng.integers(len(budgets), size=max(count - len(chosen), 0)), minlength=len(budgets))
    for constraints, number in zip(budgets, share, strict=True):
        chosen += sample_layouts(constraints, int(number), rng, exclude=chosen)
    return chosen


def outcome_table(config: Config, rows: Sequence[ProbeRow]) -> str:
    """The best scored layout of every budget, whether anything else may be better, and how well the surrogate
    predicts left-out scores there; empty with too few scores for a surrogate."""
    if len(rows) < _FEWEST_TO_FIT:
        return ""
    scores = {row.layout: row.kl for row in sorted(rows, key=lambda row: row.layout)}
    surrogate = fit_log(scores)
    fits = surrogate.held_out_fit()
    cells: list[list[object]] = []
    for ratio, constraints in budget_constraints(config, rows[0].layout.num_layers).items():
        known = {layout: kl for layout, kl in scores.items() if constraints.allows(layout)}
        if not known:
            cells.append([ratio, 0, "", "", "", "", "", ""])
            continue
        best = min(known, key=known.__getitem__)
        settled = confidence(surrogate, scores, constraints, np.random.default_rng(config.search.seed))
        fit = fits[constraints.attention_counts[0]]
        spearman = "" if fit.spearman is None else f"{fit.spearman:.2f}"
        accuracy = [spearman, f"{fit.rmse:.3f}", f"{fit.coverage:.0%}"]
        cells.append([ratio, len(known), best, f"{known[best]:.4f}", f"{settled:.0%}", *accuracy])
    header = ["ratio", "scored", "best", "KL", "nothing 2 % better", "held-out Spearman", "RMSE of log KL"]
    return table([*header, "in 90 % interval"], cells)


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    from mamtra_ray.session import make_cache, make_library, start_session

    parser = argparse.ArgumentParser(prog="python -m mamtra_ray.probe", description=(__doc__ or "").splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--address", help="Ray cluster (default: $RAY_ADDRESS, else a new local one)")
    options = parser.parse_intermixed_args(arguments)
    config, folder = config_from_arguments(options)
    if options.dry_run:
        print(
            f"probe: {config.probe.masks} layouts on {config.probe.validation_tokens:,} tokens, into {folder}/{PROBE}"
        )
        return 0
    if config.probe.masks == 0:
        raise InputError("probe.masks is 0: there is nothing to score")
    session = start_session(config, folder, ("cache", "align", "probe"), options.address)
    config = session.config
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    if library is None:
        raise InputError(f"student.initialisation is {config.student.initialisation}: probing needs aligned mixers")
    with session.screen.phase("probe", f"{config.probe.masks} layouts by forward passes"):
        rows = probe_masks(
            config,
            folder,
            teacher=session.teacher,
            library=library,
            validation=validation,
            on_progress=lambda done, total: session.screen.count(done, total, "layouts"),
        )
    print(outcome_table(config, rows))
    found = {row.layout: row for row in rows}
    best = []
    for ratio in config.search.ratios:
        for layout in propose(config, rows, ratio, 5):
            row = found.get(layout)
            best.append([ratio, layout, *([f"{row.ce:.3f}", f"{row.kl:.3f}"] if row else ["", "predicted"])])
    print()
    print(table(["ratio", "layout", "CE", "KL"], best))
    return 0


if __name__ == "__main__":
    # As an imported module: Ray must find its classes by name.
    from mamtra_ray.probe import main as imported_main

    raise SystemExit(imported_main())
