"""How good are the layouts that a number of forward-only scores finds, and at which cost?

    python benchmarks/search_quality.py            the demo teacher; about an hour on two cores
    python benchmarks/search_quality.py --quick    few tokens, one seed; nothing written

1. Truth: the KL divergence of all 2^12 layouts with aligned mixers, by forward passes (resumable).
2. Search: the best layout that each method finds with the same number of scores, over three budgets together, as
   regret: its KL over the best possible, minus 1. And how well models of the score predict the layouts not scored.
3. Cost: seconds of one score, with and without shared prefixes, beside the seconds of a short distillation.

`benchmarks/proxy_quality.py` asks the other question: whether these scores predict what distillation ends in.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib

import numpy as np
from measurement import LONG_DEMO, print_table, quartiles, write_result
from scipy.stats import spearmanr
from search_methods import Method, Scores, SpentError, additive_costs, methods

from mamtra_ray.align.mixer_library import load_library
from mamtra_ray.align.phase import make_library
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints, sample_layouts
from mamtra_ray.probe.layout_scoring import LayoutScorer
from mamtra_ray.probe.phase import probe_data
from mamtra_ray.probe.pool import ProbePool, first_utterances
from mamtra_ray.run.open_run import open_run
from mamtra_ray.run.session import Session, start_session
from mamtra_ray.search.importance import layer_importance
from mamtra_ray.surrogate.acquisition import fit_log
from mamtra_ray.teacher_cache.batches import batches
from mamtra_ray.teacher_cache.phase import make_cache
from mamtra_ray.teacher_cache.shared import SharedCache

RATIOS = ("1:1", "1:2", "1:3")
EVALUATIONS = (100, 200, 400, 600)
QUICK = [
    "corpus.train_tokens=20000",
    "corpus.validation_tokens=600",
    "align.tokens=10000",
    "probe.validation_tokens=300",
]


def every_layout(num_layers: int) -> list[Layout]:
    """All 2^L layouts."""
    return [
        Layout(format(bits, f"0{num_layers}b").replace("0", "A").replace("1", "M")) for bits in range(2**num_layers)
    ]


def exhaustive_truth(session: Session, library: Path, validation: SharedCache) -> dict[Layout, float]:
    """KL of every layout; scores are kept in the run folder."""
    every = every_layout(session.num_layers)
    with (
        session.screen.phase("truth", f"{len(every)} layouts by forward passes"),
        ProbePool(probe_data(session, library, validation), session.folder, session.worker) as pool,
    ):
        new = [layout for layout in every if layout not in pool.rows]
        for done in pool.score(new, layouts_per_task=64):
            session.screen.count(done, len(new), "layouts")
        return {layout: pool.rows[layout].kl for layout in every}


def importances(session: Session, library: Path, validation: SharedCache) -> list[list[float]]:
    """One score a layer by each of the paper's two criteria."""
    data = probe_data(session, library, validation)
    return [
        layer_importance(criterion, session.config, session.folder, data, session.worker)
        for criterion in ("wer", "cosine")
    ]


def search_rows(
    methods: Mapping[str, Method],
    truth: Mapping[Layout, float],
    budgets: Mapping[str, Constraints],
    evaluations: Sequence[int],
    seeds: int,
) -> list[dict[str, Any]]:
    """Regret of every method at every budget and number of scores, median and quartiles over the seeds."""
    best = {ratio: min(kl for x, kl in truth.items() if c.allows(x)) for ratio, c in budgets.items()}
    rows = []
    for name, method in methods.items():
        for limit in evaluations:
            began = time.process_time()
            regrets: dict[str, list[float]] = {ratio: [] for ratio in budgets}
            for seed in range(seeds):
                scores = Scores(truth, limit)
                with contextlib.suppress(SpentError):
                    method(scores, list(budgets.values()), seed)
                for ratio, constraints in budgets.items():
                    found = [kl for layout, kl in scores.known.items() if constraints.allows(layout)]
                    regrets[ratio].append(min(found, default=np.inf) / best[ratio] - 1)
            seconds = (time.process_time() - began) / seeds
            for ratio, values in regrets.items():
                finite = [min(value, 1e3) for value in values]
                median, low, high = quartiles(finite)
                rows.append(
                    {
                        "method": name,
                        "scores": limit,
                        "budget": ratio,
                        "median regret": median,
                        "lower quartile": low,
                        "upper quartile": high,
                        "optimum found": float(np.mean([value == 0 for value in values])),
                        "CPU s of the method": round(seconds, 2),
                    }
                )
            print(f"{name}, {limit} scores: {seconds:.1f} CPU s a seed", flush=True)
    return rows


