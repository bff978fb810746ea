"""Verb ``tradeoff``: which layout is best under a cost bound, a weight on the cost, or other constraints?

Answers from the scores that ``probe`` or ``search`` left in a run folder, without computing new ones: scored layouts by
their KL divergence, all others by the surrogate, for every allowed number of attention layers. Costs are exact. ::

    python -m mamtra_ray.tradeoff --run runs/demo --max-cost 0.6            at most 60 % of the teacher's cache
    python -m mamtra_ray.tradeoff --run runs/demo --cost decode_flops --weight 2
    python -m mamtra_ray.tradeoff --run runs/demo --max-attention 4 --keep-attention 0

Budgets far from those that were probed are extrapolations; their intervals say so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mamtra_ray import efficiency
from mamtra_ray.acquisition import fit_log
from mamtra_ray.constraints import Constraints, LinearCost
from mamtra_ray.efficiency_architectures import Architecture
from mamtra_ray.errors import InputError, exit_code_2_on_input_error, nearest_name
from mamtra_ray.layouts import Layout
from mamtra_ray.optimum import best_layouts
from mamtra_ray.progress import table
from mamtra_ray.run_folder import read_run

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
    whole = COSTS[name](architecture, Layout("A" * architecture.num_layers), context_length)
    return LinearCost.from_function(
        name, lambda layout: COSTS[name](architecture, layout, context_length) / whole, architecture.num_layers
    )


def best_by_budget(
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
            known.setdefault(len(layout.attention_layers), layout)
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


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.tradeoff",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder with probe.parquet")
    parser.add_argument("--cost", default="cache_bytes", help=f"one of {', '.join(COSTS)} (default: cache_bytes)")
    parser.add_argument("--context-length", type=int, help="tokens (default: the run's search.context_length)")
    parser.add_argument("--max-cost", type=float, help="largest cost, as a fraction of the teacher's")
    parser.add_argument("--weight", type=float, default=0.0, help="log KL that the teacher's whole cost is worth")
    parser.add_argument("--min-attention", type=int, default=0, help="fewest attention layers")
    parser.add_argument("--max-attention", type=int, help="most attention layers (default: one Mamba layer)")
    parser.add_argument("--keep-attention", type=int, nargs="*", default=[], metavar="LAYER")
    parser.add_argument("--always-mamba", type=int, nargs="*", default=[], metavar="LAYER")
    options = parser.parse_args(arguments)
    run = read_run(options.run)
    if run.architecture is None or not run.probe:
        raise InputError(f"{options.run} holds no scores of layouts; python -m mamtra_ray.probe makes them")
    context = options.context_length or run.config.search.context_length
    cost = relative_cost(run.architecture, options.cost, context)
    constraints = Constraints(
        run.architecture.num_layers,
        tuple(options.keep_attention),
        tuple(options.always_mamba),
        options.min_attention,
        # With every attention kept it is the teacher, no hybrid.
        run.architecture.num_layers - 1 if options.max_attention is None else options.max_attention,
        cost,
        options.max_cost,
    )
    scores = {Layout(row["layout"]): row["kl"] for row in run.probe}
    answers = best_by_budget(scores, constraints, cost, options.weight)
    rows = [
        [
            answer.layout.ratio,
            answer.layout,
            f"{answer.kl:.4f}",
            "scored" if answer.scored else f"predicted [{answer.kl_low:.4f}, {answer.kl_high:.4f}]",
            f"{answer.cost:.1%}",
            f"{answer.tradeoff:.3f}",
        ]
        for answer in answers
    ]
    print(f"{len(scores)} scored layouts; {options.cost} at {context:,} tokens as a share of the teacher's")
    print(table(["ratio", "layout", "KL", "90 %", options.cost, "log KL + weight x cost"], rows))
    print(f"\nto train one: python -m mamtra_ray.distill --run {options.run} --layout {answers[0].layout}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
