"""Verb ``probe``: score hundreds of layouts by forward passes, and find the best of every budget.

Half of the scores go to budgets and placements drawn uniformly and to the paper's placements; a surrogate with linear
and pairwise terms is fitted; the rest goes, round by round, to the layouts that it holds for best, until the best one
is scored and hardly any unscored one can be better. Every score is in ``probe.parquet`` before the next round begins,
and is not paid for again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from mamtra_ray.acquisition import CONFIDENT, confidence, fit_log, next_layouts, ranked_layouts
from mamtra_ray.artifacts import content_hash, file_hash
from mamtra_ray.candidates import paper_candidates
from mamtra_ray.config import Config, add_common_arguments, config_from_arguments
from mamtra_ray.constraints import Constraints, sample_layouts
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.layouts import Layout
from mamtra_ray.mask_scoring import MaskScorer, ProbeRow, cosine_importance
from mamtra_ray.mixer_library import MANIFEST, load_library
from mamtra_ray.progress import table
from mamtra_ray.run_folder import PROBE, PROBE_COLUMNS, read_rows, write_rows
from mamtra_ray.shared_batches import DistillBatch, batches
from mamtra_ray.shared_cache import SharedCache
from mamtra_ray.teachers.base import Teacher, make_student

# Layouts a task scores: many share more prefixes, few lose less on a kill and spread better.
_LAYOUTS_PER_TASK = 8
_BATCH_TOKENS = 4_096
# Part of the scores that does not depend on the surrogate, and of the rest that a round takes.
_FIRST_SHARE, _ROUND_SHARE = 0.5, 0.25
_FEWEST_TO_FIT = 3

Progress = Callable[[int, int], None]
"""Called with (done, total) layouts."""


def probe_masks(
    config: Config,
    folder: Path,
    *,
    teacher: Teacher,
    library: Path,
    validation: SharedCache,
    on_progress: Progress | None = None,
) -> list[ProbeRow]:
    """Spend ``config.probe.masks`` scores on the budgets of ``config.search.ratios``; Ray must be initialised.

    Ends earlier if every budget's best layout is settled. Scores of an earlier session with the same teacher, library
    and tokens count.

    Args:
        config: sections probe, search (budgets, constraints, CPUs and GPUs of an actor, seed) and student.
        folder: run folder; ``probe.parquet`` is written there after every few layouts.
        teacher: of the library and the validation cache.
        library: folder of :func:`~mamtra_ray.align.align_mixers`.
        validation: held-out tokens; the first ``config.probe.validation_tokens`` are used.
        on_progress: called with (done, total).

    Raises:
        InputError: a library of another teacher, or budgets that the constraints do not leave.
    """
    num_layers = teacher.model.config.num_layers
    budgets = budget_constraints(config, num_layers)
    report = on_progress or (lambda _done, _total: None)
    rng = np.random.default_rng(config.search.seed)
    papers = [candidate.layout for candidate in paper_candidates(config.search, num_layers)]
    with ProbePool(config, folder, teacher, library, validation) as pool:
        total = config.probe.masks
        wanted = first_layouts(list(budgets.values()), papers, round(total * _FIRST_SHARE), rng)
        while True:
            new = [layout for layout in wanted if layout not in pool.rows]
            base = len(pool.rows)
            for done in pool.score(new[: max(total - base, 0)]):
                report(min(base + done, total), total)
            if len(pool.rows) >= total or len(pool.rows) < _FEWEST_TO_FIT:
                break
            # Equal scores must lead to equal proposals, so that a resumed run does what an uninterrupted one does.
            rng = np.random.default_rng([config.search.seed, len(pool.rows)])
            scores = {layout: row.kl for layout, row in sorted(pool.rows.items())}
            surrogate = fit_log(scores)
            open_budgets = [c for c in budgets.values() if confidence(surrogate, scores, c, rng) < CONFIDENT]
            share = round(total * (1 - _FIRST_SHARE) * _ROUND_SHARE / max(len(open_budgets), 1))
            wanted = [
                layout
                for constraints in open_budgets
                for layout in next_layouts(surrogate, scores, constraints, max(share, 2), rng)
            ]
            if not wanted:
                break
        report(total, total)
        return list(pool.rows.values())


def propose(config: Config, rows: Sequence[ProbeRow], ratio: str, count: int) -> list[Layout]:
    """The ``count`` best layouts of a budget: scored ones by their KL, others by the surrogate, best first.

    Raises:
        InputError: no rows, or constraints that leave no layout of this budget.
    """
    if not rows:
        raise InputError("no layout was scored, so none can be proposed: raise probe.masks")
    search = config.search
    constraints = Constraints.from_ratio(rows[0].layout.num_layers, ratio, search.keep_attention, search.always_mamba)
    scores = {row.layout: row.kl for row in rows}
    if len(scores) < _FEWEST_TO_FIT:
        return sorted((layout for layout in scores if constraints.allows(layout)), key=scores.__getitem__)[:count]
    return [layout for layout, _, _ in ranked_layouts(fit_log(scores), scores, constraints, count)]


def budget_constraints(config: Config, num_layers: int) -> dict[str, Constraints]:
    """ratio -> the layouts that the search may use at it."""
    search = config.search
    return {
        ratio: Constraints.from_ratio(num_layers, ratio, search.keep_attention, search.always_mamba)
        for ratio in search.ratios
    }


def first_layouts(
    budgets: Sequence[Constraints], papers: Sequence[Layout], count: int, rng: np.random.Generator
) -> list[Layout]:
    """The paper's layouts, then budgets drawn uniformly and placements drawn uniformly inside them."""
    chosen = list(dict.fromkeys(papers))
    share = np.bincount(rng.integers(len(budgets), size=max(count - len(chosen), 0)), minlength=len(budgets))
    for constraints, number in zip(budgets, share, strict=True):
        chosen += sample_layouts(constraints, int(number), rng, exclude=chosen)
    return chosen