def prediction_rows(
    truth: Mapping[Layout, float], budgets: Mapping[str, Constraints], evaluations: Sequence[int], seeds: int
) -> list[dict[str, Any]]:
    """Spearman correlation, inside each budget, of predicted and true scores of layouts that were not scored."""
    num_layers = next(iter(truth)).num_layers
    single = additive_costs(truth.__getitem__, num_layers)
    rows = []
    for limit in evaluations:
        found: dict[tuple[str, str], list[float]] = {}
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            scored = [x for c in budgets.values() for x in sample_layouts(c, limit // len(budgets), rng)]
            model = fit_log({layout: truth[layout] for layout in scored})
            for ratio, constraints in budgets.items():
                others = [layout for layout in truth if constraints.allows(layout) and layout not in set(scored)]
                if len(others) < 10:
                    continue
                actual = [truth[layout] for layout in others]
                sums = [sum(single[i] for i in layout.mamba_layers) for layout in others]
                for name, predicted in (("surrogate", model.predict(others)[0]), ("replace-one sums", sums)):
                    found.setdefault((name, ratio), []).append(float(spearmanr(predicted, actual).statistic))
        for (name, ratio), values in found.items():
            median, low, high = quartiles(values)
            rows.append(
                {
                    "model": name,
                    "scores": limit if name == "surrogate" else num_layers,
                    "budget": ratio,
                    "median Spearman": median,
                    "lower quartile": low,
                    "upper quartile": high,
                }
            )
    return rows


def cost_rows(session: Session, library: Path, validation: SharedCache, layouts: int) -> list[dict[str, Any]]:
    """CPU seconds of one score in this process."""
    teacher, config = session.teacher, session.config
    mixers = load_library(library, teacher_fingerprint=teacher.fingerprint)
    held_out = first_utterances(validation, config.probe.validation_tokens)
    made = list(batches(held_out, teacher.sequence, tokens_per_batch=4096, seed=0, epoch=0))
    import torch

    scorer = LayoutScorer(teacher.model, mixers, config.student.state_sharing, torch.device("cpu"))
    rng = np.random.default_rng(0)
    chosen = sorted(sample_layouts(Constraints.from_ratio(session.num_layers, "1:1"), layouts, rng))
    rows = []
    for name, tasks, share in (
        ("one by one", [chosen], False),
        ("prefixes shared in tasks of 8", [chosen[i : i + 8] for i in range(0, len(chosen), 8)], True),
        ("prefixes shared by all", [chosen], True),
    ):
        began = time.process_time()
        for task in tasks:
            scorer.score(task, made, share_prefixes=share)
        seconds = (time.process_time() - began) / len(chosen)
        rows.append({"scoring": name, "layouts": len(chosen), "CPU s a layout": seconds})
    for row in rows:
        row["of one by one"] = row["CPU s a layout"] / rows[0]["CPU s a layout"]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tokens, one seed, nothing is written")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--space", help="search-space file (default: the packaged demo)")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/search_quality)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    overrides = [*([] if options.space else LONG_DEMO), *(QUICK if options.quick else []), *options.overrides]
    seeds = 1 if options.quick else options.seeds
    folder = options.run or Path("runs") / ("search_quality_quick" if options.quick else "search_quality")
    run = open_run(options.space, folder, overrides)
    session = start_session(run, ("cache", "align", "truth"), None)
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    assert library is not None
    truth = exhaustive_truth(session, library, validation)
    budgets = {ratio: Constraints.from_ratio(session.num_layers, ratio) for ratio in RATIOS}
    evaluations = EVALUATIONS[:2] if options.quick else EVALUATIONS
    every_method = methods(importances(session, library, validation))
    found = search_rows(every_method, truth, budgets, evaluations, seeds)
    predicted = prediction_rows(truth, budgets, evaluations, seeds)
    cost = cost_rows(session, library, validation, layouts=16 if options.quick else 64)
    for rows in (found, predicted, cost):
        print()
        print_table(rows)
    if not options.quick:
        best = {ratio: min((x for x in truth if c.allows(x)), key=truth.__getitem__) for ratio, c in budgets.items()}
        write_result(
            "search_quality",
            found,
            predictions=predicted,
            cost=cost,
            optima={ratio: {"layout": str(layout), "kl": truth[layout]} for ratio, layout in best.items()},
            seeds=seeds,
            validation_tokens=run.config.probe.validation_tokens,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
