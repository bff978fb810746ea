"""Does the score of a forward pass predict what distillation ends in, and the words that are heard?

    python benchmarks/proxy_quality.py            12 layouts at each of two budgets; about an hour on two cores
    python benchmarks/proxy_quality.py --quick    4 layouts, few tokens and sentences; nothing written

Layouts are spread evenly over the ranking by probe KL, the best one and the paper's patterns among them. Each is
distilled from the library with equal settings, once as long as a trial's last rung ("short") and once, anew, as long as
a finalist ("final"), and speaks the same sentences. Spearman correlations are taken inside each budget, with 95 %
intervals of 2,000 bootstrap samples of the layouts; and between the WERs on two random halves of the sentences, which
says how much of the ranking by WER is noise. Every distilled student is kept in the run folder and not distilled again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import ray
from measurement import LONG_DEMO, print_table, write_result
from scipy.stats import spearmanr

from mamtra_ray.align.phase import make_library
from mamtra_ray.artifacts import read_manifest, write_manifest
from mamtra_ray.distill.job import DistillJob, distill_data
from mamtra_ray.distill.workers import distill
from mamtra_ray.evaluate.evaluation import evaluate_systems
from mamtra_ray.evaluate.results import Evaluation
from mamtra_ray.layouts import PATTERNS, Layout, from_strategy
from mamtra_ray.layouts.constraints import Constraints, sample_layouts
from mamtra_ray.probe.phase import probe_data
from mamtra_ray.probe.pool import ProbePool
from mamtra_ray.run.open_run import open_run
from mamtra_ray.run.session import Session, start_session
from mamtra_ray.runtime.device import device_of_this_process
from mamtra_ray.teacher_cache.phase import make_cache

RATIOS = ("1:1", "1:3")
SCORES = ("probe KL", "probe CE", "short CE", "final CE", "WER")
QUICK = [
    "corpus.train_tokens=20000",
    "corpus.validation_tokens=600",
    "align.tokens=10000",
    "probe.validation_tokens=300",
    "distill.tokens=3000",
    "evaluate.sentences=2",
    "evaluate.audio_examples=0",
]
_PROBED = 200


def chosen_layouts(kl: dict[Layout, float], patterns: Sequence[Layout], count: int) -> list[Layout]:
    """The best layout, the patterns, and others evenly over the ranking; ``count`` in all."""
    ranked = sorted(kl, key=kl.__getitem__)
    chosen = list(dict.fromkeys([ranked[0], *patterns]))[:count]
    rest = [layout for layout in ranked if layout not in chosen]
    places = np.linspace(0, len(rest) - 1, count - len(chosen)).round().astype(int)
    return [*chosen, *(rest[place] for place in places)]


@ray.remote(max_retries=1)
def distilled(job: DistillJob, rung_tokens: tuple[int, ...], folder: str) -> dict[str, Any]:
    """Distill on one process, short and then anew to the end, and keep the final student."""
    device = device_of_this_process()
    *_, (short, _) = distill(dataclasses.replace(job, report_at=rung_tokens), device)
    *_, (final, training) = distill(job, device)
    training.student.save(Path(folder) / "student")
    content = {"short CE": short.ce, "final CE": final.ce, "final KL": final.kl, "seconds": final.seconds}
    write_manifest(Path(folder) / "report.json", "distilled", 1, {"layout": str(job.layout)}, report=content)
    return content


def bootstrap_spearman(x: Sequence[float], y: Sequence[float], samples: int = 2_000) -> tuple[float, float, float]:
    """(correlation, lower, upper) with a 95 % percentile interval over resampled layouts."""
    rng, x_N, y_N = np.random.default_rng(0), np.array(x), np.array(y)
    values = []
    for _ in range(samples):
        rows = rng.integers(len(x_N), size=len(x_N))
        if np.ptp(x_N[rows]) > 0 and np.ptp(y_N[rows]) > 0:
            values.append(spearmanr(x_N[rows], y_N[rows]).statistic)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(spearmanr(x_N, y_N).statistic), float(low), float(high)


def agreement_of_halves(evaluations: Sequence[Evaluation], samples: int = 1_000) -> float:
    """Median Spearman correlation of the systems' WERs on one half of the sentences with those on the other half."""
    columns = ("word_errors", "words")
    errors_SN, words_SN = (np.array([[row[name] for row in e.rows] for e in evaluations]) for name in columns)
    rng, values = np.random.default_rng(0), []
    for _ in range(samples):
        halves = np.array_split(rng.permutation(errors_SN.shape[1]), 2)
        first, second = (errors_SN[:, half].sum(1) / words_SN[:, half].sum(1) for half in halves)
        values.append(spearmanr(first, second).statistic)
    return float(np.median(values))


