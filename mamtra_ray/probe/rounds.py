"""Which layouts are scored, round by round. Plain numpy; knows neither PyTorch nor Ray.

1. What is given (the paper's placements, the user's own), every single replacement, and placements drawn uniformly.
   The single replacements also say which layouts have the lowest sums (HALO, Puzzle): a few of each ratio are scored.
2. A surrogate with linear and pairwise terms is fitted to all but the single replacements: what one layer costs among
   attention layers bends its straight lines where half of the layers are replaced. The layouts that it holds for best
   are scored, round by round, until the best one is scored and hardly any unscored one can be better.
3. The last eighth confirms: it goes to the predicted optima alone, a few at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace
from mamtra_ray.layouts.constraints import Constraints, sample_layouts
from mamtra_ray.surrogate.acquisition import CONFIDENT, best_unscored, confidence, fit_log, next_layouts
from mamtra_ray.surrogate.optimum import best_layouts
from mamtra_ray.surrogate.quadratic import Quadratic

FEWEST_TO_FIT = 3
# Part of the scores that does not depend on the surrogate, and of the rest that a round takes.
_FIRST_SHARE, _ROUND_SHARE = 0.5, 0.25
# The last part of all, that confirms optima, and how many of a ratio are scored before the next fit.
_LAST_SHARE, _CONFIRMED_AT_ONCE = 0.125, 2
# Single replacements may take this part of the scores at most, and the lowest sums this part, over all ratios.
_SINGLES_SHARE, _SUMS_SHARE = 0.7, 0.25


def rounds(
    space: SearchSpace,
    given: Sequence[Layout],
    total: int,
    seed: int,
    scores: Mapping[Layout, float],
) -> Iterator[list[Layout]]:
    """Lists of layouts to score next, none of them scored; ends when ``total`` are spent or every ratio is settled.

    Args:
        space: the layouts that may be scored.
        given: what is scored in any case.
        total: how many scores may be spent, on layouts of the ratios and on single replacements.
        seed: of what is drawn. Equal scores lead to equal proposals, so that a resumed run does what an
            uninterrupted one does.
        scores: KL by layout; the caller adds what was asked for before it takes the next list. Scores of other ratios
            may be among them: they inform the surrogate and are not counted.

    Raises:
        InputError: ratios that the constraints do not leave.
    """
    by_ratio = ratio_constraints(space)
    singles = affordable_singles(space, total)

    def new(wanted: Sequence[Layout], limit: int) -> list[Layout]:
        left = limit - num_spent(space, total, scores)
        return [layout for layout in dict.fromkeys(wanted) if layout not in scores][: max(left, 0)]

    before_last = total - int(total * _LAST_SHARE)
    sums = round(total * _SUMS_SHARE / len(by_ratio)) if singles else 0
    chosen = first_layouts(
        list(by_ratio.values()),
        [*given, *singles],
        round(total * _FIRST_SHARE) - sums * len(by_ratio),
        np.random.default_rng(seed),
    )
    yield new(chosen, before_last)
    if all(layout in scores for layout in singles):
        costs = {layout: scores[layout] for layout in singles}
        favored = [layout for c in by_ratio.values() for layout in lowest_sums(costs, c, sums)] if sums else []
        yield new(favored, before_last)
    while (spent := num_spent(space, total, scores)) < total:
        known = without_singles(space, dict(sorted(scores.items())))
        if len(known) < FEWEST_TO_FIT:
            break
        confirms = spent >= before_last
        rng = np.random.default_rng([seed, len(scores)])
        surrogate = fit_log(known)
        unsettled = [c for c in by_ratio.values() if confidence(surrogate, known, c, rng) < CONFIDENT]
        share = max(round(total * (1 - _FIRST_SHARE) * _ROUND_SHARE / max(len(unsettled), 1)), 2)
        wanted = [
            layout
            for constraints in unsettled
            for layout in (
                best_unscored(surrogate, known, constraints, _CONFIRMED_AT_ONCE)
                if confirms
                else next_layouts(surrogate, known, constraints, share, rng)
            )
        ]
        if not wanted:
            break
        yield new(wanted, total if confirms else before_last)


def ratio_constraints(space: SearchSpace) -> dict[str, Constraints]:
    """ratio -> the layouts that the search may use at it."""
    return {
        ratio: Constraints.from_ratio(space.num_layers, ratio, space.keep_attention, space.always_mamba)
        for ratio in space.ratios
    }


def num_spent(space: SearchSpace, total: int, scores: Collection[Layout]) -> int:
    """How many of ``scores`` count: those of an earlier search's ratios are no part of what this one may spend."""
    singles = set(affordable_singles(space, total))
    return sum(layout in singles or space.allows(layout) for layout in scores)


def affordable_singles(space: SearchSpace, total: int) -> list[Layout]:
    """The single replacements that are worth their scores: none where they would take too many of ``total``, or where
    every layout of the ratios can be scored anyway."""
    singles = single_replacements(space)
    return singles if len(singles) <= _SINGLES_SHARE * total and total < space.num_layouts else []


def without_singles(space: SearchSpace, scores: Mapping[Layout, float]) -> dict[Layout, float]:
    """What the surrogate of a search is fitted to: all scores but those of single replacements of no searched ratio."""
    singles = set(single_replacements(space))
    return {layout: kl for layout, kl in scores.items() if layout not in singles or space.allows(layout)}


def single_replacements(space: SearchSpace) -> list[Layout]:
    """One layout for each free layer: it alone is Mamba, besides those that must be."""
    free = set(range(space.num_layers)) - space.keep_attention - space.always_mamba
    attention = free | space.keep_attention
    return [Layout.from_attention_layers(attention - {layer}, space.num_layers) for layer in sorted(free)]


def lowest_sums(costs: Mapping[Layout, float], constraints: Constraints, count: int) -> list[Layout]:
    """The ``count`` layouts with the lowest sums of the costs of their layers' single replacements, lowest first."""
    linear = np.zeros(constraints.num_layers)
    for layout, cost in costs.items():
        [layer] = set(layout.mamba_layers) - set(constraints.always_mamba)
        linear[layer] = cost
    no_pairs = np.zeros((constraints.num_layers, constraints.num_layers))
    found = best_layouts(Quadratic(0.0, linear, no_pairs), constraints, count)
    return [optimum.layout for optima in found.values() for optimum in optima]


def first_layouts(
    ratios: Sequence[Constraints], given: Sequence[Layout], count: int, rng: np.random.Generator
) -> list[Layout]:
    """What is given, then ratios drawn uniformly and placements drawn uniformly inside them; ``count`` in all, or as
    many as are given."""
    chosen = list(dict.fromkeys(given))
    share = np.bincount(rng.integers(len(ratios), size=max(count - len(chosen), 0)), minlength=len(ratios))
    for constraints, number in zip(ratios, share, strict=True):
        chosen += sample_layouts(constraints, int(number), rng, exclude=chosen)
    return chosen
