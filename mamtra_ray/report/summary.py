"""The report's first paragraphs: what was found, whether it is good, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mamtra_ray.efficiency import cache_bytes
from mamtra_ray.evaluate.alarms import Measured
from mamtra_ray.evaluate.run_scores import choose_best, measured_of
from mamtra_ray.evaluate.verdict import Outcome, verdict
from mamtra_ray.layouts import Layout
from mamtra_ray.report.distilled import sentence_on
from mamtra_ray.report.naming import exported_layouts, finalist_names, placement
from mamtra_ray.run.folder import Reference, Run
from mamtra_ray.run.names import TEACHER
from mamtra_ray.run.rows import FinalistRow


def summary(runs: Sequence[Run]) -> tuple[str, ...]:
    """Short paragraphs: of every run what was done, one for each ratio, what to do next."""
    paragraphs: list[str] = []
    for run in runs:
        first, *rest = _of_run(run)
        paragraphs += [f"{run.name}: {first}" if len(runs) > 1 else first, *rest]
    return tuple(paragraphs)


def _of_run(run: Run) -> list[str]:
    tried = len({row.layout for row in run.trials})
    distilled = [text for text in [sentence_on(run)] if text]
    if distilled and not run.finalists and not run.trials:
        return distilled
    if not run.finalists or run.reference is None or run.architecture is None:
        go_on = f"python -m mamtra_ray.search --resume --run {run.path}"
        return [f"Nothing is found yet; {tried} layouts were tried.", *distilled, f"Next: go on with {go_on}"]
    best = best_of_ratios(run)
    return [
        f"Of {tried} layouts tried, {len(run.finalists)} were distilled to the end.",
        *(_verdict(run, run.reference, row) + _against_the_paper(run, row) for row in best),
        *distilled,
        f"Next: {_next(run, run.reference, best)}",
    ]


def best_of_ratios(run: Run) -> list[FinalistRow]:
    """The exported finalist of every ratio; where none is exported, the one that would be."""
    exported, best = exported_layouts(run), []
    there = [row.layout.ratio for row in run.finalists]
    for ratio in dict.fromkeys([*(ratio for ratio in run.config.search.ratios if ratio in there), *there]):
        same_ratio = [row for row in run.finalists if row.layout.ratio == ratio]
        best.append(next((row for row in same_ratio if row.layout in exported), None) or choose_best(same_ratio))
    return best


def _verdict(run: Run, reference: Reference, row: FinalistRow) -> str:
    assert run.architecture is not None
    whole = cache_bytes(run.architecture, Layout.all_attention(row.layout.num_layers), run.config.context_length)
    outcome = Outcome(
        best=replace(measured_of(row), system=f"{row.layout} ({finalist_names(run)[row.layout]})"),
        alarm=row.alarm,
        is_any_without_alarm=any(not one.alarm for one in run.finalists if one.layout.ratio == row.layout.ratio),
        difference=row.wer_difference,
        cache_share=row.cache_bytes / whole,
        speaks=run.config.teacher.speaks,
    )
    score = reference.teacher
    teacher = Measured(TEACHER, reference.teacher_ce, score.wer if score else None)
    return verdict(outcome, teacher, reference.teacher_alarm, reference.evaluation_sentences)


def _against_the_paper(run: Run, row: FinalistRow) -> str:
    """Whether the search was worth it: beside the best of the paper's placements at the same ratio."""
    others = [
        one
        for one in run.finalists
        if one.layout.ratio == row.layout.ratio and one is not row and placement(one.origin) not in ("found", "own")
    ]
    if not others:
        return "."
    other = min(others, key=lambda one: one.ce)
    name = finalist_names(run)[other.layout]
    if placement(row.origin) not in ("found", "own"):
        return f"; no found layout was chosen before it; the next best placement, {name}, has CE {other.ce:.3f}."
    better = "below" if row.ce < other.ce else "not below"
    return f"; its CE of {row.ce:.3f} is {better} the {other.ce:.3f} of the paper's best placement, {name}."


def _next(run: Run, reference: Reference, best: Sequence[FinalistRow]) -> str:
    """What a user does now."""
    if reference.teacher_alarm:
        return "see why the teacher itself is not understood (recognizer, codec, language) before anything is compared."
    if all(row.alarm for row in best):
        return (
            "do not use these; in another run train longer (distill.tokens) or keep more attention (search.ratios), "
            "and see docs/evaluation.md for what the alarm means."
        )
    if run.config.teacher.speaks and all(row.wer is None for row in best):
        return (
            f"hear it: python -m mamtra_ray.evaluate --run {run.path} evaluate.sentences=100, then this report again."
        )
    if any(row.wer_difference is not None and row.wer_difference.low > 0 for row in best):
        return (
            "where it is worse than the teacher, train longer (distill.tokens), try more layouts (search.trials) or "
            "keep more attention (search.ratios)."
        )
    listen = "listen to it below; then " if run.config.teacher.speaks else ""
    return f"{listen}load {run.path / 'best'} as the README.md in it says."
