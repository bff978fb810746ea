"""How good are the layouts that a number of forward-only scores finds, and at which cost?

    python benchmarks/search_quality.py                   the demo teacher; about an hour on two cores
    python benchmarks/search_quality.py --space demo24    the deep teacher, whose 2^24 layouts nobody has scored
    python benchmarks/search_quality.py --quick           few tokens, one seed; nothing written

1. Truth: the KL divergence of a layout with aligned mixers, by forward passes (resumable). Of 12 layers all 2^12
   layouts are scored. Of more layers those that a method asks for; the best known one of all stands for the optimum.
2. Search: the best layout that each method finds with the same number of scores, over three budgets together, as
   regret: its KL over the best, minus 1. Methods that train (``trained_selection.py``) stand beside what they cost in
   CPU seconds. And how well models of the score predict the layouts not scored.
3. Cost: seconds of one score, with and without shared prefixes.

`benchmarks/proxy_quality.py` asks the other question: whether these scores predict what distillation ends in.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from layout_scores import ScoredOnDemand, TimedScores, cost_rows, exhaustive_truth, known_scores, made_batches
from measurement import LONG_DEMO, print_table, quartiles, write_result
from scipy.stats import spearmanr
from search_methods import Method, SpentError, Truth, additive_costs, from_importance, methods
from trained_selection import Selection, trained_selections

from mamtra_ray.align.mixer_library import load_library, read_library_manifest
from mamtra_ray.align.phase import make_library
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints
from mamtra_ray.probe.layout_scoring import LayoutScorer
from mamtra_ray.probe.phase import probe_data
from mamtra_ray.run.open_run import open_run
from mamtra_ray.run.session import Session, start_session
from mamtra_ray.search.importance import layer_importance
from mamtra_ray.surrogate.acquisition import fit_log
from mamtra_ray.teacher_cache.phase import make_cache
from mamtra_ray.teacher_cache.shared import SharedCache

RATIOS = {12: ("1:1", "1:2", "1:3"), 24: ("1:1", "1:3", "1:11"), 30: ("1:1", "1:2", "1:4")}
"""By the teacher's layers."""
EVALUATIONS = {12: (100, 200, 400, 600), 24: (100, 300), 30: (100,)}
MOST_LAYERS_OF_A_TABLE = 12
WITHOUT_CHANCE = ("additive", "alignment error", "beam", "greedy restore", "paper")
QUICK = [
    "corpus.train_tokens=20000",
    "corpus.validation_tokens=600",
    "align.tokens=10000",
    "probe.validation_tokens=300",
]


def importances(session: Session, library: Path, validation: SharedCache) -> list[list[float]]:
    """One score a layer by each of the paper's two criteria."""
    data = probe_data(session, library, validation)
    return [
        layer_importance(criterion, session.config, session.folder, data, session.worker)
        for criterion in ("wer", "cosine")
    ]


@dataclass(frozen=True)
class Found:
    """The best layouts that one method found with so many scores, one of each seed, at one budget."""

    method: str
    scores: int
    ratio: str
    layouts: list[Layout]
    kl: list[float]
    cpu_seconds: float
    """Of one seed, all budgets together: the method's own, not that of the scores."""


def search(
    methods: Mapping[str, Method],
    truth: Truth,
    budgets: Mapping[str, Constraints],
    evaluations: Sequence[int],
    seeds: int,
) -> list[Found]:
    """Every method with every number of scores."""
    found = []
    for name, method in methods.items():
        # Optuna's Gaussian process takes a second and more to propose one layout.
        for limit in evaluations[:1] if name == "gp" else evaluations:
            best: dict[str, list[tuple[float, Layout]]] = {ratio: [] for ratio in budgets}
            seconds = 0.0
            for seed in range(1 if name in WITHOUT_CHANCE else min(seeds, 3) if name == "gp" else seeds):
                scores = TimedScores(truth, limit)
                began = time.process_time()
                with contextlib.suppress(SpentError):
                    method(scores, list(budgets.values()), seed)
                seconds += time.process_time() - began - scores.seconds
                for ratio, constraints in budgets.items():
                    known = [(kl, layout) for layout, kl in scores.known.items() if constraints.allows(layout)]
                    best[ratio] += [min(known)] if known else []
            for ratio, pairs in best.items():
                layouts, values = [layout for _, layout in pairs], [kl for kl, _ in pairs]
                found.append(Found(name, limit, ratio, layouts, values, seconds / max(1, len(pairs))))
            print(f"{name}, {limit} scores: {seconds:.1f} CPU s", flush=True)
    return found


def regret_rows(found: Sequence[Found], best: Mapping[str, float]) -> list[dict[str, Any]]:
    """Regret of every method at every budget and number of scores, median and quartiles over the seeds."""
    rows = []
    for one in found:
        regrets = [kl / best[one.ratio] - 1 for kl in one.kl]
        if not regrets:
            continue
        median, low, high = quartiles(regrets)
        rows.append(
            {
                "method": one.method,
                "scores": one.scores,
                "budget": one.ratio,
                "median regret": median,
                "lower quartile": low,
                "upper quartile": high,
                "optimum found": float(np.mean([value == 0 for value in regrets])),
                "CPU s of the method": round(one.cpu_seconds, 2),
                "layout": str(one.layouts[0]),
            }
        )
    return rows


def trained_rows(
    selections: Mapping[str, Mapping[str, Selection]],
    truth: Truth,
    budgets: Mapping[str, Constraints],
    best: Mapping[str, float],
    seconds_of_a_score: float,
) -> list[dict[str, Any]]:
    """The one layout of each method that trains, with its cost in scores' worth of CPU seconds."""
    rows = []
    for method, by_ratio in selections.items():
        for ratio, selection in by_ratio.items():
            layout = from_importance(selection.importance, budgets[ratio])
            rows.append(
                {
                    "method": method,
                    "budget": ratio,
                    "regret": truth[layout] / best[ratio] - 1,
                    "training tokens": selection.tokens,
                    "CPU s": round(selection.cpu_seconds, 1),
                    "worth scores": round(selection.cpu_seconds / seconds_of_a_score),
                    "layout": str(layout),
                }
            )
    return rows


