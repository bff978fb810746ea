"""How Optuna's parameters stand for layouts.

A ratio fixes the *number* of attention layers, so a free bit per layer would mostly propose layouts of other ratios.
Instead every layer gets a priority in [0, 1] and the highest ones keep attention (random keys, Bean 1994): every
proposal meets its ratio, and any layout can be written down as a starting point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace

_PRIORITY = "priority_"


def param_space(space: SearchSpace) -> dict[str, optuna.distributions.BaseDistribution]:
    """Optuna's distributions: a priority per layer that the constraints leave free; the ratio, if there are several."""
    free = sorted(set(range(space.num_layers)) - space.keep_attention - space.always_mamba)
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        f"{_PRIORITY}{layer}": optuna.distributions.FloatDistribution(0.0, 1.0) for layer in free
    }
    if len(space.ratios) > 1:
        distributions["ratio"] = optuna.distributions.CategoricalDistribution(space.ratios)
    return distributions


def layout_from_params(params: Mapping[str, Any], space: SearchSpace) -> Layout:
    """The layout that a point of :func:`param_space` stands for (ties: the earlier layer keeps attention)."""
    kept = space.num_attention(params.get("ratio", space.ratios[0]))
    free = [layer for layer in range(space.num_layers) if f"{_PRIORITY}{layer}" in params]
    free.sort(key=lambda layer: (-params[f"{_PRIORITY}{layer}"], layer))
    return Layout.from_attention_layers(
        [*space.keep_attention, *free[: kept - len(space.keep_attention)]], space.num_layers
    )


def params_from_layout(layout: Layout, space: SearchSpace) -> dict[str, Any]:
    """The point of :func:`param_space` for a layout that meets the constraints and one of the ratios."""
    attention = set(layout.attention_layers)
    params: dict[str, Any] = {
        name: float(int(name.removeprefix(_PRIORITY)) in attention) for name in param_space(space) if name != "ratio"
    }
    if len(space.ratios) > 1:
        params["ratio"] = next(ratio for ratio in space.ratios if space.num_attention(ratio) == layout.num_attention)
    return params


def sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's own sampler of a kind of ``search.sampler``, seeded. ``grid`` has only starting points to try."""
    if kind == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=8)
    if kind == "tpe":
        return optuna.samplers.TPESampler(multivariate=True, seed=seed, n_startup_trials=8)
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)
