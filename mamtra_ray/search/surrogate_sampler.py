"""The sampler ``surrogate``: an Optuna sampler that proposes layouts by the probe's scores and the trials' own.

The probe's KL of a layout with aligned mixers is a prior of its KL after the first rung. How the two go together (a
straight line between their logarithms) is fitted to the layouts that have both, and what the line leaves gets a
surrogate of its own, so that trials correct the probe where it misjudges. Both are quadratic in the layout: the best
layout of their sum is found exactly. Every second proposal is the predicted best of the untried ones, the others are
optima of functions drawn from both posteriors (Thompson sampling). The ratio with the fewest trials is next.

KL stands for CE here: it is what the probe measures, and the teacher's own CE, which no layout changes, is not in it.
Where the WER is an objective and enough trials were heard, their WER corrects what the KL says in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace
from mamtra_ray.probe.rounds import ratio_constraints, without_singles
from mamtra_ray.search.parameter_space import params_from_layout
from mamtra_ray.surrogate.acquisition import best_of
from mamtra_ray.surrogate.quadratic import Quadratic
from mamtra_ray.surrogate.surrogate import Surrogate, fit_surrogate

LAYOUT, FIRST_RUNG_KL, WER = "layout", "first_rung_kl", "wer"
"""User attributes of the study's trials, written by :class:`mamtra_ray.search.proposals.LayoutProposals`."""
_FEWEST_TO_FIT = 3
_FEWEST_HEARD = 8
"""WERs of a few sentences are noisy: of fewer layouts they would say more about the sentences."""
_SMALLEST_WER = 0.01
"""Added before the logarithm: fewer errors than one in a hundred words are chance, with as few sentences."""
_SLOPE_PRIOR = 1.0
"""How many layouts, a standard deviation of the probe's scores off their mean, draw the line's slope towards 1."""


class SurrogateSampler(optuna.samplers.BaseSampler):
    """Proposes layouts of ``space`` that no trial of the study has.

    Args:
        space: the layouts to choose from.
        probe: KL by layout, from forward passes; may be empty.
        seed: of the posterior draws. With the same trials the same layout is proposed, in whatever session.
        hears: whether the trials' WER counts, beside their KL.
    """

    def __init__(self, space: SearchSpace, probe: Mapping[Layout, float], seed: int, *, hears: bool = False) -> None:
        self.space, self.seed, self.hears = space, seed, hears
        self._by_attention = {c.attention_counts[0]: c for c in ratio_constraints(space).values()}
        logarithms = {layout: math.log(max(kl, 1e-8)) for layout, kl in without_singles(space, probe).items()}
        self._prior = corrected(None, logarithms) if len(logarithms) >= _FEWEST_TO_FIT else None
        self._proposed: tuple[int, dict[str, Any]] = (-1, {})

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing: Optuna would ask for it before every enqueued trial too, which needs no proposal."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing, see :meth:`infer_relative_search_space`."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter of the layout that is proposed for ``trial``."""
        if self._proposed[0] != trial.number:
            self._proposed = trial.number, params_from_layout(self.propose(study), self.space)
        return self._proposed[1][param_name]

    def propose(self, study: optuna.Study) -> Layout:
        """The layout to try next; there must be one that no trial of ``study`` has."""
        known = [trial for trial in study.get_trials(deepcopy=False) if LAYOUT in trial.user_attrs]
        tried = {Layout.from_string(trial.user_attrs[LAYOUT]): trial.user_attrs for trial in known}
        rng = None if len(tried) % 2 == 0 else np.random.default_rng([self.seed, len(tried)])
        scores, rates = (
            {layout: float(found[name]) for layout, found in tried.items() if name in found}
            for name in (FIRST_RUNG_KL, WER)
        )
        belief = self._belief(scores, rates if self.hears else {})
        objective = belief.drawn(rng) if belief is not None else self._any_order(len(tried))
        found = best_of(objective, self._by_attention[self._next_ratio(tried)], set(tried))
        assert found is not None  # a ratio with an untried layout was chosen
        return found

    def _next_ratio(self, tried: Collection[Layout]) -> int:
        """Attention layers of the ratio with the fewest trials, among those that have untried layouts."""
        count = {kept: sum(layout.num_attention == kept for layout in tried) for kept in self._by_attention}
        left = [kept for kept, number in count.items() if number < self.space.num_layouts_of(kept)]
        return min(left, key=lambda kept: (count[kept], -kept))

    def _belief(self, scores: Mapping[Layout, float], rates: Mapping[Layout, float]) -> Belief | None:
        """What is believed of the log KL after the first rung or, where enough were heard, of the log WER."""
        belief = self._prior
        if len(scores) >= _FEWEST_TO_FIT:
            belief = corrected(belief, {layout: math.log(max(kl, 1e-8)) for layout, kl in scores.items()})
        if len(rates) >= _FEWEST_HEARD:
            belief = corrected(belief, {layout: math.log(rate + _SMALLEST_WER) for layout, rate in rates.items()})
        return belief

    def _any_order(self, tried: int) -> Quadratic:
        """Nothing is known: any order of the layouts is as good as another."""
        layers = self.space.num_layers
        return Quadratic(0.0, np.random.default_rng([self.seed, tried]).normal(size=layers), np.zeros((layers, layers)))


@dataclass(frozen=True)
class Belief:
    """A score by layout, with its uncertainty: a surrogate, on top of a straight line over an earlier belief."""

    rest: Surrogate
    measured: Mapping[Layout, float]
    """What the surrogate was fitted to, the line included."""
    earlier: Belief | None = None
    slope: float = 0.0
    intercept: float = 0.0

    def expected(self, layouts: Sequence[Layout]) -> np.ndarray:
        """(B,) measured scores where there are, predictions elsewhere."""
        predicted, _ = self.rest.predict(layouts)
        if self.earlier is not None:
            predicted = predicted + self.intercept + self.slope * self.earlier.expected(layouts)
        return np.array([self.measured.get(layout, p) for layout, p in zip(layouts, predicted, strict=True)])

    def drawn(self, rng: np.random.Generator | None) -> Quadratic:
        """The expectation, or with ``rng`` a draw from the posterior."""
        rest = self.rest.mean if rng is None else self.rest.sample(rng)
        if self.earlier is None:
            return rest
        below = self.earlier.drawn(rng)
        return Quadratic(
            self.intercept + self.slope * below.constant + rest.constant,
            self.slope * below.linear_L + rest.linear_L,
            self.slope * below.pairs_LL + rest.pairs_LL,
        )


def corrected(earlier: Belief | None, measured: Mapping[Layout, float]) -> Belief:
    """A belief of what was measured; what is believed already counts as far as the two go together."""
    layouts = sorted(measured)
    target = np.array([measured[layout] for layout in layouts])
    if earlier is None:
        return Belief(fit_surrogate(layouts, target), measured)
    before = earlier.expected(layouts)
    slope, intercept = line(before, target)
    return Belief(fit_surrogate(layouts, target - (intercept + slope * before)), measured, earlier, slope, intercept)


def line(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of ``after`` over ``before``, the slope drawn towards 1 (ridge regression)."""
    centered = before - before.mean()
    spread = float(centered.var())
    weight = _SLOPE_PRIOR * spread
    if not spread:
        return 1.0, float((after - before).mean())
    slope = (float(centered @ (after - after.mean())) + weight) / (float(centered @ centered) + weight)
    return slope, float(after.mean() - slope * before.mean())