def prediction_rows(
    truth: Mapping[Layout, float],
    singles: Sequence[float],
    budgets: Mapping[str, Constraints],
    evaluations: Sequence[int],
    seeds: int,
) -> list[dict[str, Any]]:
    """Spearman correlation, inside each budget, of predicted and known scores of layouts that were not scored.

    Args:
        truth: the known scores.
        singles: of the layouts with one Mamba layer.
        budgets, evaluations, seeds: as of :func:`search`.
    """
    rows = []
    for limit in evaluations:
        found: dict[tuple[str, str], list[float]] = {}
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            scored: set[Layout] = set()
            for constraints in budgets.values():
                # Sorted, since the order of a file is that of the methods.
                known = sorted(layout for layout in truth if constraints.allows(layout))
                picked = rng.choice(len(known), size=min(limit // len(budgets), len(known)), replace=False)
                scored |= {known[index] for index in picked}
            model = fit_log({layout: truth[layout] for layout in sorted(scored)})
            for ratio, constraints in budgets.items():
                others = [layout for layout in truth if constraints.allows(layout) and layout not in scored]
                if len(others) < 10:
                    continue
                actual = [truth[layout] for layout in others]
                sums = [sum(singles[i] for i in layout.mamba_layers) for layout in others]
                for name, predicted in (("surrogate", model.predict(others)[0]), ("replace-one sums", sums)):
                    found.setdefault((name, ratio), []).append(float(spearmanr(predicted, actual).statistic))
        for (name, ratio), values in found.items():
            median, low, high = quartiles(values)
            rows.append(
                {
                    "model": name,
                    "scores": limit if name == "surrogate" else len(singles),
                    "budget": ratio,
                    "median Spearman": median,
                    "lower quartile": low,
                    "upper quartile": high,
                }
            )
    return rows


def options_of(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tokens, one seed, nothing is written")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--methods", help="names with commas between (default: all)")
    parser.add_argument("--no-training", action="store_true", help="leave out the methods that train")
    parser.add_argument("--known", type=Path, help="run folder of a search whose probe scores are known already")
    parser.add_argument("--space", default="demo", help="search-space file (default: the packaged demo)")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/search_quality_SPACE)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    options = options_of()
    is_demo, name = options.space == "demo", f"search_quality_{Path(options.space).stem}"
    overrides = [*(LONG_DEMO if is_demo else []), *(QUICK if options.quick else []), *options.overrides]
    seeds = 1 if options.quick else options.seeds
    run = open_run(options.space, options.run or Path("runs") / f"{name}{'_quick' if options.quick else ''}", overrides)
    session = start_session(run, ("cache", "align", "truth"), None)
    config, num_layers = session.config, session.num_layers
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    assert library is not None
    torch.set_num_threads(1)
    mixers = load_library(library, teacher_fingerprint=session.teacher.fingerprint)
    scorer = LayoutScorer(session.teacher.model, mixers, config.student.state_sharing, torch.device("cpu"))
    held_out = made_batches(validation, session, config.probe.validation_tokens, 4096)
    budgets = {ratio: Constraints.from_ratio(num_layers, ratio) for ratio in RATIOS[num_layers]}
    evaluations = EVALUATIONS[num_layers][: 1 if options.quick else None]

    is_table = num_layers <= MOST_LAYERS_OF_A_TABLE
    on_demand = ScoredOnDemand(scorer, held_out, session.folder / "scores.jsonl")
    if options.known is not None:
        on_demand.known |= known_scores(options.known, session, library, validation)
    truth = exhaustive_truth(session, library, validation) if is_table else on_demand
    cost = cost_rows(scorer, held_out, num_layers, layouts=16 if options.quick or not is_table else 64)

    errors = read_library_manifest(library).errors
    asked = options.methods.split(",") if options.methods else None
    # Measuring them takes longer than most methods.
    measured = importances(session, library, validation) if asked is None or "paper" in asked else []
    every = methods(measured, [errors[layer] for layer in range(num_layers)])
    names = asked or list(every)
    found = search({name: every[name] for name in names}, truth, budgets, evaluations, seeds)
    selections = {} if options.no_training else trained_selections(session, scorer, train, validation, library, budgets)
    singles = additive_costs(truth.__getitem__, num_layers)
    for selection in selections.values():
        for ratio, one in selection.items():
            truth[from_importance(one.importance, budgets[ratio])]  # scored before the best known one is chosen

    known = truth if isinstance(truth, dict) else on_demand.known
    best = {ratio: min((kl, x) for x, kl in known.items() if c.allows(x)) for ratio, c in budgets.items()}
    lowest = {ratio: kl for ratio, (kl, _) in best.items()}
    rows = regret_rows(found, lowest)
    trained = trained_rows(selections, truth, budgets, lowest, cost[0]["CPU s a layout"])
    predicted = prediction_rows(known, singles, budgets, evaluations, seeds)
    for table in (rows, trained, predicted, cost):
        print()
        print_table(table)
    if not options.quick:
        write_result(
            name,
            rows,
            trained=trained,
            predictions=predicted,
            cost=cost,
            optima={ratio: {"layout": str(layout), "kl": kl} for ratio, (kl, layout) in best.items()},
            scored=len(known),
            every_layout_scored=is_table,
            seeds=seeds,
            validation_tokens=run.config.probe.validation_tokens,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