def measured_layouts(session: Session, layouts_per_budget: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Probe, distill and hear; one row a layout, and one a budget with what limits any prediction of the WER."""
    config = session.config
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    assert library is not None
    rows: dict[Layout, dict[str, Any]] = {}
    with (
        session.screen.phase("probe", f"{_PROBED} layouts of each budget"),
        ProbePool(probe_data(session, library, validation), session.folder, session.worker) as pool,
    ):
        for ratio in RATIOS:
            budget = Constraints.from_ratio(session.num_layers, ratio)
            drawn = sample_layouts(budget, _PROBED, np.random.default_rng(0))
            patterns = [from_strategy(name, session.num_layers, ratio) for name in PATTERNS]
            for done in pool.score([layout for layout in {*drawn, *patterns} if layout not in pool.rows], 32):
                session.screen.count(done, _PROBED, "layouts")
            kl = {layout: row.kl for layout, row in pool.rows.items() if budget.allows(layout)}
            for layout in chosen_layouts(kl, patterns, layouts_per_budget):
                pattern = PATTERNS[patterns.index(layout)] if layout in patterns else ""
                scored = {"probe KL": kl[layout], "probe CE": pool.rows[layout].ce}
                rows[layout] = {"budget": ratio, "layout": str(layout), "pattern": pattern, **scored}
    with session.screen.phase("distill", f"{len(rows)} layouts, {config.distill.tokens:,} tokens each"):
        data = distill_data(config, session.shared_teacher, train, validation, str(library.resolve()))
        folders = {layout: session.folder.resolve() / "distilled" / str(layout) for layout in rows}
        missing = [layout for layout, folder in folders.items() if not (folder / "report.json").exists()]
        running = []
        for layout in missing:
            job = DistillJob(layout, config.distill, config.student, data, (config.distill.tokens,), config.seed)
            running.append(distilled.remote(job, config.search.rung_tokens, str(folders[layout])))
        for done in range(len(running)):
            [_], running = ray.wait(running, num_returns=1)
            session.screen.count(done + 1, len(missing), "layouts")
    with session.screen.phase("speech", f"{config.evaluate.sentences} sentences by each"):
        systems: dict[str, Path | None] = {str(layout): folder / "student" for layout, folder in folders.items()}
        heard = evaluate_systems(
            config,
            systems,
            session.folder,
            teacher=session.shared_teacher,
            worker=session.worker,
            on_progress=lambda d, t: session.screen.count(d, t, "utterances"),
        )
    for layout, row in rows.items():
        row |= read_manifest(folders[layout] / "report.json", "distilled", 1)["report"]
        row["WER"] = heard[str(layout)].wer.value
    limits = []
    for ratio in RATIOS:
        half = agreement_of_halves([heard[row["layout"]] for row in rows.values() if row["budget"] == ratio])
        # Spearman-Brown: agreement of two measurements with all sentences; its root bounds any predictor.
        limits.append({"budget": ratio, "WER of two halves": half, "best possible": (2 * half / (1 + half)) ** 0.5})
    return list(rows.values()), limits


def correlations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spearman of every pair of scores inside each budget."""
    found = []
    for ratio in RATIOS:
        of_budget = [row for row in rows if row["budget"] == ratio]
        for first, second in itertools.combinations(SCORES, 2):
            value, low, high = bootstrap_spearman([r[first] for r in of_budget], [r[second] for r in of_budget])
            found.append(
                {"budget": ratio, "of": first, "with": second, "layouts": len(of_budget), "Spearman": value}
                | {"95 % low": low, "95 % high": high}
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layouts, few tokens; nothing is written")
    parser.add_argument("--layouts", type=int, default=12, help="of each budget")
    parser.add_argument("--space", help="search-space file (default: the packaged demo)")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/proxy_quality)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    overrides = [*([] if options.space else LONG_DEMO), *(QUICK if options.quick else []), *options.overrides]
    folder = options.run or Path("runs") / ("proxy_quality_quick" if options.quick else "proxy_quality")
    run = open_run(options.space, folder, overrides)
    session = start_session(run, ("cache", "align", "probe", "distill", "speech"), None)
    rows, limits = measured_layouts(session, 4 if options.quick else options.layouts)
    found = correlations(rows)
    print_table(rows)
    print()
    print_table(found)
    print()
    print_table(limits)
    if not options.quick:
        write_result(
            "proxy_quality", rows, correlations=found, limits=limits, distilled_tokens=run.config.distill.tokens
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
