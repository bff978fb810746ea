"""The paper's grid, initializations and loss ablation on the demo teacher: Tables 1, 2 and 4, Figures 3 to 6.

    python benchmarks/paper_grid.py            8 placements at 4 ratios, and 7 runs more; about an hour on one core
    python benchmarks/paper_grid.py --quick    two runs of one layout, few tokens; nothing is written

Runs ``python -m mamtra_ray.search`` once for each thing that differs, in ``runs/paper_grid_*`` (going on with what is
there, so the same command continues a stopped one), then ``python -m mamtra_ray.report`` over all of them. Writes
benchmarks/results/paper_grid.json, and the report's figures and tables to ``docs/paper_grid``.
Scaled down from the paper: 24,000 tokens a placement instead of 15 epochs of 585 hours, from aligned mixers; the
initializations and the losses are compared over 60,000 tokens at one layout. With twelve layers some placements of a
ratio are the same layout; it is trained once.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measurement import print_table, write_result

from mamtra_ray.artifacts import read_json
from mamtra_ray.layouts import PATTERNS, from_strategy
from mamtra_ray.report.report import write_report
from mamtra_ray.run.folder import Run, read_run
from mamtra_ray.run.rows import columns
from mamtra_ray.surrogate.correlations import pearson, spearman

RATIOS = ("1:1", "1:3", "1:5", "1:11")
CRITERIA = ("wer", "cosine")
STRATEGIES = (*PATTERNS, *(f"importance_{criterion}" for criterion in CRITERIA))
ONE_LAYOUT = ["search.ratios=1:1", "search.strategies=block_beginning", "distill.tokens=60000"]
INITIALIZATIONS = ("transfer", "xavier", "kaiming", "aligned")
LOSSES = ("ce", "kl", "hidden")
RUNS = {
    "placements": [
        f"search.ratios={','.join(RATIOS)}", "distill.tokens=24000", f"search.strategies={','.join(STRATEGIES)}",
    ],
    **{f"from_{name}": [*ONE_LAYOUT, f"student.initialization={name}"] for name in INITIALIZATIONS},
    **{
        f"without_{term}": [*ONE_LAYOUT, "student.initialization=transfer", f"distill.{term}_weight=0"]
        for term in LOSSES
    },
}  # fmt: skip
# The placements are finalists whatever their short score, so the trials are as short as can be.
COMMON = [
    "search.sampler=grid", "probe.num_layouts=0", "search.rung_tokens=2000", "distill.workers=1",
    "evaluate.sentences=30", "evaluate.audio_examples=0", "evaluate.temperature=0",
]  # fmt: skip
QUICK = ["distill.tokens=4000", "evaluate.sentences=4"]
DOCS = Path(__file__).parents[1] / "docs" / "paper_grid"
SHOWN_OF_PLACEMENTS = (
    "figure_4_ce_against_wer.png", "figure_4_ce_against_wer.csv", "figure_4_correlations.csv", "table_3_systems.csv",
)  # fmt: skip
SHOWN_OF_ALL = ("figure_6_convergence.png", "figure_6_convergence.csv", "table_4_loss_ablation.csv")
"""What needs training; the other figures follow from shapes alone. The runs that leave out a loss or start elsewhere
are no points of Fig. 4."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two runs of one layout; nothing is written to docs/")
    options = parser.parse_args()
    names = ["from_transfer", "without_kl"] if options.quick else list(RUNS)
    folders = [Path("runs") / f"paper_grid_{'quick_' if options.quick else ''}{name}" for name in names]
    for name, folder in zip(names, folders, strict=True):
        overrides = [*COMMON, *RUNS[name], *(QUICK if options.quick else [])]
        command = ["python", "-m", "mamtra_ray.search", "--run", str(folder), *overrides]
        print(" ".join(command), flush=True)
        subprocess.run([sys.executable, *command[1:]], check=True)
    report = write_report(folders, Path("runs") / "paper_grid.html")
    print(report)
    runs = {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}
    if options.quick:
        print_table(one_layout(runs, names))
        return
    rows = placements(runs["placements"])
    correlated = correlations(rows)
    initializations = one_layout(runs, [f"from_{name}" for name in INITIALIZATIONS])
    losses = one_layout(runs, ["from_transfer", *(f"without_{term}" for term in LOSSES)])
    for table in (rows, correlated, initializations, losses):
        print_table(table)
    write_result(
        "paper_grid",
        rows,
        reference=asdict(reference) if (reference := runs["placements"].reference) else None,
        correlations=correlated,
        initializations=initializations,
        losses=losses,
        seconds={name: sum(phase["seconds"] for phase in run.phases.values()) for name, run in runs.items()},
    )
    shutil.rmtree(DOCS, ignore_errors=True)
    DOCS.mkdir()
    for name in SHOWN_OF_PLACEMENTS:
        shutil.copy(folders[0] / "report" / name, DOCS)
    for name in SHOWN_OF_ALL:
        shutil.copy(report.with_suffix("") / name, DOCS)


def placements(run: Run) -> list[dict[str, Any]]:
    """The 32 configurations of Fig. 4: every placement at every ratio, whichever of them share a layout."""
    finalists = {row.layout: row for row in run.finalists}
    scores = {criterion: read_json(run.path / f"importance_{criterion}.json")["scores"] for criterion in CRITERIA}
    rows = []
    for strategy in STRATEGIES:
        criterion = strategy.removeprefix("importance_")
        for ratio in RATIOS:
            kind = "importance" if criterion in scores else strategy
            num_layers = run.finalists[0].layout.num_layers
            row = columns(finalists[from_strategy(kind, num_layers, ratio, scores.get(criterion))])
            measured = {key: round(row[key], 4) for key in ("ce_start", "ce", "wer", "wer_low", "wer_high", "cer")}
            rows.append({"strategy": strategy, "ratio": ratio, "layout": row["layout"], **measured})
    return rows


def correlations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """CE with WER over distinct layouts, pooled and inside every ratio."""
    distinct = list({row["layout"]: row for row in rows}.values())
    found = []
    for scope in ("all", *RATIOS):
        chosen = [row for row in distinct if scope in ("all", row["ratio"])]
        x, y = [row["ce"] for row in chosen], [row["wer"] for row in chosen]
        found.append({"ratio": scope, "layouts": len(chosen)})
        for name, result in (("pearson", pearson(x, y)), ("spearman", spearman(x, y))):
            values = {name: result.value, f"{name}_low": result.low, f"{name}_high": result.high}
            found[-1] |= {key: None if value is None else round(value, 3) for key, value in values.items()}
    return found


def one_layout(runs: dict[str, Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """Runs of one layout that differ in one setting."""
    keys = ("ce_start", "ce", "kl", "wer", "wer_low", "wer_high", "cer")
    rows = [(name, columns(runs[name].finalists[0])) for name in names]
    return [{"run": name, "layout": row["layout"], **{key: round(row[key], 4) for key in keys}} for name, row in rows]


if __name__ == "__main__":
    main()
