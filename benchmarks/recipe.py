"""Which training recipe makes a student better at every rung, and what is heard of it?

    python benchmarks/recipe.py                   4 layouts x 6 recipes, 100 sentences each; 40 minutes on two cores
    python benchmarks/recipe.py --space demo24    the deep teacher: 3 layouts x 4 recipes
    python benchmarks/recipe.py --space smollm2 --sentences 0    the text model of docs/causal_lm.md: trials only
    python benchmarks/recipe.py --sentences 0     without speech, about 15 minutes
    python benchmarks/recipe.py --quick           one layout, few tokens; nothing written

Every recipe trains the same layouts from the same aligned mixers and batches' seed. A trial's recipe is scored at
two rungs, a finalist's at a third of its tokens and at all of them; each kind ends its own schedule. Every
finished training is kept in the run folder and not made again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Comparison:
    """What is compared on one teacher."""

    recipes: tuple[Recipe, ...]
    layouts: tuple[tuple[str, str], ...]
    """(name, layout or placement of a ratio)."""
    trial: tuple[int, ...]
    """Tokens at which a trial is scored; its schedule ends at the last."""
    finalist: tuple[int, ...]
    """Likewise of a finalist, which is trained to the first of these besides; none: trials only."""


COMPARISONS = {
    "demo": Comparison(
        recipes=(
            Recipe("demo before", 1e-3, 1.0, 2_000),
            Recipe("lower rate", 3e-4, 1.0, 2_000),
            Recipe("smaller batch", 3e-4, 1.0, 500),
            Recipe("two rates", 5e-4, 0.3, 500),
            Recipe("two rates, high", 1e-3, 0.3, 500),
            Recipe("mixers only", 5e-4, 0.0, 500),
        ),
        layouts=(
            ("found", "AMMAMAMMAAMA"),
            ("block_beginning 1:1", "block_beginning:1:1"),
            ("back 1:1", "back:1:1"),
            ("sandwich 1:3", "sandwich:1:3"),
        ),
        trial=(8_000, 16_000),
        finalist=(15_000, 45_000),
    ),
    "demo24": Comparison(
        recipes=(
            Recipe("low", 1.5e-4, 0.3, 1_000),
            Recipe("middle", 5e-4, 0.3, 1_000),
            Recipe("high", 1.5e-3, 0.3, 1_000),
            Recipe("one rate", 5e-4, 1.0, 1_000),
        ),
        layouts=(
            ("block_beginning 1:1", "block_beginning:1:1"),
            ("found 1:3", "AMAMAMAMMMMMMMMMMAAMMMMM"),
            ("block_beginning 1:3", "block_beginning:1:3"),
        ),
        trial=(8_000, 16_000),
        finalist=(20_000, 60_000),
    ),
    "smollm2": Comparison(
        recipes=(
            Recipe("one rate, large batch", 2e-4, 1.0, 1_024),
            Recipe("mixers", 2e-4, 0.1, 256),
            Recipe("low", 5e-5, 0.3, 256),
            Recipe("middle", 1e-4, 0.3, 256),
        ),
        layouts=(
            ("found 1:1", "MAMAMMMMAAAAAMMMAAAAAMMAAMMMAM"),
            ("block_beginning 1:1", "block_beginning:1:1"),
        ),
        trial=(2_048, 4_096),
        finalist=(),
    ),
}
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


def measure(session: Session, compared: Comparison, sentences: int) -> list[dict[str, Any]]:
    """One row for each layout, recipe and place where it was scored."""
    config = session.config
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    data = distill_data(config, session.shared_teacher, train, validation, str(library))
    kinds = {"trial": compared.trial}
    if compared.finalist:
        kinds |= {"finalist": compared.finalist, "finalist, a third": compared.finalist[:1]}
    jobs: dict[Path, tuple[str, Recipe, str, DistillJob]] = {}
    for name, text in compared.layouts:
        layout = layout_of(text, session.num_layers)
        for recipe in compared.recipes:
            settings = config.distill.model_copy(
                update={
                    "learning_rate": recipe.learning_rate,
                    "pretrained_learning_rate_factor": recipe.pretrained_factor,
                    "tokens_per_batch": recipe.tokens_per_batch,
                }
            )
            for kind, report_at in kinds.items():
                job = DistillJob(layout, settings, config.student, data, report_at, config.seed)
                jobs[session.folder / "trained" / content_hash(job.made_by)] = (name, recipe, kind, job)
    with session.screen.phase("train", f"{len(jobs)} trainings"):
        running = [trained.remote(job[-1], str(f)) for f, job in jobs.items() if not (f / "reports.json").exists()]
        total = len(running)
        while running:
            [done], running = ray.wait(running)
            ray.get(done)
            session.screen.count(total - len(running), total, "trainings")
    wers = words_heard(session, [folder for folder, job in jobs.items() if job[2] != "trial"], sentences)
    rows = []
    for folder, (name, recipe, kind, job) in jobs.items():
        reports = read_manifest(folder / "reports.json", "recipe", 1)["reports"]
        for report in reports:
            row = {"layout": str(job.layout), "from": name, "recipe": recipe.name, "kind": kind, **report}
            row["worse than its start"] = is_worse_than_start(SimpleNamespace(**report))
            rows.append(row | (wers.get(folder, {}) if report is reports[-1] else {}))
    return rows


def layout_of(text: str, num_layers: int) -> Layout:
    """A layout in letters, or ``placement:A:M``."""
    strategy, separator, ratio = text.partition(":")
    return from_strategy(strategy, num_layers, ratio) if separator else Layout.from_string(text)


def words_heard(session: Session, folders: Sequence[Path], sentences: int) -> dict[Path, dict[str, float]]:
    """WER of the students in ``folders``, with its interval; none without sentences."""
    if not sentences:
        return {}
    config = session.config
    with session.screen.phase("speech", f"{sentences} sentences by each finalist"):
        heard = evaluate_systems(
            config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"sentences": sentences})}),
            {folder.name: folder / "student" for folder in folders},
            session.folder,
            teacher=session.shared_teacher,
            worker=session.worker,
            on_progress=lambda done, total: session.screen.count(done, total, "utterances"),
        )
    wers = {folder: heard[folder.name].wer for folder in folders}
    return {folder: {"WER": wer.value, "WER low": wer.low, "WER high": wer.high} for folder, wer in wers.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", choices=list(COMPARISONS), default="demo")
    parser.add_argument("--quick", action="store_true", help="one layout, few tokens; nothing is written")
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--run", type=Path, help="run folder (default: runs/recipe_SPACE)")
    options = parser.parse_args()
    folder = options.run or Path("runs") / f"recipe_{options.space}{'_quick' if options.quick else ''}"
    compared, sentences = COMPARISONS[options.space], options.sentences
    if options.quick:
        compared = replace(compared, recipes=compared.recipes[:2], layouts=compared.layouts[:1])
        sentences = 0
    run = open_run(options.space, folder, QUICK if options.quick else [])
    session = start_session(run, ("cache", "align", "train", "speech"), None)
    rows = measure(session, compared, sentences)
    print_table([{key: row.get(key, "") for key in (*rows[0], "WER", "WER low", "WER high")} for row in rows])
    if not options.quick:
        recipes = [vars(recipe) for recipe in compared.recipes]
        write_result(f"recipe_{options.space}", rows, sentences=sentences, recipes=recipes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
