"""Which layout is best under a cost bound, a weight on the cost, or other constraints?

Answers from the scores that ``probe`` or ``search`` left in a run folder, without computing new ones: scored layouts by
their KL divergence, all others by the surrogate, for every allowed number of attention layers. Costs are exact. ::

    python -m mamtra_ray.tradeoff --run runs/demo --max-cost 0.6            at most 60 % of the teacher's cache
    python -m mamtra_ray.tradeoff --run runs/demo --cost decode_flops --weight 2
    python -m mamtra_ray.tradeoff --run runs/demo --max-attention 4 --keep-attention 0

Ratios far from those that were probed are extrapolations; their intervals say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mamtra_ray import efficiency
from mamtra_ray.efficiency.architectures import Architecture
from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints, LinearCost
from mamtra_ray.surrogate.acquisition import fit_log
from mamtra_ray.surrogate.optimum import best_layouts

COSTS: dict[str, Callable[[Architecture, Layout, int], float]] = {
    "cache_bytes": efficiency.cache_bytes,
    "decode_flops": efficiency.decode_flops,
    "parameters": lambda architecture, layout, _length: efficiency.parameters(architecture, layout),
}
_INTERVAL_90 = 1.645


@dataclass(frozen=True)
class Answer:
    """The best layout with a number of attention layers; KL in nats per token with a 90 % interval."""

    layout: Layout
    kl: float
    kl_low: float
    kl_high: float
    scored: bool
    """Whether a forward pass has confirmed it; otherwise the surrogate predicts it."""
    cost: float
    tradeoff: float
    """log KL + weight * cost / cost of the teacher."""


def relative_cost(architecture: Architecture, name: str, context_length: int) -> LinearCost:
    """The named cost at a context length, as a fraction of the teacher's.

    Raises:
        InputError: an unknown cost (with the nearest one).
    """
    if name not in COSTS:
        raise InputError(f"unknown cost {name!r}: {nearest_name(name, COSTS)}")
    all_attention = COSTS[name](architecture, Layout.all_attention(architecture.num_layers), context_length)
    return LinearCost.from_function(
        name, lambda layout: COSTS[name](architecture, layout, context_length) / all_attention, architecture.num_layers
    )


def best_by_ratio(
    scores: Mapping[Layout, float], constraints: Constraints, cost: LinearCost, weight: float = 0.0
) -> list[Answer]:
    """The best layout of every allowed number of attention layers, the best trade-off first.

    Args:
        scores: KL of every layout that was scored; at least 3.
        constraints: what is allowed, a bound on ``cost`` included.
        cost: as a fraction of the teacher's.
        weight: how much log KL the whole cost of the teacher is worth.

    Raises:
        InputError: fewer than 3 scores, or layouts of another length.
    """
    surrogate = fit_log(scores)
    objective = surrogate.mean.plus(np.array(cost.change_L), weight)
    known: dict[int, Layout] = {}
    for layout in sorted(scores, key=lambda layout: np.log(max(scores[layout], 1e-8)) + weight * cost.of(layout)):
        if constraints.allows(layout):
            known.setdefault(layout.num_attention, layout)
    answers = []
    for attention, [optimum, *_] in best_layouts(objective, constraints).items():
        # The cost does not depend on the placement in models of equal layers, but it may in others.
        candidates = {optimum.layout, *([known[attention]] if attention in known else [])}
        answers.append(min((_answer(x, scores, surrogate, cost, weight) for x in candidates), key=lambda a: a.tradeoff))
    return sorted(answers, key=lambda answer: answer.tradeoff)


def _answer(layout: Layout, scores: Mapping[Layout, float], surrogate: Any, cost: LinearCost, weight: float) -> Answer:
    [mean], [deviation] = surrogate.predict([layout])
    scored = layout in scores
    kl = scores[layout] if scored else float(np.exp(mean))
    spread = 1.0 if scored else float(np.exp(_INTERVAL_90 * deviation))
    tradeoff = float(np.log(max(kl, 1e-8))) + weight * cost.of(layout)
    return Answer(layout, kl, kl / spread, kl * spread, scored, cost.of(layout), tradeoff)
