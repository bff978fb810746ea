"""Which layouts a search may try, and how Optuna's parameters stand for them.

A budget fixes the *number* of attention layers, so a free bit per layer would mostly propose layouts of other
budgets. Instead every layer gets a priority in [0, 1] and the highest ones keep attention (random keys, Bean
1994): every proposal meets its budget, and any layout can be written down as a starting point.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import optuna

from mamtra_ray.config import IMPORTANCE_CRITERIA, SearchConfig
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout, from_strategy, num_attention_layers


@dataclass(frozen=True)
class Candidate:
    """A layout that will be tried, and where it comes from."""

    layout: Layout
    origin: str
    """``block_beginning``, ``back``, ... (the paper), ``probe`` (the surrogate's optimum) or ``optuna``."""


def check_budgets(search: SearchConfig, num_layers: int) -> None:
    """Refuse budgets and constraints that no layout of ``num_layers`` can meet, before anything starts."""
    for layer in (*search.keep_attention, *search.always_mamba):
        if not 0 <= layer < num_layers:
            raise InputError(f"search constraints: layer {layer} does not exist, layers go from 0 to {num_layers - 1}")
    for ratio in search.ratios:
        kept = num_attention_layers(num_layers, ratio)
        most = num_layers - len(set(search.always_mamba))
        least = len(set(search.keep_attention))
        if not least <= kept <= most:
            raise InputError(
                f"search.ratios: {ratio} keeps {kept} attention layers, but the constraints allow {least} to {most}"
            )


def meets_constraints(layout: Layout, search: SearchConfig) -> bool:
    """Whether ``layout`` respects ``keep_attention`` and ``always_mamba``."""
    return set(search.keep_attention) <= set(layout.attention_layers) and set(search.always_mamba) <= set(
        layout.mamba_layers
    )


def importance_criteria(search: SearchConfig) -> list[str]:
    """The criteria by which the search's strategies ask for layer importance, in a fixed order."""
    return [name for name in IMPORTANCE_CRITERIA if f"importance_{name}" in search.strategies]


def paper_candidates(
    search: SearchConfig, num_layers: int, importance: Mapping[str, Sequence[float]] = MappingProxyType({})
) -> list[Candidate]:
    """The paper's strategies at every budget; one that breaks a constraint of the search is left out.

    ``importance`` has one score a layer for each criterion. A strategy ``importance_<criterion>`` whose scores are not
    measured yet is left out too.
    """
    candidates = []
    for ratio in search.ratios:
        for strategy in search.strategies:
            criterion = strategy.removeprefix("importance_")
            if criterion == strategy:
                candidates.append(Candidate(from_strategy(strategy, num_layers, ratio), strategy))
            elif criterion in importance:
                layout = from_strategy("importance", num_layers, ratio, importance[criterion])
                candidates.append(Candidate(layout, strategy))
    return without_repeats(candidate for candidate in candidates if meets_constraints(candidate.layout, search))


def without_repeats(candidates: Iterable[Candidate]) -> list[Candidate]:
    """``candidates`` in order, each layout once (with its first origin)."""
    return list({candidate.layout: candidate for candidate in reversed(list(candidates))}.values())[::-1]


def param_space(search: SearchConfig, num_layers: int) -> dict[str, optuna.distributions.BaseDistribution]:
    """Optuna's distributions: the budget, and one priority per layer that the constraints leave free."""
    free = sorted(set(range(num_layers)) - set(search.keep_attention) - set(search.always_mamba))
    space: dict[str, optuna.distributions.BaseDistribution] = {
        f"priority_{layer}": optuna.distributions.FloatDistribution(0.0, 1.0) for layer in free
    }
    if len(search.ratios) > 1:
        space["ratio"] = optuna.distributions.CategoricalDistribution(search.ratios)
    return space


def layout_from_params(params: Mapping[str, Any], search: SearchConfig, num_layers: int) -> Layout:
    """The layout that a point of :func:`param_space` stands for (ties: the earlier layer keeps attention)."""
    kept = num_attention_layers(num_layers, params.get("ratio", search.ratios[0]))
    free = [layer for layer in range(num_layers) if f"priority_{layer}" in params]
    free.sort(key=lambda layer: (-params[f"priority_{layer}"], layer))
    return Layout.from_attention_layers(
        [*search.keep_attention, *free[: kept - len(set(search.keep_attention))]], num_layers
    )


def params_from_layout(layout: Layout, search: SearchConfig) -> dict[str, Any]:
    """The point of :func:`param_space` for a layout that meets the constraints and one of the budgets."""
    params: dict[str, Any] = {
        name: float(layout.letters[int(name.removeprefix("priority_"))] == "A")
        for name in param_space(search, layout.num_layers)
        if name != "ratio"
    }
    if len(search.ratios) > 1:
        params["ratio"] = next(
            ratio
            for ratio in search.ratios
            if num_attention_layers(layout.num_layers, ratio) == len(layout.attention_layers)
        )
    return params


def sampler(search: SearchConfig) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of the configured kind, seeded. ``grid`` has only starting points to try."""
    kinds = {
        "tpe": lambda: optuna.samplers.TPESampler(multivariate=True, seed=search.seed, n_startup_trials=8),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=search.seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=search.seed),
        "grid": lambda: optuna.samplers.RandomSampler(seed=search.seed),
    }
    return kinds[search.sampler]()