@dataclass(frozen=True)
class _Job:
    config: Config
    teacher: Any
    library: str
    validation: SharedCache


class ProbePool:
    """Ray actors that hold teacher and library once, and the table of what they found.

    ``rows`` are the scores made under these settings; rows of others stay in the file and are left alone.
    """

    def __init__(self, config: Config, folder: Path, teacher: Teacher, library: Path, validation: SharedCache) -> None:
        # Checked here, so that a wrong library is one sentence and no actor's traceback.
        mixers = load_library(library, teacher_fingerprint=teacher.fingerprint)
        pure_mamba = "M" * teacher.model.config.num_layers
        make_student(teacher.model, pure_mamba, "aligned", mixers, config.student.state_sharing, share_weights=True)
        self.config, self.path = config, folder / PROBE
        held_out = first_utterances(validation, config.probe.validation_tokens)
        self.made_by = content_hash(
            {
                "teacher": teacher.fingerprint,
                "library": file_hash(library / MANIFEST),
                "corpus": validation.manifest.made_by,
                "speech_tokens": held_out.speech_tokens,
            }
        )
        self._table = read_rows(self.path, (*PROBE_COLUMNS, "made_by"))
        self.rows = {
            Layout(row["layout"]): ProbeRow(Layout(row["layout"]), row["ce"], row["kl"], row["tokens"], row["seconds"])
            for row in self._table
            if row["made_by"] == self.made_by
        }
        self._job = _Job(config, [ray.put(teacher)], str(library.resolve()), held_out)
        self._actors: list[Any] = []

    def __enter__(self) -> ProbePool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def score(self, layouts: Sequence[Layout], layouts_per_task: int = _LAYOUTS_PER_TASK) -> Iterator[int]:
        """Score new layouts; yields how many are done whenever some are in the file."""
        # Sorted, so that the layouts of a task share long prefixes.
        ordered = sorted(set(layouts))
        tasks = [ordered[first : first + layouts_per_task] for first in range(0, len(ordered), layouts_per_task)]
        self._start_actors(len(tasks))
        done = 0
        running = {}
        for actor in self._actors:
            if tasks:
                running[actor.score.remote(tasks.pop(0))] = actor
        while running:
            [finished], _ = ray.wait(list(running), num_returns=1)
            actor = running.pop(finished)
            rows: list[ProbeRow] = ray.get(finished)
            if tasks:
                running[actor.score.remote(tasks.pop(0))] = actor
            self._append(rows)
            done += len(rows)
            yield done

    def cosine_importance(self) -> list[float]:
        """See :func:`~mamtra_ray.mask_scoring.cosine_importance`."""
        self._start_actors(1)
        return ray.get(self._actors[0].cosine_importance.remote())

    def _start_actors(self, useful: int) -> None:
        cpus, gpus = self.config.search.cpus_per_worker, self.config.search.gpus_per_worker or 0
        resources = ray.cluster_resources()
        possible = int(resources.get("CPU", 1) // cpus)
        if gpus:
            possible = min(possible, int(resources.get("GPU", 0) // gpus))
        for _ in range(len(self._actors), min(max(possible, 1), useful)):
            options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 3, "max_task_retries": 3}
            self._actors.append(_ProbeActor.options(**options).remote(self._job))  # type: ignore[attr-defined]

    def _append(self, rows: Sequence[ProbeRow]) -> None:
        for row in rows:
            self.rows[row.layout] = row
            content = {**vars(row), "layout": str(row.layout), "ratio": row.layout.ratio, "made_by": self.made_by}
            self._table.append(content)
        write_rows(self.path, self._table, (*PROBE_COLUMNS, "made_by"))


@ray.remote
class _ProbeActor:
    """Holds the scorer and the held-out batches."""

    def __init__(self, job: _Job) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher: Teacher = ray.get(job.teacher[0])
        library = load_library(Path(job.library), teacher_fingerprint=teacher.fingerprint)
        self.scorer = MaskScorer(teacher.model, library, job.config.student.state_sharing, device)
        self.batches: list[DistillBatch] = list(
            batches(job.validation, teacher.sequence, batch_tokens=_BATCH_TOKENS, seed=0, epoch=0, device=device)
        )

    def score(self, layouts: Sequence[Layout]) -> list[ProbeRow]:
        return self.scorer.score(layouts, self.batches)

    def cosine_importance(self) -> list[float]:
        return cosine_importance(self.scorer.teacher, self.batches)


def first_utterances(shared: SharedCache, speech_tokens: int) -> SharedCache:
    """The first utterances of a split that together hold at most so many speech tokens, one at least."""
    count = max(1, int(np.searchsorted(np.cumsum(shared.num_speech), speech_tokens, side="right")))
    columns = ("block_of_row", "row_in_block", "num_text", "num_speech")
    return replace(shared, **{name: getattr(shared, name)[:count] for name in columns})


def fit_table(rows: Sequence[ProbeRow]) -> str:
    """How well the surrogate predicts left-out scores inside each budget."""
    fits = fit_log({row.layout: row.kl for row in rows}).held_out_fit()
    return table(
        ["attention layers", "layouts", "held-out Spearman", "RMSE of log KL", "in 90 % interval"],
        [
            [
                fit.attention_layers,
                fit.layouts,
                "" if fit.spearman is None else f"{fit.spearman:.2f}",
                f"{fit.rmse:.3f}",
                f"{fit.coverage:.0%}",
            ]
            for fit in fits.values()
        ],
    )


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    from mamtra_ray.session import make_cache, make_library, start_session

    parser = argparse.ArgumentParser(prog="python -m mamtra_ray.probe", description=(__doc__ or "").splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--address", help="Ray cluster (default: $RAY_ADDRESS, else a new local one)")
    options = parser.parse_intermixed_args(arguments)
    config, folder = config_from_arguments(options)
    if options.dry_run:
        print(
            f"probe: {config.probe.masks} layouts on {config.probe.validation_tokens:,} tokens, into {folder}/{PROBE}"
        )
        return 0
    if config.probe.masks == 0:
        raise InputError("probe.masks is 0: there is nothing to score")
    session = start_session(config, folder, ("cache", "align", "probe"), options.address)
    config = session.config
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    if library is None:
        raise InputError(f"student.initialisation is {config.student.initialisation}: probing needs aligned mixers")
    with session.screen.phase("probe", f"{config.probe.masks} layouts by forward passes"):
        rows = probe_masks(
            config,
            folder,
            teacher=session.teacher,
            library=library,
            validation=validation,
            on_progress=lambda done, total: session.screen.count(done, total, "layouts"),
        )
    print(fit_table(rows))
    found = {row.layout: row for row in rows}
    best = []
    for ratio in config.search.ratios:
        for layout in propose(config, rows, ratio, 5):
            row = found.get(layout)
            best.append([ratio, layout, *([f"{row.ce:.3f}", f"{row.kl:.3f}"] if row else ["", "predicted"])])
    print()
    print(table(["ratio", "layout", "CE", "KL"], best))
    return 0


if __name__ == "__main__":
    # As an imported module: Ray must find its classes by name.
    from mamtra_ray.probe import main as imported_main

    raise SystemExit(imported_main())
