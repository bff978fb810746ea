"""The sampler ``surrogate``: an Optuna sampler that proposes layouts by the probe's scores and the trials' own.

The probe's KL of a layout with aligned mixers is a prior of its KL after the first rung. How the two go together (a
straight line between their logarithms) is fitted to the layouts that have both, and what the line leaves gets a
surrogate of its own, so that trials correct the probe where it misjudges. Both are quadratic in the layout: the best
layout of their sum is found exactly. Every second proposal is the predicted best of the untried ones, the others are
optima of functions drawn from both posteriors (Thompson sampling). The ratio with the fewest trials is next.

KL stands for CE here: it is what the probe measures, and the teacher's own CE, which no layout changes, is not in it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace
from mamtra_ray.probe.probing import ratio_constraints
from mamtra_ray.search.parameter_space import params_from_layout
from mamtra_ray.surrogate.acquisition import best_of, fit_log
from mamtra_ray.surrogate.quadratic import Quadratic
from mamtra_ray.surrogate.surrogate import Surrogate, fit_surrogate

LAYOUT, FIRST_RUNG_KL = "layout", "first_rung_kl"
"""User attributes of the study's trials, written by :class:`mamtra_ray.search.proposals.LayoutProposals`."""
_FEWEST_TO_FIT = 3
_SLOPE_PRIOR = 1.0
"""How many layouts, a standard deviation of the probe's scores off their mean, draw the line's slope towards 1."""


class SurrogateSampler(optuna.samplers.BaseSampler):
    """Proposes layouts of ``space`` that no trial of the study has.

    Args:
        space: the layouts to choose from.
        probe: KL by layout, from forward passes; may be empty.
        seed: of the posterior draws. With the same trials the same layout is proposed, in whatever session.
    """

    def __init__(self, space: SearchSpace, probe: Mapping[Layout, float], seed: int) -> None:
        self.space, self.seed = space, seed
        self._by_attention = {c.attention_counts[0]: c for c in ratio_constraints(space).values()}
        self._prior = fit_log(probe) if len(probe) >= _FEWEST_TO_FIT else None
        self._probe = dict(probe)
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
        states = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
        known = [t for t in study.get_trials(deepcopy=False, states=states) if LAYOUT in t.user_attrs]
        tried = [Layout.from_string(trial.user_attrs[LAYOUT]) for trial in known]
        scores = {
            layout: float(trial.user_attrs[FIRST_RUNG_KL])
            for layout, trial in zip(tried, known, strict=True)
            if FIRST_RUNG_KL in trial.user_attrs
        }
        rng = np.random.default_rng([self.seed, len(tried)])
        num_attention = self._next_ratio(tried)
        quadratic = self._objective(scores, None if len(tried) % 2 == 0 else rng)
        found = best_of(quadratic, self._by_attention[num_attention], set(tried))
        assert found is not None  # a ratio with an untried layout was chosen
        return found

    def _next_ratio(self, tried: Collection[Layout]) -> int:
        """Attention layers of the ratio with the fewest trials, among those that have untried layouts."""
        count = {kept: sum(layout.num_attention == kept for layout in tried) for kept in self._by_attention}
        left = [kept for kept, number in count.items() if number < self.space.num_layouts_of(kept)]
        return min(left, key=lambda kept: (count[kept], -kept))

    def _objective(self, scores: Mapping[Layout, float], rng: np.random.Generator | None) -> Quadratic:
        """Log KL after the first rung: its expectation, or with ``rng`` a draw from the posterior."""
        if len(scores) < _FEWEST_TO_FIT:
            if self._prior is None:
                # Nothing is known: any order of the layouts is as good as another.
                layers = self.space.num_layers
                random = np.random.default_rng([self.seed, len(scores)]) if rng is None else rng
                return Quadratic(0.0, random.normal(size=layers), np.zeros((layers, layers)))
            return _drawn(self._prior, rng)
        layouts = sorted(scores)
        target = np.log(np.maximum([scores[layout] for layout in layouts], 1e-8))
        if self._prior is None:
            return _drawn(fit_surrogate(layouts, target), rng)
        before = self._log_probe(layouts)
        slope, intercept = line(before, target)
        rest = _drawn(fit_surrogate(layouts, target - (intercept + slope * before)), rng)
        prior = _drawn(self._prior, rng)
        return Quadratic(
            intercept + slope * prior.constant + rest.constant,
            slope * prior.linear_L + rest.linear_L,
            slope * prior.pairs_LL + rest.pairs_LL,
        )

    def _log_probe(self, layouts: Collection[Layout]) -> np.ndarray:
        assert self._prior is not None
        predicted, _ = self._prior.predict(list(layouts))
        measured = [np.log(max(self._probe[x], 1e-8)) if x in self._probe else None for x in layouts]
        return np.array([p if m is None else m for p, m in zip(predicted, measured, strict=True)])


def line(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of ``after`` over ``before``, the slope drawn towards 1 (ridge regression)."""
    centered = before - before.mean()
    spread = float(centered.var())
    weight = _SLOPE_PRIOR * spread
    if not spread:
        return 1.0, float((after - before).mean())
    slope = (float(centered @ (after - after.mean())) + weight) / (float(centered @ centered) + weight)
    return slope, float(after.mean() - slope * before.mean())


def _drawn(surrogate: Surrogate, rng: np.random.Generator | None) -> Quadratic:
    return surrogate.mean if rng is None else surrogate.sample(rng)
