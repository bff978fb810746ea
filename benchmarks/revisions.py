"""A benchmark of this folder under two revisions of the project, in turn: did a change make it slower?

    python benchmarks/revisions.py 3ab1ae0 -- generate.py --contexts 8192 --batches 8 --rounds 1
    python benchmarks/revisions.py 3ab1ae0 --rounds 5 -- train_step.py --rounds 1

The old revision is checked out into a temporary folder, with its own copy of the benchmark; the new one is the working
tree. Both run in the same environment, one after the other, in an order that alternates from round to round; rows are
matched by all their columns that are no measurement. ``--before-path`` puts a folder of packages before the installed
ones for the old revision, where it needs another version of something.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measurement import print_table, quartiles, write_result

ROOT = Path(__file__).parents[1]
KEYS = ("model", "context", "batch", "shape", "step", "tokens")
MEASURES = ("tokens/s", "peak MB")


def results_of(tree: Path, command: list[str], packages: str | None) -> list[dict[str, Any]]:
    """Run the benchmark in ``tree`` and read the rows that it wrote."""
    paths = [str(tree), *([packages] if packages else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(reversed(paths)), "OMP_NUM_THREADS": "1"}
    benchmark = tree / "benchmarks" / command[0]
    done = subprocess.run(
        [sys.executable, str(benchmark), *command[1:]], cwd=tree, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{benchmark} failed:\n{done.stderr[-2000:]}")
    rows: list[dict[str, Any]] = json.loads((tree / "benchmarks/results" / f"{benchmark.stem}.json").read_text())[
        "rows"
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="revision to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each revision")
    parser.add_argument("--before-path", help="packages that only the old revision sees")
    parser.add_argument("--result", help="name of the result file (default: none is written)")
    parser.add_argument("command", nargs="+", help="a benchmark of this folder and its arguments, after --")
    options = parser.parse_args()
    found: dict[str, list[list[dict[str, Any]]]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as folder:
        trees = {"before": Path(folder) / "before", "after": Path(folder) / "after"}
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "--detach", str(trees["before"]), options.before], check=True)
        try:
            # A copy, so that the results of the working tree stay as they are.
            subprocess.run(["cp", "-r", str(ROOT / "mamtra_ray"), str(ROOT / "benchmarks"), folder], check=True)
            trees["after"].mkdir()
            for part in ("mamtra_ray", "benchmarks"):
                (Path(folder) / part).rename(trees["after"] / part)
            for turn in range(options.rounds):
                for name in ("before", "after") if turn % 2 == 0 else ("after", "before"):
                    packages = options.before_path if name == "before" else None
                    found[name].append(results_of(trees[name], options.command, packages))
                    print(f"round {turn + 1} of {options.rounds}: {name} done", flush=True)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(trees["before"])], check=True)
    rows = compared(found)
    print_table(rows)
    if options.result:
        write_result(options.result, rows, before=options.before, rounds=options.rounds)


def compared(found: dict[str, list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Per row of the benchmark and measure: both medians, and the ratio after / before, round by round."""

    def by_key(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
        return {tuple(row[key] for key in KEYS if key in row): row for row in rows}

    rounds = [(by_key(b), by_key(a)) for b, a in zip(found["before"], found["after"], strict=True)]
    table = []
    for key in (key for key in rounds[0][0] if key in rounds[0][1]):
        for measure in (measure for measure in MEASURES if measure in rounds[0][0][key]):
            pairs = [(before[key][measure], after[key][measure]) for before, after in rounds]
            ratio, low, high = quartiles([after / before for before, after in pairs])
            table.append(
                {
                    "what": ", ".join(map(str, key)),
                    "measure": measure,
                    "before": quartiles([before for before, _ in pairs])[0],
                    "after": quartiles([after for _, after in pairs])[0],
                    "after / before": round(ratio, 2),
                    "low": round(low, 2),
                    "high": round(high, 2),
                }
            )
    return table


if __name__ == "__main__":
    main()
