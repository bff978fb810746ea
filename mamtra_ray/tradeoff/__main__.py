"""Verb ``tradeoff``: the best layout under a cost bound or a weight on the cost, from the probe's scores."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mamtra_ray.errors import InputError, exit_code_2_on_input_error, nearest_name
from mamtra_ray.run.names import CONFIG

COSTS = ("cache_bytes", "decode_flops", "parameters")
_DESCRIPTION = """Which layout is best under a cost bound, a weight on the cost, or other constraints?

Answers from the scores that ``probe`` or ``search`` left in a run folder, without computing new ones: scored layouts by
their KL divergence, all others by the surrogate, for every allowed number of attention layers. Costs are exact. :

    python -m mamtra_ray.tradeoff --run runs/demo --max-cost 0.6            at most 60 % of the teacher's cache
    python -m mamtra_ray.tradeoff --run runs/demo --cost decode_flops --weight 2
    python -m mamtra_ray.tradeoff --run runs/demo --max-attention 4 --keep-attention 0

Ratios of which no layout was scored are extrapolations: they are marked, and ranked below all others.
"""


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.tradeoff",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder with probe.parquet")
    parser.add_argument("--cost", default="cache_bytes", help=f"one of {', '.join(COSTS)} (default: cache_bytes)")
    parser.add_argument("--context-length", type=int, help="tokens (default: the run's context_length)")
    parser.add_argument("--max-cost", type=float, help="largest cost, as a fraction of the teacher's")
    parser.add_argument("--weight", type=float, default=0.0, help="log KL that the teacher's whole cost is worth")
    parser.add_argument("--min-attention", type=int, default=0, help="fewest attention layers")
    parser.add_argument("--max-attention", type=int, help="most attention layers (default: one Mamba layer)")
    parser.add_argument("--keep-attention", type=int, nargs="*", default=[], metavar="LAYER")
    parser.add_argument("--always-mamba", type=int, nargs="*", default=[], metavar="LAYER")
    options = parser.parse_args(arguments)
    if options.cost not in COSTS:
        raise InputError(f"unknown cost {options.cost!r}: {nearest_name(options.cost, COSTS)}")

    from mamtra_ray.layouts.constraints import Constraints
    from mamtra_ray.run.folder import read_run
    from mamtra_ray.runtime.progress import table
    from mamtra_ray.tradeoff.tradeoff import best_by_ratio, relative_cost

    run = read_run(options.run)
    if run.architecture is None or not run.probe:
        raise InputError(f"{options.run} holds no scores of layouts; python -m mamtra_ray.probe makes them")
    context = options.context_length or run.config.context_length
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
    scores = {row.layout: row.kl for row in run.probe}
    answers = best_by_ratio(scores, constraints, cost, options.weight)
    rows = [
        [
            answer.layout.ratio,
            answer.layout,
            f"{answer.kl:.4f}",
            "scored"
            if answer.evidence == "scored"
            else f"{answer.evidence} [{answer.kl_low:.4f}, {answer.kl_high:.4f}]",
            f"{answer.cost:.1%}",
            f"{answer.tradeoff:.3f}",
        ]
        for answer in answers
    ]
    print(f"{len(scores)} scored layouts; {options.cost} at {context:,} tokens as a share of the teacher's")
    print(table(["ratio", "layout", "KL", "90 %", options.cost, "log KL + weight x cost"], rows))
    best = answers[0]
    if best.evidence == "extrapolated":
        count = best.layout.num_attention
        print(f"\nno allowed ratio has scores; to score {best.layout.ratio} first, in a run of its own:")
        print(
            f"python -m mamtra_ray.probe --space {options.run / CONFIG} --run {options.run}-{count}-attention "
            f"search.ratios={best.layout.ratio}"
        )
        return 0
    print(f"\nto train one: python -m mamtra_ray.distill --run {options.run} --layout {best.layout}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
