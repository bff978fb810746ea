"""Ways to find a good layout with a limited number of scores, for ``search_quality.py``.

``additive`` is the replace-one ranking with the exact optimum of the sums (HALO, Puzzle), ``greedy`` replaces layer by
layer (Distill-then-Replace), ``greedy restore`` gives attention back layer by layer (Taylor-Calibrate),
``alignment error`` keeps attention where the mixers fit worst. Methods that train are in ``trained_selection.py``.

A method is a function ``(scores, budgets, seed)``. It asks :class:`Scores` for the score of layouts until that raises
:class:`SpentError`; what counts is the best scored layout of every budget. Every method gets the same number of scores:
those that look at one budget at a time get an equal part of them for each.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import optuna

from mamtra_ray.layouts import STRATEGIES, Layout, from_strategy
from mamtra_ray.layouts.candidates import SearchSpace
from mamtra_ray.layouts.constraints import Constraints, sample_layouts
from mamtra_ray.probe.rounds import rounds
from mamtra_ray.search.parameter_space import layout_from_params, param_space

optuna.logging.set_verbosity(optuna.logging.WARNING)


class SpentError(Exception):
    """All scores are used up."""


class Truth(Protocol):
    """The score of any layout: a table, or a model that is asked."""

    def __getitem__(self, layout: Layout, /) -> float: ...


class Scores:
    """A limited number of scores; asking for a known layout again is free."""

    def __init__(self, truth: Truth, limit: int) -> None:
        self.truth, self.limit = truth, limit
        self.known: dict[Layout, float] = {}

    def __call__(self, layout: Layout) -> float:
        if layout not in self.known:
            if len(self.known) >= self.limit:
                raise SpentError
            self.known[layout] = self.truth[layout]
        return self.known[layout]


Method = Callable[[Scores, Sequence[Constraints], int], None]


def random_layouts(scores: Scores, budget: Constraints, seed: int) -> None:
    for layout in sample_layouts(budget, scores.limit, np.random.default_rng(seed)):
        scores(layout)


def optuna_layouts(kind: str) -> Callable[[Scores, Constraints, int], None]:
    """Optuna with one priority a layer, as ``search/parameter_space.py`` gives it to Tune."""

    def run(scores: Scores, budget: Constraints, seed: int) -> None:
        attention = budget.attention_counts[0]
        space = SearchSpace(budget.num_layers, (f"{attention}:{budget.num_layers - attention}",))
        samplers = {
            "tpe": lambda: optuna.samplers.TPESampler(multivariate=True, seed=seed),
            "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
            "gp": lambda: optuna.samplers.GPSampler(seed=seed, deterministic_objective=True),
        }
        study = optuna.create_study(sampler=samplers[kind]())
        distributions = param_space(space)
        # A sampler that has converged proposes known layouts only; they cost no score, so the trials are limited too.
        for _ in range(3 * scores.limit):
            trial = study.ask(distributions)
            study.tell(trial, np.log(scores(layout_from_params(trial.params, space))))

    return run


def greedy(scores: Scores, budget: Constraints, seed: int) -> None:
    """Replace the layer that costs least, one by one; what is left of the scores goes into swaps."""
    layout = Layout("A" * budget.num_layers)
    while len(layout.attention_layers) > budget.attention_counts[0]:
        layout = min(_one_more_mamba(layout), key=scores)
    rng = np.random.default_rng(seed)
    while True:
        swaps = _swaps(layout)
        better = next(
            (swap for swap in rng.permutation(np.array(swaps, dtype=object)) if scores(swap) < scores(layout)), None
        )
        if better is None:
            [layout] = sample_layouts(budget, 1, rng)
        else:
            layout = better


def beam(scores: Scores, budget: Constraints, seed: int) -> None:
    """Replacement layer by layer with as many survivors as the scores allow."""
    steps = budget.num_layers - budget.attention_counts[0]
    width = max(1, scores.limit // (steps * budget.num_layers // 2))
    survivors = [Layout("A" * budget.num_layers)]
    for _ in range(steps):
        children = {child for layout in survivors for child in _one_more_mamba(layout)}
        survivors = sorted(children, key=scores)[:width]


def greedy_restore(scores: Scores, budget: Constraints, seed: int) -> None:
    """From Mamba everywhere, give attention back where that helps most, one by one."""
    kept: set[int] = set()
    while len(kept) < budget.attention_counts[0]:
        options = [
            Layout.from_attention_layers(kept | {layer}, budget.num_layers)
            for layer in range(budget.num_layers)
            if layer not in kept
        ]
        kept = set(min(options, key=scores).attention_layers)


def additive(scores: Scores, budget: Constraints, seed: int) -> None:
    """Score the single replacements, then the layouts of the lowest sums, lowest first."""
    single = additive_costs(scores, budget.num_layers)
    for mamba in lowest_sums(single, budget.num_layers - budget.attention_counts[0]):
        scores(Layout.from_attention_layers(set(range(budget.num_layers)) - set(mamba), budget.num_layers))


def lowest_sums(costs: Sequence[float], count: int) -> Iterator[tuple[int, ...]]:
    """Every choice of ``count`` indices, in the order of the sums of their costs."""
    order = sorted(range(len(costs)), key=costs.__getitem__)
    first = tuple(range(count))
    heap, seen = [(sum(costs[order[rank]] for rank in first), first)], {first}
    while heap:
        value, ranks = heapq.heappop(heap)
        yield tuple(order[rank] for rank in ranks)
        for place, rank in enumerate(ranks):
            above = ranks[place + 1] if place + 1 < count else len(costs)
            following = (*ranks[:place], rank + 1, *ranks[place + 1 :])
            if rank + 1 < above and following not in seen:
                seen.add(following)
                change = costs[order[rank + 1]] - costs[order[rank]]
                heapq.heappush(heap, (value + change, following))


def additive_costs(scores: Callable[[Layout], float], num_layers: int) -> list[float]:
    """Score of every layout with one Mamba layer."""
    every = set(range(num_layers))
    return [scores(Layout.from_attention_layers(every - {layer}, num_layers)) for layer in range(num_layers)]


def paper_patterns(scores: Scores, budget: Constraints, seed: int, *, importances: Sequence[Sequence[float]]) -> None:
    """Every placement of the paper; ``importances`` are one score a layer for each criterion."""
    attention = budget.attention_counts[0]
    divisor = np.gcd(attention, budget.num_layers - attention)
    ratio = f"{attention // divisor}:{(budget.num_layers - attention) // divisor}"
    for strategy in STRATEGIES:
        for importance in importances if strategy == "importance" else [None]:
            scores(from_strategy(strategy, budget.num_layers, ratio, importance))


def keep_most_important(scores: Scores, budget: Constraints, seed: int, *, importance: Sequence[float]) -> None:
    """One layout: attention where ``importance`` is highest."""
    scores(from_importance(importance, budget))


def from_importance(importance: Sequence[float], budget: Constraints) -> Layout:
    """Attention where ``importance`` is highest, Mamba elsewhere."""
    ranked = sorted(range(budget.num_layers), key=lambda layer: (-importance[layer], layer))
    return Layout.from_attention_layers(ranked[: budget.attention_counts[0]], budget.num_layers)


def surrogate(scores: Scores, budgets: Sequence[Constraints], seed: int) -> None:
    """Ours: what the probe does, all budgets together, without the paper's placements."""
    ratios = tuple(
        f"{budget.attention_counts[0]}:{budget.num_layers - budget.attention_counts[0]}" for budget in budgets
    )
    space = SearchSpace(budgets[0].num_layers, ratios)
    for wanted in rounds(space, [], scores.limit, seed, scores.known):
        for layout in wanted:
            scores(layout)


