"""The last rung: the paper's placements and the best found layouts, distilled longer on Ray Train and heard."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
from tensorboardX import SummaryWriter

from mamtra_ray.artifacts import read_manifest, write_manifest
from mamtra_ray.candidates import Candidate, without_repeats
from mamtra_ray.config import SearchConfig
from mamtra_ray.distill import Report, distill_on_workers
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout, num_attention_layers
from mamtra_ray.progress import every_second
from mamtra_ray.run_folder import FINALIST_CURVE
from mamtra_ray.session import TRAINED_FROM, Session
from mamtra_ray.trial import TrialSettings

_RESULT_VERSION = 1


def choose_finalists(
    search: SearchConfig, num_layers: int, papers: list[Candidate], rows: list[dict[str, Any]]
) -> list[Candidate]:
    """The paper's placements of every budget, then the best found layouts of every budget.

    Rows are compared at the highest rung they reached first, then by CE: a layout that successive halving let go on
    is ahead of one it stopped.
    """
    from_paper = {candidate.layout for candidate in papers}
    finalists = list(papers)
    for ratio in search.ratios:
        kept = num_attention_layers(num_layers, ratio)
        best: dict[str, dict[str, Any]] = {}
        for row in sorted(rows, key=lambda row: row["rung"]):
            if row["layout"].count("A") == kept and Layout(row["layout"]) not in from_paper:
                best[row["layout"]] = row
        ranked = sorted(best.values(), key=lambda row: (-row["rung"], row["ce"]))
        finalists += [Candidate(Layout(row["layout"]), row["origin"]) for row in ranked[: search.finalists]]
    return without_repeats(finalists)


def distill_finalist(
    settings: TrialSettings,
    layout: Layout,
    folder: Path,
    made_by: dict[str, str],
    on_progress: Callable[[int], None],
) -> Report:
    """Distil ``layout`` with the full token budget; ``folder/student`` holds the result, ``result.json`` the scores.

    A finished result with the same ``made_by`` is read back; a stopped training goes on from its last checkpoint.
    """
    result = folder / "result.json"
    if result.exists():
        manifest = read_manifest(result, "finalist", _RESULT_VERSION)
        if manifest["made_by"] == made_by:
            return Report(**manifest["report"])
        raise InputError(f"{folder} was distilled with other settings; move it away, or start another run with --run")
    config = settings.config
    total = config.distill.tokens
    checkpoints = range(config.distill.checkpoint_tokens, total, config.distill.checkpoint_tokens)
    job = dataclasses.replace(settings.job(layout, (*checkpoints, total)), progress=settings.records)
    ray.get(settings.records.note_tokens.remote(str(layout), 0))
    with every_second(lambda: on_progress(ray.get(settings.records.tokens_of.remote(str(layout))))):
        report = distill_on_workers(
            job,
            folder,
            workers=config.distill.workers,
            cpus=config.search.cpus_per_worker,
            gpus=config.search.gpus_per_worker or 0,
            callbacks=[_CurveToRecords(settings.records, str(layout), len(config.search.rung_tokens))],
        )
    # The curve is in curves.parquet. A loss term that is switched off is NaN there, which JSON does not know.
    report = dataclasses.replace(report, curve=[])
    write_manifest(result, "finalist", _RESULT_VERSION, made_by, report=dataclasses.asdict(report))
    return report


class _CurveToRecords(ray.train.UserCallback):
    """Every report's part of the training curve is on disk before the training goes on from its checkpoint."""

    def __init__(self, records: Any, layout: str, rung: int) -> None:
        self.records, self.layout, self.rung = records, layout, rung

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        ray.get(self.records.add_curve.remote(FINALIST_CURVE, self.layout, self.rung, metrics[0]["curve"]))


def distill_the_finalists(
    session: Session, settings: TrialSettings, papers: list[Candidate], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Every finalist with the full token budget; rows of ``finalists.parquet`` without their WER."""
    finalists = choose_finalists(session.config.search, session.num_layers, papers, rows)
    total = session.config.distill.tokens * len(finalists)
    results = []
    with session.screen.phase(
        "finalists", f"{len(finalists)} layouts on {session.config.distill.workers} Ray Train workers"
    ):
        for index, candidate in enumerate(finalists):
            folder = student_folder(session.folder, str(candidate.layout)).parent

            def on_progress(tokens: int, index: int = index, candidate: Candidate = candidate) -> None:
                done = index * session.config.distill.tokens + min(tokens, session.config.distill.tokens)
                session.screen.count(done, total, "tokens", f"{candidate.origin} {candidate.layout}")

            report = distill_finalist(settings, candidate.layout, folder, session.made_from(*TRAINED_FROM), on_progress)
            curve = ray.get(settings.records.curve_of.remote(FINALIST_CURVE, str(candidate.layout)))
            log_to_tensorboard(session.folder / "tensorboard" / str(candidate.layout), curve)
            session.screen.say(
                f"    {candidate.origin} {candidate.layout}: CE {report.ce:.3f} (from {report.ce_start:.3f})"
            )
            results.append(
                {
                    "layout": str(candidate.layout),
                    "origin": candidate.origin,
                    "ratio": candidate.layout.ratio,
                    "tokens": report.tokens,
                    "steps": report.step,
                    "seconds": report.seconds,
                    "ce": report.ce,
                    "kl": report.kl,
                    "ce_start": report.ce_start,
                    "wer": None,
                    "wer_low": None,
                    "wer_high": None,
                    "cer": None,
                    **session.costs(len(candidate.layout.attention_layers)),
                }
            )
    return results


def log_to_tensorboard(folder: Path, curve: list[dict[str, float]]) -> None:
    """The training curve of a finalist, by tokens."""
    with SummaryWriter(str(folder)) as writer:
        for point in curve:
            for name in ("total", "ce", "logits", "emb"):
                if not math.isnan(point[name]):  # a term that is switched off
                    writer.add_scalar(f"loss/{name}", point[name], int(point["tokens"]))


def student_folder(run_folder: Path, layout: str) -> Path:
    """Where a finalist's distilled student lies."""
    return run_folder / "finalists" / layout / "student"


def choose_best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The finalist to export among those of one budget: one without an ``alarm``, if there is any.

    A WER from a few dozen sentences is noisy, so it only rules layouts out: among those whose WER lies within the
    95 % interval of the lowest one, the lowest held-out CE wins. Without a WER the CE decides alone.
    """
    rows = [row for row in rows if not row.get("alarm")] or rows
    heard = [row for row in rows if row["wer"] is not None]
    if heard:
        lowest = min(heard, key=lambda row: (row["wer"], row["ce"]))
        rows = [row for row in heard if row["wer"] <= lowest["wer_high"]]
    return min(rows, key=lambda row: (not math.isfinite(row["ce"]), row["ce"]))
