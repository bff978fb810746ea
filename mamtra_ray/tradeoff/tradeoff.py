"""Which layout is best under a cost bound, a weight on the cost, or other constraints?

Answers from scores that are there, without computing new ones: scored layouts by their KL divergence, all others by the
surrogate, for every allowed number of attention layers. Costs are exact.

The surrogate knows nothing of ratios at which no layout was scored. KL falls with attention, so their predictions are
held between the answers of the scored ratios around them, and they are ranked below those.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mamtra_ray import efficiency
from mamtra_ray.efficiency.architectures import Architecture
from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints, LinearCost
from mamtra_ray.surrogate.acquisition import fit_log
from mamtra_ray.surrogate.optimum import best_layouts
from mamtra_ray.surrogate.surrogate import Surrogate

COSTS: dict[str, Callable[[Architecture, Layout, int], float]] = {
    "cache_bytes": efficiency.cache_bytes,
    "decode_flops": efficiency.decode_flops,
    "parameters": lambda architecture, layout, _length: efficiency.parameters(architecture, layout),
}
_INTERVAL_90 = 1.645
Evidence = Literal["scored", "predicted", "extrapolated"]
"""A forward pass has scored the layout; the surrogate predicts it at a ratio of which layouts were scored; or at one of
which none was."""


@dataclass(frozen=True)
class Answer:
    """The best layout with a number of attention layers; KL in nats per token with a 90 % interval."""

    layout: Layout
    kl: float
    kl_low: float
    kl_high: float
    evidence: Evidence
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
    """The best layout of every allowed number of attention layers: the best trade-off first, extrapolations last.

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
    for layout in sorted(scores, key=lambda layout: _tradeoff(scores[layout], cost.of(layout), weight)):
        if constraints.allows(layout):
            known.setdefault(layout.num_attention, layout)
    scored_ratios = {layout.num_attention for layout in scores}
    answers = {}
    for attention, [optimum, *_] in best_layouts(objective, constraints).items():
        # The cost does not depend on the placement in models of equal layers, but it may in others.
        candidates = {optimum.layout, *([known[attention]] if attention in known else [])}
        answers[attention] = min(
            (_answer(layout, scores, surrogate, cost, weight, scored_ratios) for layout in candidates),
            key=lambda answer: answer.tradeoff,
        )
    held = _held_between_scored(answers, _best_of_each_ratio(scores), weight)
    return sorted(held, key=lambda answer: (answer.evidence == "extrapolated", answer.tradeoff))


def _answer(
    layout: Layout,
    scores: Mapping[Layout, float],
    surrogate: Surrogate,
    cost: LinearCost,
    weight: float,
    scored_ratios: Collection[int],
) -> Answer:
    [mean], [deviation] = surrogate.predict([layout])
    evidence: Evidence = "predicted" if layout.num_attention in scored_ratios else "extrapolated"
    kl, spread = float(np.exp(mean)), float(np.exp(_INTERVAL_90 * deviation))
    if layout in scores:
        evidence, kl, spread = "scored", scores[layout], 1.0
    return Answer(
        layout, kl, kl / spread, kl * spread, evidence, cost.of(layout), _tradeoff(kl, cost.of(layout), weight)
    )


def _tradeoff(kl: float, cost: float, weight: float) -> float:
    return float(np.log(max(kl, 1e-8))) + weight * cost


def _best_of_each_ratio(scores: Mapping[Layout, float]) -> dict[int, float]:
    best: dict[int, float] = {}
    for layout, kl in scores.items():
        best[layout.num_attention] = min(kl, best.get(layout.num_attention, kl))
    return best


def _held_between_scored(
    answers: Mapping[int, Answer], best_scored: Mapping[int, float], weight: float
) -> list[Answer]:
    """Extrapolations moved between the lowest KL scored with more attention and that with less; among themselves they
    never fall where attention does. What was scored, or predicted beside scores, stays as it is."""
    held: list[Answer] = []
    at_least = 0.0
    for attention in sorted(answers, reverse=True):
        answer = answers[attention]
        if answer.evidence == "extrapolated":
            at_least = max([at_least, *(kl for count, kl in best_scored.items() if count > attention)])
            at_most = min((kl for count, kl in best_scored.items() if count < attention), default=np.inf)
            # Where the scores themselves contradict each other the floor counts: it promises less.
            at_most = max(at_most, at_least)
            kl, low, high = (float(np.clip(x, at_least, at_most)) for x in (answer.kl, answer.kl_low, answer.kl_high))
            answer = replace(answer, kl=kl, kl_low=low, kl_high=high, tradeoff=_tradeoff(kl, answer.cost, weight))
            at_least = kl
        held.append(answer)
    return held
