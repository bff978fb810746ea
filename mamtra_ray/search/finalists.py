"""The last rung: the paper's placements and the best found layouts, distilled longer on Ray Train and heard."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train

from mamtra_ray.artifacts import read_manifest, write_manifest
from mamtra_ray.distill.job import Report
from mamtra_ray.distill.progress import show_progress_of_several
from mamtra_ray.distill.workers import checkpoints_at, distill_on_workers
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate, SearchSpace, without_repeats
from mamtra_ray.run.names import student_folder
from mamtra_ray.run.rows import FinalistRow, TrialRow
from mamtra_ray.run.session import Session
from mamtra_ray.runtime.actor_pool import result_of
from mamtra_ray.runtime.progress import repeatedly
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.runtime.stopping import run_side_by_side
from mamtra_ray.search.trial import TrialSettings

_RESULT_VERSION = 3


def choose_finalists(
    space: SearchSpace,
    paper_placements: Sequence[Candidate],
    rows: Sequence[TrialRow],
    found_per_ratio: int,
    evaluation: str = "",
) -> list[Candidate]:
    """The paper's placements of every ratio, then the best found layouts of every ratio.

    Rows are compared at the highest rung they reached first, then by CE: a layout that successive halving let go on
    is ahead of one it stopped. Where trials were heard, their WER rules out: those whose WER lies above the interval
    of the lowest one come after the others of their rung.

    Args:
        space: the layouts of the search.
        paper_placements: always finalists.
        rows: of the trials.
        found_per_ratio: how many others.
        evaluation: identifies what was heard; a WER of other sentences or settings does not compare.
    """
    from_paper = {candidate.layout for candidate in paper_placements}
    finalists = list(paper_placements)
    for ratio in space.ratios:
        kept = space.num_attention(ratio)
        best: dict[Layout, TrialRow] = {}
        for row in sorted(rows, key=lambda row: row.rung):
            if row.layout.num_attention == kept and row.layout not in from_paper:
                best[row.layout] = row
        ranked = _ranked(best.values(), evaluation)
        finalists += [Candidate(row.layout, row.origin) for row in ranked[:found_per_ratio]]
    return without_repeats(finalists)


def _ranked(rows: Collection[TrialRow], evaluation: str) -> list[TrialRow]:
    """Trials of one ratio, the best one first: see :func:`choose_finalists`."""
    heard = {row.layout: row.wer for row in rows if row.wer is not None and row.evaluation == evaluation}
    most = min(heard.values(), key=lambda wer: wer.value).high if heard else math.inf

    def is_ruled_out(row: TrialRow) -> bool:
        return row.layout in heard and heard[row.layout].value > most

    return sorted(rows, key=lambda row: (-row.rung, is_ruled_out(row), row.ce))


def distill_finalist(settings: TrialSettings, layout: Layout, folder: Path) -> Report:
    """Distill ``layout`` with the full token budget; ``folder/student`` holds the result, ``result.json`` the scores.

    A finished result of the same training is read back; a stopped training goes on from its last checkpoint.
    """
    total = settings.settings.tokens
    job = settings.job(layout, checkpoints_at(total, settings.settings.checkpoint_every_tokens), settings.table)
    made_by = job.made_by
    result = folder / "result.json"
    if result.exists():
        manifest = read_manifest(result, "finalist", _RESULT_VERSION)
        if manifest["made_by"] == made_by:
            return Report(**manifest["report"])
        other = next(key for key in made_by if manifest["made_by"].get(key) != made_by[key])
        raise InputError(
            f"{folder} was distilled with another {other.replace('_', ' ')}; move it away, or begin another run"
        )
    report = distill_on_workers(
        job,
        folder,
        workers=settings.settings.workers,
        worker=settings.worker,
        callbacks=[_ReportToTable(settings.table, layout, len(settings.search.rung_tokens))],
    )
    # The curve is in curves.parquet. A loss term that is switched off is NaN there, which JSON does not know.
    report = dataclasses.replace(report, curve=[])
    write_manifest(result, "finalist", _RESULT_VERSION, made_by, report=dataclasses.asdict(report))
    return report


class _ReportToTable(ray.train.UserCallback):
    """Every report's part of the training curve is on disk before the training goes on from its checkpoint."""

    def __init__(self, table: Any, layout: Layout, rung: int) -> None:
        self.table, self.layout, self.rung = table, layout, rung

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        report = Report(**{name: metrics[0][name] for name in Report.__dataclass_fields__})
        result_of(self.table.add_finalist_report.remote(self.layout, self.rung, report))


def distill_the_finalists(
    session: Session, settings: TrialSettings, paper_placements: list[Candidate], rows: list[TrialRow]
) -> list[FinalistRow]:
    """Every finalist with the full token budget; rows of ``finalists.parquet`` without their WER.

    As many as the cluster has room for are trained side by side: no worker waits while another training starts.
    """
    settings = dataclasses.replace(settings, settings=session.config.distill)
    evaluation = settings.speech.identity if settings.speech else ""
    finalists = choose_finalists(settings.space, paper_placements, rows, settings.search.finalists, evaluation)
    workers, screen = settings.settings.workers, session.screen
    at_once = min(len(finalists), trainings_at_once(settings.worker, workers, ray.cluster_resources()))
    finished: list[str] = []
    for candidate in finalists:
        # A trial of the same layout has told of itself.
        result_of(settings.table.end_progress.remote(str(candidate.layout)))

    def say_result(index: int, report: Report) -> None:
        candidate = finalists[index]
        finished.append(str(candidate.layout))
        screen.say(
            f"    {candidate.origin} {candidate.layout}: CE {report.ce:.3f} (from {report.ce_start:.3f}), "
            f"KL {report.kl:.3f} (from {report.kl_start:.3f})"
        )

    side_by_side = f", {at_once} at a time" if at_once > 1 else ""
    with (
        screen.phase("finalists", f"{len(finalists)} layouts on {workers} Ray Train workers each{side_by_side}"),
        repeatedly(
            lambda: show_progress_of_several(
                screen,
                settings.table,
                [str(candidate.layout) for candidate in finalists],
                finished=set(finished),
                tokens=settings.settings.tokens,
            )
        ),
    ):
        reports = run_side_by_side(
            [
                functools.partial(
                    distill_finalist, settings, one.layout, student_folder(session.folder, one.layout).parent
                )
                for one in finalists
            ],
            at_once,
            say_result,
        )
        result_of(settings.table.compact.remote())
    return [
        finalist_row(candidate, report, session.costs(candidate.layout))
        for candidate, report in zip(finalists, reports, strict=True)
    ]


def trainings_at_once(worker: WorkerResources, workers: int, cluster: Mapping[str, float]) -> int:
    """How many trainings of so many workers a cluster of these resources has room for; at least one."""
    return max(1, worker.slots(cluster) // workers)


def finalist_row(candidate: Candidate, report: Report, costs: Mapping[str, Any]) -> FinalistRow:
    """The row of a finalist that was not heard yet."""
    return FinalistRow(
        layout=candidate.layout,
        origin=candidate.origin,
        tokens=report.tokens,
        steps=report.step,
        seconds=report.seconds,
        ce=report.ce,
        kl=report.kl,
        ce_start=report.ce_start,
        kl_start=report.kl_start,
        **costs,
    )
