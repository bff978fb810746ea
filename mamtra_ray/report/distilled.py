"""The student of the verb ``distill`` in the report of its run: beside the finalists, and named as what it is.

A run of ``distill`` alone has no ``reference.json``; what its evaluation heard of teacher and codec is then in
``evaluation/summary.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mamtra_ray.artifacts import read_manifest
from mamtra_ray.evaluate.results import SCHEMA_VERSION, SUMMARY
from mamtra_ray.run.distilled import distilled_system
from mamtra_ray.run.folder import Run, Score
from mamtra_ray.run.names import CODEC, TEACHER
from mamtra_ray.run.rows import FinalistRow
from mamtra_ray.speech.error_rate import ErrorRate


@dataclass(frozen=True)
class Distilled:
    """The student of ``distill``."""

    row: FinalistRow
    """With error rates only where they compare with the teacher's."""
    system: str
    """What the evaluation calls it."""
    heard_elsewhere: bool
    """It has error rates, of another evaluation than the teacher's."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"distilled {self.row.layout.ratio}"


@dataclass(frozen=True)
class Hearing:
    """The evaluation that heard a run's teacher."""

    identity: str
    sentences: int
    references: Mapping[str, Score]
    """Of codec and teacher, as far as they were heard."""


def distilled_of(run: Run) -> Distilled | None:
    """None where the run has no such student, or only one of an earlier version, without a row."""
    system = distilled_system(run.path)
    if run.distilled is None or system is None:
        return None
    row, hearing = run.distilled, hearing_of(run)
    elsewhere = row.wer is not None and (hearing is None or row.evaluation != hearing.identity)
    if elsewhere:
        row = replace(row, wer=None, cer=None, wer_difference=None, ends=None, metrics={}, alarm=None)
    return Distilled(row, system, elsewhere)


def hearing_of(run: Run) -> Hearing | None:
    """From ``reference.json``, or in a run of ``distill`` alone from the summary of its evaluation.

    Raises:
        InputError: the summary is damaged, or of an earlier version.
    """
    if (reference := run.reference) is not None:
        scores = {CODEC: reference.codec, TEACHER: reference.teacher}
        there = {name: score for name, score in scores.items() if score is not None}
        return Hearing(reference.evaluation, reference.evaluation_sentences, there)
    if run.distilled is None or not (run.path / SUMMARY).exists():
        return None
    systems = read_manifest(run.path / SUMMARY, "evaluation", SCHEMA_VERSION)["systems"]
    if TEACHER not in systems:
        return None
    heard = {name: _score(systems[name]) for name in (CODEC, TEACHER) if name in systems}
    return Hearing(systems[TEACHER]["identity"], systems[TEACHER]["sentences"], heard)


def _score(entry: Mapping[str, Any]) -> Score:
    return Score(ErrorRate(**entry["wer"]), entry["cer"], dict(entry["metrics"]))


def sentence_on(run: Run) -> str | None:
    """For the report's first paragraphs: what became of it."""
    found = distilled_of(run)
    if found is None:
        return None
    row = found.row
    text = f"The student of distill, {row.layout} ({found.name}), has a held-out CE of {row.ce:.3f} (from"
    text += f" {row.ce_start:.3f})"
    if row.wer is not None:
        text += f" and a WER of {100 * row.wer.value:.1f} %"
    again = f"python -m mamtra_ray.evaluate --run {run.path}"
    if found.heard_elsewhere:
        text += f"; it was heard in another evaluation than the teacher: {again} hears both"
    elif row.wer is None and run.config.teacher.speaks:
        text += f"; hear it: {again}"
    return f"{text}."
