"""The paper's tables and figures for your own runs, beside the published numbers.

One ``report.html`` that works offline (with the audio in it), and ``report/`` with every table as CSV and every figure
as PNG and CSV. Sections whose input no run holds say what would produce it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mamtra_ray.efficiency import break_even_length, cache_bytes
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.listening_test.opinion_scores import OpinionScore, read_scores
from mamtra_ray.report import comparisons as report_comparisons
from mamtra_ray.report import costs as report_costs
from mamtra_ray.report import lengths as report_lengths
from mamtra_ray.report import search as report_search
from mamtra_ray.report import sections as report_sections
from mamtra_ray.report.comparisons import naturalness
from mamtra_ray.report.content import Report
from mamtra_ray.report.distilled import distilled_of
from mamtra_ray.report.naming import finalist_names
from mamtra_ray.report.page import check_files, write_files, write_page
from mamtra_ray.report.summary import best_of_ratios, summary
from mamtra_ray.run.folder import Run, read_runs
from mamtra_ray.run.names import REPORT

SECTIONS = (
    report_sections.systems,
    report_sections.audio,
    report_sections.layouts,
    report_sections.ce_and_wer,
    report_lengths.wer_by_length,
    report_search.search,
    report_costs.complexity,
    report_costs.cache,
    report_costs.memory,
    report_comparisons.convergence_by_initialization,
    report_comparisons.loss_ablation,
    report_search.costs,
)
OF_SPEECH = (report_sections.audio, report_sections.ce_and_wer, report_lengths.wer_by_length)
"""Left out of a report on models of text, and so is the listening test."""


def write_report(run_dirs: Sequence[Path], output: Path, listening_test: Path | None = None) -> Path:
    """Write the report of one or several runs.

    Args:
        run_dirs: run folders; the first one gives the title and the architecture.
        output: a folder (gets ``report.html`` and ``report/``) or a path that ends in ``.html`` (``report/`` is
            then named after it).
        listening_test: folder of a scored listening test.

    Returns:
        The path of the page.

    Raises:
        InputError: a folder that is no run, a damaged file in one, an ``output`` that cannot be a folder, or files of
            somebody else's where the report would be.
    """
    report = build_report(read_runs(run_dirs), read_scores(listening_test) if listening_test else ())
    page = check_output(report, output)
    try:
        page.with_suffix("").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"no report can be written to {page}: {error.strerror} ({error.filename})") from None
    write_files(report, page.with_suffix(""))
    write_page(report, page.with_suffix(""))
    return page


def check_output(report: Report, output: Path) -> Path:
    """Where the page of ``report`` will be: ``output``, or ``report.html`` in it.

    Raises:
        InputError: something else than an earlier report would be overwritten.
    """
    page = output if output.suffix == ".html" else output / REPORT
    check_files(report, page.with_suffix(""))
    return page


def build_report(runs: Sequence[Run], scores: Sequence[OpinionScore] = ()) -> Report:
    """All sections for ``runs``, before they become files."""
    if not runs:
        raise InputError("a report needs at least one run folder: --run DIR")
    first = runs[0]
    is_speech = report_sections.speaks(runs)
    sections = [section(runs) for section in SECTIONS if is_speech or section not in OF_SPEECH]
    if is_speech:
        sections.insert(2, naturalness(scores))
    trials = sum(len({row.layout for row in run.trials}) for run in runs)
    finalists = sum(len(run.finalists) for run in runs)
    by_hand = sum(distilled_of(run) is not None for run in runs)
    return Report(
        title=f"{first.name}: Mamba hybrids of {_teacher_name(first)}",
        subtitle=f"{_names(runs)}; {trials} layouts tried, {finalists} distilled to the end"
        f"{f', {by_hand} by distill' if by_hand else ''}.",
        summary=summary(runs),
        facts=_facts(first),
        alarms=tuple(alarm for run in runs for alarm in _alarms(run, several=len(runs) > 1)),
        sections=tuple(sections),
    )


def _teacher_name(run: Run) -> str:
    """A kind that is one model's says enough; of others the folder's name does."""
    if run.config.teacher.kind == "causal_lm" and run.architecture is not None:
        return run.architecture.name
    return run.config.teacher.kind


def _names(runs: Sequence[Run]) -> str:
    return ("run " if len(runs) == 1 else "runs ") + ", ".join(str(run.path) for run in runs)


def _alarms(run: Run, several: bool) -> list[str]:
    """One sentence per system with an alarm; which is the exported one is said."""
    names = finalist_names(run)
    texts = {f"{row.layout} ({names[row.layout]})": row.alarm for row in run.finalists}
    if (student := distilled_of(run)) is not None:
        texts[f"{student.row.layout} ({student.name})"] = student.row.alarm
    if run.reference is not None:
        texts["the teacher"] = run.reference.teacher_alarm
    place = f"{run.name}: " if several else ""
    return [f"{place}{system} {text}." for system, text in texts.items() if text]


def _facts(run: Run) -> tuple[tuple[str, str, str], ...]:
    """The outcome in a few figures: the exported finalist of the first ratio against the teacher."""
    if not run.finalists:
        return ()
    best = best_of_ratios(run)[0]
    facts = [("best layout", str(best.layout), finalist_names(run)[best.layout])]
    teacher = run.reference.teacher if run.reference else None
    if best.wer is not None:
        beside = f"; teacher {100 * teacher.wer.value:.1f} %" if teacher else ""
        interval = f"95 %: {100 * best.wer.low:.1f} to {100 * best.wer.high:.1f}"
        facts.append(("word error rate", f"{100 * best.wer.value:.1f} %", interval + beside))
    beside = f"teacher {run.reference.teacher_ce:.3f}" if run.reference else "nats per token"
    facts.append(("held-out cross-entropy", f"{best.ce:.3f}", beside))
    if run.architecture is not None:
        length = run.config.context_length
        layout, all_attention = best.layout, Layout.all_attention(best.layout.num_layers)
        hybrid = cache_bytes(run.architecture, layout, length)
        saving = 1 - hybrid / cache_bytes(run.architecture, all_attention, length)
        above = break_even_length(run.architecture, layout)
        facts.append(("cache", f"{-100 * saving:+.0f} %", f"at {length:,} tokens; smaller only above {above:,}"))
    return tuple(facts)
