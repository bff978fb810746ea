"""The search sections of the report: how it went, whether its cheap scores ranked well, what it cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from mamtra_ray import efficiency
from mamtra_ray.efficiency.architectures import Architecture
from mamtra_ray.layouts import Layout
from mamtra_ray.report.content import Column, Figure, Row, Section, Table, as_rows, percent, with_interval
from mamtra_ray.report.figures import by_rung, cost_front
from mamtra_ray.report.naming import finalist_names
from mamtra_ray.report.sections import GAIN, LAYOUT, WER, correlation_columns
from mamtra_ray.run.folder import Run
from mamtra_ray.run.rows import is_worse_than_start
from mamtra_ray.surrogate.correlations import spearman

LOW_RANK_CORRELATION = 0.5
"""Below this a cheap score hardly orders layouts, and the report says so."""


def search(runs: Sequence[Run]) -> Section:
    """How the search went: all trials, the front of CE against cost, and whether cheap scores ranked well."""
    trials = [
        {
            "run": run.name,
            **row,
            "finalist": finalist_names(run).get(trial.layout, ""),
            "ce_gain": trial.ce_start - trial.ce,
            "remark": "worse than at its start" if is_worse_than_start(trial) else "",
        }
        for run in runs
        for trial, row in zip(run.trials, as_rows(run.trials), strict=True)
    ]
    if not trials:
        return Section("search", "Search", missing="No trial yet: python -m mamtra_ray.search runs them.")
    figures = [_progress(trials)]
    cost = runs[0].config.search.cost
    compared = [*_highest_rung(trials), *_teachers(runs, cost, max(row["rung"] for row in trials))]
    if len({row[cost] for row in compared}) > 1:
        front = pareto_front(compared, cost)
        caption = (
            "Every layout at the highest rung it reached, and the teacher; the joined ones are beaten by none at the"
            " last rung in both cross-entropy and cost."
        )
        description = f"Scatter plot of {len(front)} layouts, CE against {cost}."
        figures.append(Figure("search_front", caption, description, cost_front(front, cost), front))
    run_column = (Column("run", "run"),) if len(runs) > 1 else ()
    # At the last rung, where trials speak (search.sentences).
    spoken = any(row.get("wer") is not None for row in trials)
    heard = (WER, Column("token_error_rate", "token errors %", percent("token_error_rate"))) if spoken else ()
    columns = (
        *run_column, LAYOUT, Column("finalist", "finalist"), Column("origin", "from"),
        Column("ratio", "ratio"), Column("rung", "rung", "d"),
        Column("tokens", "tokens", ",d"), Column("ce_start", "CE at start", ".3f"), Column("ce", "CE", ".3f"), GAIN,
        Column("kl_start", "KL at start", ".3f"), Column("kl", "KL", ".3f"), Column("remark", "remark"),
        *heard, Column("seconds", "seconds", ".0f"),
    )  # fmt: skip
    rank_columns = (
        *run_column, Column("scores", "scores"), Column("ratio", "ratio"), Column("n", "layouts", "d"),
        Column("spearman", "Spearman [95 %]", with_interval("spearman")), Column("remark", "remark"),
    )  # fmt: skip
    shown = sorted(trials, key=lambda row: (-row["rung"], row["ce"]))
    tables = [Table("trials", "Trials, best first", columns, shown)]
    ranks = [{"run": run.name, **row} for run in runs for row in rank_agreement(run)]
    if ranks:
        tables.insert(0, Table("rank_agreement", "Do cheap scores rank as expensive ones do?", rank_columns, ranks))
    return Section("search", "Search", tables=tuple(tables), figures=tuple(figures))


def _progress(trials: Sequence[Row]) -> Figure:
    """From the start through the rungs: what a few thousand tokens tell about the order of layouts."""
    rows = []
    for row in sorted(trials, key=lambda row: row["rung"]):
        named = {"trial": f"{row['run']} {row['layout']}", "origin": row["origin"]}
        if row["rung"] == 0:
            rows.append({**named, "tokens": 0, "ce": row["ce_start"]})
        rows.append({**named, "tokens": row["tokens"], "ce": row["ce"]})
    return Figure(
        "search_progress",
        "Every trial from its start through the rungs it reached, by where its layout came from (held-out CE).",
        f"Line plot of {len({row['trial'] for row in rows})} trials.",
        by_rung(rows),
        rows,
    )


def costs(runs: Sequence[Run]) -> Section:
    """What every phase cost."""
    rows = [{"run": run.name, "phase": phase, **amounts} for run in runs for phase, amounts in run.phases.items()]
    amounts = list(dict.fromkeys(key for row in rows for key in row if key not in ("run", "phase")))
    columns = [Column("phase", "phase")]
    for key in amounts:
        numeric = all(isinstance(row.get(key, 0), int | float) for row in rows)
        columns.append(Column(key, key.replace("_", " "), ",.0f" if numeric else ""))
    if len(runs) > 1:
        columns.insert(0, Column("run", "run"))
    missing = None if rows else "No costs yet: python -m mamtra_ray.search writes one, phase by phase."
    tables = (
        [Table("costs", "Wall-clock seconds of every phase, over all sessions", tuple(columns), rows)] if rows else []
    )
    by_rung = [{"run": run.name, **row} for run in runs for row in run.rungs]
    if by_rung:
        caption = (
            "What every rung cost: seconds of its workers, FLOPs as in the plan, bytes kept for others, and the tokens "
            "for which the cache stood in for the teacher's forward pass"
        )
        tables.append(Table("costs_by_rung", caption, _rung_columns(several=len(runs) > 1), by_rung))
    return Section("costs", "What it cost", tables=tuple(tables), missing=missing)


def _rung_columns(several: bool) -> tuple[Column, ...]:
    columns = (
        Column("rung", "rung"), Column("layouts", "layouts", ",.0f"), Column("tokens", "tokens", ",.0f"),
        Column("seconds", "seconds", ",.0f"), Column("tflop", "TFLOP", ",.2f"), Column("bytes", "bytes", ",.0f"),
        Column("teacher_tokens_saved", "teacher tokens saved", ",.0f"),
    )  # fmt: skip
    return (Column("run", "run"), *columns) if several else columns


def pareto_front(rows: Sequence[Row], cost: str) -> list[Row]:
    """``rows`` with ``on_front``: of those at the last rung, none is as good in ``ce`` and ``cost`` and better in one.

    Layouts that were stopped earlier saw fewer tokens; their CE compares with nothing at the last rung.
    """
    last_rung = max(row["rung"] for row in rows)

    def is_beaten(row: Row) -> bool:
        return row["rung"] < last_rung or any(
            other["ce"] <= row["ce"]
            and other[cost] <= row[cost]
            and (other["ce"], other[cost]) != (row["ce"], row[cost])
            for other in rows
            if other["rung"] == last_rung
        )

    return [{**row, "on_front": not is_beaten(row)} for row in rows]


def rank_agreement(run: Run) -> list[Row]:
    """Spearman of every score with the next more expensive one, inside each ratio (never pooled over ratios)."""
    stages: list[tuple[str, dict[Layout, float]]] = [("probe", {row.layout: row.ce for row in run.probe})]
    for rung in sorted({row.rung for row in run.trials}):
        stages.append((f"rung {rung}", {row.layout: row.ce for row in run.trials if row.rung == rung}))
    stages.append(("finalist", {row.layout: row.ce for row in run.finalists}))
    rows = []
    for (cheap_name, cheap), (dear_name, dear) in itertools.pairwise(stages):
        both = sorted(set(cheap) & set(dear))
        for ratio in sorted({layout.ratio for layout in both}):
            chosen = [layout for layout in both if layout.ratio == ratio]
            agreement = spearman([cheap[layout] for layout in chosen], [dear[layout] for layout in chosen])
            if agreement.value is None:
                remark = "too few layouts"
            elif agreement.value < LOW_RANK_CORRELATION:
                remark = "low: the cheaper score is a weak guide here"
            else:
                remark = ""
            row = {"scores": f"{cheap_name} and {dear_name}", "ratio": ratio, "n": agreement.n, "remark": remark}
            rows.append(row | correlation_columns("spearman", agreement))
    return rows


def _teachers(runs: Sequence[Run], cost: str, rung: int) -> list[Row]:
    """Where every run's teacher stands: even the layouts of one ratio have something to be compared with."""
    of_layout: dict[str, Callable[[Architecture, Layout, int], float]] = {
        "cache_bytes": efficiency.cache_bytes,
        "decode_flops": efficiency.decode_flops,
        "parameters": lambda architecture, layout, _: efficiency.parameters(architecture, layout),
    }
    rows = []
    for run in runs:
        if run.reference is not None and run.architecture is not None:
            layout = Layout.all_attention(run.architecture.num_layers)
            amount = of_layout[cost](run.architecture, layout, run.config.context_length)
            place = {"layout": str(layout), "ratio": layout.ratio, "origin": "teacher", "rung": rung}
            rows.append({"run": run.name, **place, "ce": run.reference.teacher_ce, cost: amount})
    return rows


def _highest_rung(rows: Sequence[Row]) -> list[Row]:
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["rung"]):
        best[row["layout"]] = row
    return list(best.values())
