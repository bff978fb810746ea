"""The paper's grid, initialisations and loss ablation on the demo teacher: Tables 1, 2 and 4, Figures 3 to 6.

    python benchmarks/paper_grid.py            8 placements at 4 ratios, and 7 runs more; about an hour on 2 cores
    python benchmarks/paper_grid.py --quick    one placement at one ratio, few tokens; nothing is written

Runs ``python -m mamtra_ray.search`` once for each thing that differs, in ``runs/paper_grid_*`` (going on with what is
there), then ``python -m mamtra_ray.report`` over all of them. Its PNG and CSV files go to ``docs/paper_grid``.
Scaled down from the paper: 40,000 tokens a placement instead of 15 epochs of 585 hours, from aligned mixers; the
initialisations and the losses are compared over 80,000 tokens at one layout.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from mamtra_ray.layouts import PATTERNS
from mamtra_ray.report import write_report

GRID = ["search.ratios=1:1,1:3,1:5,1:11", "distill.tokens=24000"]
ONE_LAYOUT = ["search.ratios=1:1", "search.strategies=block_beginning", "distill.tokens=60000"]
RUNS = {
    "placements": [*GRID, f"search.strategies={','.join([*PATTERNS, 'importance_wer', 'importance_cosine'])}"],
    **{
        f"from_{initialisation}": [*ONE_LAYOUT, f"student.initialisation={initialisation}"]
        for initialisation in ("transfer", "xavier", "kaiming", "aligned")
    },
    **{
        f"without_{term}": [*ONE_LAYOUT, "student.initialisation=transfer", f"distill.{term}_weight=0"]
        for term in ("ce", "logits", "embedding")
    },
}
# The placements are finalists whatever their short score, so the trials are as short as can be.
COMMON = [
    "search.sampler=grid", "probe.masks=0", "search.rung_tokens=2000", "distill.workers=1",
    "evaluate.sentences=30", "evaluate.audio_examples=0",
]  # fmt: skip
QUICK = ["distill.tokens=4000", "evaluate.sentences=4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two runs of one layout; nothing is written to docs/")
    options = parser.parse_args()
    names = ["from_transfer", "without_logits"] if options.quick else list(RUNS)
    folders = [Path("runs") / f"paper_grid_{'quick_' if options.quick else ''}{name}" for name in names]
    for name, folder in zip(names, folders, strict=True):
        overrides = [*COMMON, *RUNS[name], *(QUICK if options.quick else [])]
        command = ["python", "-m", "mamtra_ray.search", "--run", str(folder), *overrides]
        print(" ".join(command), flush=True)
        subprocess.run([sys.executable, *command[1:]], check=True)
    report = write_report(folders, Path("runs") / "paper_grid.html")
    if not options.quick:
        target = Path(__file__).parents[1] / "docs" / "paper_grid"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(report.with_suffix(""), target)
    print(report)


if __name__ == "__main__":
    main()
