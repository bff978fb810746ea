"""What a search costs, against one final distillation and against distilling every candidate.

    python benchmarks/search_cost.py                    runs the demo search first (10 minutes on 2 cores)
    python benchmarks/search_cost.py --run runs/demo    of a finished run

From the costs and the tables of one run: worker-seconds and FLOPs of every rung, over those of the mean finalist (the
seconds of each are in the JSON). The second table does the same sum for CosyVoice 2 from the
token budgets of ``search_spaces/cosyvoice2.yaml``, which nobody has run yet: FLOPs only, 2 a parameter and token of a
forward pass, 6 of a training step, 8 of the alignment.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from measurement import print_table, write_result

from mamtra_ray.config import load_config
from mamtra_ray.run.folder import Run, read_run

RUN = Path("runs") / "search_cost"
LIBRITTS_TOKENS = 52_650_000
"""585 hours at 25 speech tokens a second."""
PAPER_EPOCHS = 15


def seconds_of_finalists(run: Run) -> list[float]:
    """Worker-seconds of every final distillation, fastest first."""
    return sorted(run.config.distill.workers * row.seconds for row in run.finalists)


def measured(run: Run) -> list[dict[str, Any]]:
    """One row per rung of a finished run."""
    rungs = {row["rung"]: row for row in run.rungs}
    seconds = seconds_of_finalists(run)
    one = {"seconds": sum(seconds) / len(seconds), "tflop": rungs["finalists"]["tflop"] / len(seconds)}
    rows = []
    before = {"seconds": 0.0, "tflop": 0.0}
    for name, rung in rungs.items():
        if name in ("finalists", "all"):
            continue
        before = {key: before[key] + rung[key] for key in before}
        rows.append(_row(name, rung["layouts"], rung, one))
    rows.append(_row("search before the finalists", None, before, one))
    return [*rows, _row("one final distillation", 1, one, one)]


def _row(rung: str, layouts: int | None, amounts: dict[str, float], one: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"rung": rung, "layouts": layouts or ""}
    for name in ("seconds", "tflop"):
        row[name] = round(amounts[name], 2)
        row[f"{name}, of a final one"] = round(amounts[name] / one[name], 3)
        row[f"{name}, a layout, of a final one"] = round(amounts[name] / layouts / one[name], 4) if layouts else ""
    return row


def planned() -> list[dict[str, Any]]:
    """CosyVoice 2's ladder in tokens times FLOPs a parameter; parameters cancel in the ratios."""
    config = load_config(Path(__file__).parents[1] / "search_spaces" / "cosyvoice2.yaml")
    search, kept, tokens_before, trained = config.search, float(config.search.trials), 0, 0.0
    for rung_tokens in search.rung_tokens:
        trained += kept * (rung_tokens - tokens_before)
        kept, tokens_before = kept / search.reduction_factor, rung_tokens
    work = {
        "cache": 2 * (config.corpus.train_tokens or LIBRITTS_TOKENS),
        "align": 8 * config.align.tokens,
        "probe": 2 * config.probe.num_layouts * config.probe.validation_tokens,
        "trials": 6 * trained,
    }
    final, paper = 6 * config.distill.tokens, 6 * PAPER_EPOCHS * LIBRITTS_TOKENS
    work["search before the finalists"] = sum(work.values())
    work[f"distilling all {config.probe.num_layouts} probed layouts"] = config.probe.num_layouts * final
    return [
        {
            "step": step,
            "of a final distillation (26 M tokens)": round(amount / final, 3),
            "of the paper's (15 epochs)": round(amount / paper, 4),
        }
        for step, amount in work.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished search (default: run the demo search)")
    options = parser.parse_args()
    if options.run is None:
        subprocess.run([sys.executable, "-m", "mamtra_ray.search", "--run", str(RUN)], check=True)
    run = read_run(options.run or RUN)
    rows, plan = measured(run), planned()
    print_table(rows)
    print()
    print_table(plan)
    seconds = seconds_of_finalists(run)
    print(f"\na final distillation took {seconds[0]:.1f} to {seconds[-1]:.1f} worker-seconds")
    write_result("search_cost", rows, settings={"final_seconds": seconds, "cosyvoice2": plan})


if __name__ == "__main__":
    main()