def for_each_budget(method: Callable[[Scores, Constraints, int], None]) -> Method:
    """A method of one budget, for several: an equal part of the scores for each."""

    def run(scores: Scores, budgets: Sequence[Constraints], seed: int) -> None:
        for index, budget in enumerate(budgets):
            part = Scores(scores.truth, scores.limit // len(budgets))
            with contextlib.suppress(SpentError):
                method(part, budget, 1000 * seed + index)
            scores.known |= part.known

    return run


def methods(importances: Sequence[Sequence[float]], alignment_errors: Sequence[float]) -> dict[str, Method]:
    """All methods by name.

    Args:
        importances: as for :func:`paper_patterns`.
        alignment_errors: held-out error of every layer's aligned mixer.
    """
    by_error = functools.partial(keep_most_important, importance=alignment_errors)
    return {
        "surrogate": surrogate,
        "random": for_each_budget(random_layouts),
        "tpe": for_each_budget(optuna_layouts("tpe")),
        "nsga2": for_each_budget(optuna_layouts("nsga2")),
        "gp": for_each_budget(optuna_layouts("gp")),
        "greedy": for_each_budget(greedy),
        "greedy restore": for_each_budget(greedy_restore),
        "beam": for_each_budget(beam),
        "additive": for_each_budget(additive),
        "alignment error": for_each_budget(by_error),
        "paper": for_each_budget(functools.partial(paper_patterns, importances=importances)),
    }


def _one_more_mamba(layout: Layout) -> list[Layout]:
    kept = set(layout.attention_layers)
    return [Layout.from_attention_layers(kept - {layer}, layout.num_layers) for layer in layout.attention_layers]


def _swaps(layout: Layout) -> list[Layout]:
    kept = set(layout.attention_layers)
    return [
        Layout.from_attention_layers(kept - {a} | {m}, layout.num_layers)
        for a in layout.attention_layers
        for m in layout.mamba_layers
    ]
