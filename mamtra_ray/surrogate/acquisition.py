"""Which layouts to score next, and when the best one is settled. Plain numpy.

The surrogate's optimum may be one that it only believes in. So every round scores the predicted best layouts *and* the
optima of functions drawn from its posterior (Thompson sampling), refits, and asks how likely it is that an unscored
layout is still better. All functions here look at one ratio: constraints with one number of attention layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints
from mamtra_ray.surrogate.optimum import best_layouts, can_enumerate
from mamtra_ray.surrogate.quadratic import Optimum, Quadratic
from mamtra_ray.surrogate.surrogate import Surrogate, fit_surrogate

# A better layout that gains less than this (in the target's units: 2 % of the KL) is no reason to go on.
TOLERANCE = 0.02
CONFIDENT = 0.95
_DRAWS = 32
# Of a draw: only these can be the best when the misfit of each is drawn too.
_CONTENDERS = 16
# Of HiGHS for one optimum, where enumeration is out of reach.
_SECONDS_PER_OPTIMUM = 10.0


def fit_log(scores: Mapping[Layout, float]) -> Surrogate:
    """The surrogate of the logarithms of positive scores such as KL divergences."""
    return fit_surrogate(list(scores), np.log(np.maximum(list(scores.values()), 1e-8)))


def next_layouts(
    surrogate: Surrogate,
    scored: Mapping[Layout, float],
    constraints: Constraints,
    count: int,
    rng: np.random.Generator,
) -> list[Layout]:
    """Up to ``count`` unscored layouts: half of them predicted best, the others optima of posterior draws."""
    best = _best_unscored(surrogate.mean, constraints, set(scored), -(-count // 2))
    chosen = [optimum.layout for optimum in best]
    for _ in range(4 * count):
        if len(chosen) >= count or not chosen:
            break
        draw = _best_unscored(surrogate.sample(rng), constraints, {*scored, *chosen}, 1)
        chosen += [optimum.layout for optimum in draw]
    return chosen


def confidence(
    surrogate: Surrogate, scored: Mapping[Layout, float], constraints: Constraints, rng: np.random.Generator
) -> float:
    """Probability that no unscored layout beats the best scored one by more than 2 % of its score.

    Estimated by 32 posterior draws of the surrogate of the scores' logarithm, what it cannot represent included. 0 as
    long as fewer than two scores per layer were made at this ratio: until then its variances are guesses.
    """
    known = [score for layout, score in scored.items() if constraints.allows(layout)]
    if len(known) >= constraints.num_layouts:
        return 1.0
    if len(known) < 2 * constraints.num_layers:
        return 0.0
    to_beat = np.log(max(min(known), 1e-8)) - TOLERANCE
    # Where every layout is a HiGHS run of its own, the draw's optimum must stand for its contenders.
    contenders = _CONTENDERS if can_enumerate(constraints) else 1
    unbeaten = 0
    for _ in range(_DRAWS):
        best = np.array([o.value for o in _best_unscored(surrogate.sample(rng), constraints, set(scored), contenders)])
        unbeaten += not len(best) or (best + surrogate.misfit * rng.normal(size=len(best))).min() >= to_beat
    return unbeaten / _DRAWS


def ranked_layouts(
    surrogate: Surrogate, scored: Mapping[Layout, float], constraints: Constraints, count: int
) -> list[tuple[Layout, float, bool]]:
    """The ``count`` best layouts, scored ones by their score, the others by their prediction.

    Returns:
        (layout, score or predicted score, whether it was scored), best first.
    """
    known = [(layout, score, True) for layout, score in scored.items() if constraints.allows(layout)]
    predicted = [
        (optimum.layout, float(np.exp(optimum.value)), False)
        for optimum in _best_unscored(surrogate.mean, constraints, set(scored), count)
    ]
    return sorted([*known, *predicted], key=lambda entry: (entry[1], entry[0]))[:count]


def best_unscored(
    surrogate: Surrogate, scored: Mapping[Layout, float], constraints: Constraints, count: int
) -> list[Layout]:
    """The layouts predicted best among those that were not scored."""
    return [optimum.layout for optimum in _best_unscored(surrogate.mean, constraints, set(scored), count)]


def best_of(quadratic: Quadratic, constraints: Constraints, excluded: set[Layout]) -> Layout | None:
    """The layout with the lowest value of ``quadratic`` outside ``excluded``; None if there is none."""
    best = _best_unscored(quadratic, constraints, excluded, 1)
    return best[0].layout if best else None


def _best_unscored(quadratic: Quadratic, constraints: Constraints, scored: set[Layout], count: int) -> list[Optimum]:
    """The best layouts outside ``scored``; fewer or none when nothing else is left."""
    found = best_layouts(quadratic, constraints, count, _SECONDS_PER_OPTIMUM, scored)
    return [optimum for optima in found.values() for optimum in optima]
