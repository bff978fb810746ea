"""How long does a finalist take to its first step, and how much of the phase is no training?

    python benchmarks/finalist_start.py            3 rounds; 8 minutes on two idle cores
    python benchmarks/finalist_start.py --quick    one round, few tokens; nothing written

Four placements of the demo teacher are distilled on Ray Train as finalists are: one after another, and side by side as
the search does where the cluster has room. "Not training" is the part of the cores' time, from the beginning of the
phase to its end, that no training step used: starting Ray Train, loading teacher and mixers, held-out scores, saving.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray
from measurement import print_table, quartiles, write_result

from mamtra_ray.align.phase import make_library
from mamtra_ray.distill.job import DistillJob, Report, distill_data
from mamtra_ray.distill.workers import distill_on_workers
from mamtra_ray.layouts import PATTERNS, from_strategy
from mamtra_ray.run.open_run import open_run
from mamtra_ray.run.session import Session, start_session
from mamtra_ray.runtime.stopping import run_side_by_side
from mamtra_ray.teacher_cache.phase import make_cache

MODES = {"one after another": 1, "side by side": 2}


class FirstSteps:
    """When every training took its first step; takes what trainings tell."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}

    def note_progress(self, layout: str, tokens: int, doing: str = "") -> None:
        if not doing:
            self._at.setdefault(layout, time.time())

    def say(self, sentence: str) -> None:
        print(sentence)

    def get(self) -> dict[str, float]:
        return self._at


@dataclass(frozen=True)
class Phase:
    """Seconds of one phase."""

    whole: float
    first: float
    """Until some finalist's first step."""
    own: float
    """Until a finalist's first step, from its own beginning; mean."""
    not_training: float
    """Part of the cores' time."""


def finalists(session: Session, job: DistillJob, at_once: int) -> Phase:
    """Distill every placement anew, so many at a time."""
    layouts = [from_strategy(name, session.num_layers, "1:1") for name in PATTERNS][:4]
    actor: Any = ray.remote(num_cpus=0)(FirstSteps).remote()  # type: ignore[attr-defined]
    begun: dict[str, float] = {}

    def train(layout: Any, folder: Path) -> Report:
        begun[str(layout)] = time.time()
        own = DistillJob(layout, job.settings, job.student, job.data, job.report_at, job.seed, actor)
        return distill_on_workers(own, folder, workers=1, worker=session.worker)

    with tempfile.TemporaryDirectory() as folder:
        beginning = time.time()
        reports = run_side_by_side(
            [functools.partial(train, layout, Path(folder) / str(layout)) for layout in layouts], at_once
        )
        whole = time.time() - beginning
    first = ray.get(actor.get.remote())
    waits = [first[layout] - at for layout, at in begun.items()]
    cores = max(MODES.values())
    trained = sum(report.seconds for report in reports)
    return Phase(whole, min(first.values()) - beginning, sum(waits) / len(waits), 1 - trained / (cores * whole))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, few tokens; nothing is written")
    parser.add_argument("--tokens", type=int, default=20_000, help="of each finalist")
    parser.add_argument("--run", type=Path, default=Path("runs/finalist_start"))
    options = parser.parse_args()
    tokens, rounds = (2_000, 1) if options.quick else (options.tokens, 3)
    run = open_run("demo", options.run, [])
    session = start_session(run, ("cache", "align"), None)
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    data = distill_data(session.config, session.shared_teacher, train, validation, str(library))
    layout = from_strategy("front", session.num_layers, "1:1")
    job = DistillJob(layout, session.config.distill, session.config.student, data, (tokens,), session.config.seed)
    measured: dict[str, list[Phase]] = {mode: [] for mode in MODES}
    for turn in range(rounds):
        for mode in list(MODES) if turn % 2 == 0 else reversed(MODES):
            measured[mode].append(finalists(session, job, MODES[mode]))
    rows = []
    before = [phase.whole for phase in measured["one after another"]]
    for mode, phases in measured.items():
        row: dict[str, Any] = {"finalists": mode}
        for name, values in (
            ("seconds of the phase", [phase.whole for phase in phases]),
            ("of one after another", [p.whole / other for p, other in zip(phases, before, strict=True)]),
            ("seconds to the first step", [phase.first for phase in phases]),
            ("to a finalist's own", [phase.own for phase in phases]),
            ("not training", [phase.not_training for phase in phases]),
        ):
            median, low, high = quartiles(values)
            row |= {name: round(median, 3), f"{name}, quartiles": [round(low, 3), round(high, 3)]}
        rows.append(row)
    print_table([{key: value for key, value in row.items() if "quartiles" not in key} for row in rows])
    if not options.quick:
        write_result("finalist_start", rows, tokens=tokens, rounds=rounds, layouts=4)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
