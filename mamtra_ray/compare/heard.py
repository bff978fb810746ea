"""What was heard of the students of several runs, read from their ``evaluation/`` folders and compared in pairs.

Rates are fractions. Two evaluations may be compared where they were of the same sentences, and spoken, heard and
normalized in the same way by the same versions of whatever decides about it. Seeds and teachers may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from mamtra_ray.artifacts import content_hash, read_json, read_manifest
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.results import SCHEMA_VERSION, SUMMARY, Evaluation, compare, read_rows, rows_file, scored
from mamtra_ray.run.distilled import distilled_system, read_distilled
from mamtra_ray.run.folder import Run
from mamtra_ray.run.names import CODEC, TEACHER
from mamtra_ray.run.rows import FinalistRow
from mamtra_ray.speech.wer import PairedDifference

_OF_THE_HEARING = ("corpus", "code", "versions")
"""Keys of an evaluation's ``made_by`` beside its settings, which ``settings`` has in words."""


@dataclass(frozen=True)
class Heard:
    """One system of one run."""

    run: str
    system: str
    evaluation: Evaluation
    row: FinalistRow | None
    """What the run's tables say of it; None for the teacher."""

    @property
    def name(self) -> str:
        """Of the run and in it."""
        return f"{self.run}: {self.system}"


@dataclass(frozen=True)
class Pair:
    """``a`` against ``b``, both resampled together."""

    a: Heard
    b: Heard
    paired: PairedDifference

    @property
    def verdict(self) -> str:
        """In words: an interval that holds 0 tells nothing apart."""
        difference = self.paired.difference
        if difference.low <= 0 <= difference.high:
            return "not told apart"
        return "worse" if difference.low > 0 else "better"


def heard_in(runs: Sequence[Run], *, all_finalists: bool = False) -> list[Heard]:
    """Teacher and students of every run: the exported finalist and the student of ``distill``, or all finalists.

    A teacher that the first run has too, and that said the same, is left out.

    Raises:
        InputError: a run without an evaluation or without a heard student, a damaged one, or evaluations that do not
            compare.
    """
    first: tuple[Run, dict[str, Any], list[str]] | None = None
    found: list[Heard] = []
    for run in runs:
        summary = _read_summary(run)
        chosen = _students(run, summary, all_finalists)
        rows = {name: _rows(run, summary, name) for name in (TEACHER, *chosen)}
        sentences = [f"{row['utterance_id']}: {row['text']}" for row in rows[TEACHER]]
        if first is None:
            first = (run, summary, sentences)
        _check_alike(first, (run, summary, sentences))
        evaluations = scored(rows, summary["settings"]["normalization"])
        for name, evaluation in evaluations.items():
            heard = Heard(run.name, name, evaluation, chosen.get(name))
            if name != TEACHER or not any(_is_same(heard, other) for other in found):
                found.append(heard)
    return found


def pairs_of(heard: Sequence[Heard]) -> list[Pair]:
    """Every student against every other one."""
    students = [one for one in heard if one.system != TEACHER]
    # Each evaluation under a name that says its run too, for the sentence about two that do not compare.
    named = {one.name: replace(one.evaluation, system=one.name) for one in students}
    return [Pair(a, b, compare(named[a.name], named[b.name])) for a, b in combinations(students, 2)]


def _read_summary(run: Run) -> dict[str, Any]:
    path = run.path / SUMMARY
    again = f"python -m mamtra_ray.evaluate --run {run.path}"
    if not path.exists():
        raise InputError(f"{run.path} has no evaluation to compare ({SUMMARY}): {again}")
    content = read_json(path)
    if isinstance(content, dict) and content.get("schema_version") in range(1, SCHEMA_VERSION):
        raise InputError(f"{path} is of an earlier version, which did not say how was heard: {again} writes it anew")
    return read_manifest(path, "evaluation", SCHEMA_VERSION)


def _students(run: Run, summary: dict[str, Any], all_finalists: bool) -> dict[str, FinalistRow | None]:
    """Systems to compare, with their rows: those that the last evaluation heard."""
    rows: dict[str, FinalistRow | None] = {
        str(row.layout): row for row in run.finalists if all_finalists or row.layout == run.best_layout
    }
    if (distilled := distilled_system(run.path)) is not None:
        rows[distilled] = read_distilled(run.path)
    students = {name: row for name, row in rows.items() if name in summary["systems"]}
    if not students and not all_finalists:
        # Nothing is exported yet, or what was heard were models given by --system.
        named = [name for name in summary["systems"] if name not in (TEACHER, CODEC)]
        known = {str(row.layout): row for row in run.finalists}
        students = {name: known.get(name) for name in named}
    if not students:
        raise InputError(f"no student of {run.path} was heard: python -m mamtra_ray.evaluate --run {run.path}")
    return students


def _rows(run: Run, summary: dict[str, Any], system: str) -> list[dict[str, Any]]:
    """The sentences of the run's last evaluation; those of an earlier, longer one follow them in the file."""
    entry = summary["systems"][system]
    rows = read_rows(run.path, system)[: entry["sentences"]]
    ids = [row["utterance_id"] for row in rows]
    if entry["identity"] != content_hash([summary["made_by"], summary["settings"]["normalization"], ids]):
        raise InputError(
            f"{rows_file(run.path, system)} is not of the evaluation that {run.path / SUMMARY} sums up: "
            f"python -m mamtra_ray.evaluate --run {run.path} writes both anew"
        )
    return rows


def _check_alike(first: tuple[Run, dict[str, Any], list[str]], other: tuple[Run, dict[str, Any], list[str]]) -> None:
    (run, summary, sentences), (other_run, other_summary, other_sentences) = first, other
    where = f"{run.path} and {other_run.path}"
    settings, other_settings = summary["settings"], other_summary["settings"]
    for key in settings:
        if settings[key] != other_settings.get(key):
            raise InputError(
                f"{where} do not compare: evaluate.{key} was {settings[key]!r} and {other_settings.get(key)!r}; "
                "evaluate one of them again with the other's"
            )
    if sentences != other_sentences:
        raise InputError(
            f"{where} do not compare: they were heard with other sentences ({len(sentences)} and "
            f"{len(other_sentences)}); evaluate one again with the other's evaluate.sentences, corpus and corpus.seed"
        )
    for key in _OF_THE_HEARING:
        if summary["made_by"][key] != other_summary["made_by"][key]:
            raise InputError(
                f"{where} do not compare: the {key} of their evaluations differ ({summary['made_by'][key]} and "
                f"{other_summary['made_by'][key]}); evaluate the older one again"
            )


def _is_same(a: Heard, b: Heard) -> bool:
    """Whether two teachers said and were heard the same, sentence by sentence."""

    def said(heard: Heard) -> list[tuple[Any, ...]]:
        return [(row["utterance_id"], row["speech_tokens"], row["hypothesis"]) for row in heard.evaluation.rows]

    return b.system == TEACHER and said(a) == said(b)
