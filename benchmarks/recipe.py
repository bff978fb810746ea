"""Which training recipe makes a student better at every rung, and what is heard of it?

    python benchmarks/recipe.py                  4 layouts x 6 recipes, 100 sentences each; 40 minutes on two cores
    python benchmarks/recipe.py --sentences 0    without speech, about 15 minutes
    python benchmarks/recipe.py --quick          one layout, few tokens; nothing written

Every recipe trains the same layouts from the same aligned mixers and batches' seed. A trial's recipe is scored at the
demo's rungs, a finalist's at a third of the demo's tokens and at all of them; each kind ends its own schedule. Every
finished training is kept in the run folder and not made again.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray
from measurement import print_table, write_result

from mamtra_ray.align.phase import make_library
from mamtra_ray.artifacts import content_hash, read_manifest, write_manifest
from mamtra_ray.distill.job import DistillJob, distill_data
from mamtra_ray.distill.workers import distill
from mamtra_ray.evaluate.evaluation import evaluate_systems
from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.run.open_run import open_run
from mamtra_ray.run.rows import is_worse_than_start
from mamtra_ray.run.session import Session, start_session
from mamtra_ray.runtime.device import device_of_this_process
from mamtra_ray.teacher_cache.phase import make_cache


@dataclass(frozen=True)
class Recipe:
    """What is compared; everything else is the run's."""

    name: str
    learning_rate: float
    pretrained_factor: float
    tokens_per_batch: int


RECIPES = (
    Recipe("demo before", 1e-3, 1.0, 2_000),
    Recipe("lower rate", 3e-4, 1.0, 2_000),
    Recipe("smaller batch", 3e-4, 1.0, 500),
    Recipe("two rates", 5e-4, 0.3, 500),
    Recipe("two rates, high", 1e-3, 0.3, 500),
    Recipe("mixers only", 5e-4, 0.0, 500),
)
TRIAL, FINALIST = (8_000, 16_000), (15_000, 45_000)
QUICK = ["corpus.train_tokens=20000", "corpus.validation_tokens=600", "align.tokens=10000", "evaluate.sentences=2"]


@ray.remote(max_retries=1)
def trained(job: DistillJob, folder: str) -> None:
    """One training on one process; its reports and its student end in ``folder``."""
    reports: list[dict[str, Any]] = []
    for report, training in distill(job, device_of_this_process()):
        content = vars(report)
        reports.append({name: content[name] for name in ("tokens", "ce", "kl", "ce_start", "kl_start", "seconds")})
        training.student.save(Path(folder) / "student")
    write_manifest(Path(folder) / "reports.json", "recipe", 1, job.made_by, reports=reports)


def measure(
    session: Session, layouts: dict[str, Layout], recipes: tuple[Recipe, ...], sentences: int
) -> list[dict[str, Any]]:
    """One row for each layout, recipe and place where it was scored."""
    config = session.config
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    data = distill_data(config, session.shared_teacher, train, validation, str(library))
    jobs: dict[Path, tuple[str, Recipe, str, DistillJob]] = {}
    for name, layout in layouts.items():
        for recipe in recipes:
            settings = config.distill.model_copy(
                update={
                    "learning_rate": recipe.learning_rate,
                    "pretrained_learning_rate_factor": recipe.pretrained_factor,
                    "tokens_per_batch": recipe.tokens_per_batch,
                }
            )
            for kind, report_at in (("trial", TRIAL), ("finalist", FINALIST), ("finalist, a third", FINALIST[:1])):
                job = DistillJob(layout, settings, config.student, data, report_at, config.seed)
                jobs[session.folder / "trained" / content_hash(job.made_by)] = (name, recipe, kind, job)
    with session.screen.phase("train", f"{len(jobs)} trainings"):
        running = [trained.remote(job[-1], str(f)) for f, job in jobs.items() if not (f / "reports.json").exists()]
        total = len(running)
        while running:
            [done], running = ray.wait(running)
            ray.get(done)
            session.screen.count(total - len(running), total, "trainings")
    rows = []
    for folder, (name, recipe, kind, job) in jobs.items():
        for report in read_manifest(folder / "reports.json", "recipe", 1)["reports"]:
            row = {"layout": str(job.layout), "from": name, "recipe": recipe.name, "kind": kind, **report}
            row["worse than its start"] = is_worse_than_start(SimpleNamespace(**report))
            rows.append(row)
    if sentences:
        with session.screen.phase("speech", f"{sentences} sentences by each finalist"):
            systems = {folder.name: folder / "student" for folder, job in jobs.items() if job[2] != "trial"}
            heard = evaluate_systems(
                config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"sentences": sentences})}),
                systems,
                session.folder,
                teacher=session.shared_teacher,
                worker=session.worker,
                on_progress=lambda done, total: session.screen.count(done, total, "utterances"),
            )
        for folder, (name, recipe, kind, _) in jobs.items():
            if kind != "trial":
                last = [row for row in rows if (row["from"], row["recipe"], row["kind"]) == (name, recipe.name, kind)][
                    -1
                ]
                wer = heard[folder.name].wer
                last |= {"WER": wer.value, "WER low": wer.low, "WER high": wer.high}
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layout, few tokens; nothing is written")
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--run", type=Path, default=Path("runs/recipe"))
    options = parser.parse_args()
    run = open_run(
        "demo", options.run.with_name("recipe_quick") if options.quick else options.run, QUICK if options.quick else []
    )
    session = start_session(run, ("cache", "align", "train", "speech"), None)
    layouts = {"found": Layout("AMMAMAMMAAMA")} | {
        name: from_strategy(name, session.num_layers, ratio)
        for name, ratio in (("block_beginning", "1:1"), ("back", "1:1"), ("sandwich", "1:3"))
    }
    if options.quick:
        layouts = {"found": layouts["found"]}
    rows = measure(session, layouts, RECIPES[: 2 if options.quick else None], 0 if options.quick else options.sentences)
    print_table([{key: row.get(key, "") for key in (*rows[0], "WER", "WER low", "WER high")} for row in rows])
    if not options.quick:
        write_result("recipe", rows, sentences=options.sentences, recipes=[vars(recipe) for recipe in RECIPES])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
