"""The cost sections of the report: complexity, memory, cache growth, how the search went and what it cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mamtra_ray import paper_results
from mamtra_ray.correlations import spearman
from mamtra_ray.efficiency import break_even_length, cache_bytes, efficiency_rows, total_parameters
from mamtra_ray.efficiency_architectures import Architecture, attention_layer, cosyvoice2, mamba_layer
from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.report_content import Column, Figure, Row, Section, Table, scaled, with_interval
from mamtra_ray.report_figures import bars, by_rung, cache_growth, cost_front
from mamtra_ray.report_sections import LAYOUT, correlation_columns
from mamtra_ray.run_folder import Run

LOW_RANK_CORRELATION = 0.5
"""Below this a cheap score hardly orders layouts, and the report says so."""

_RATIOS_SHOWN = ("1:1", "1:2", "1:3", "1:5", "1:7", "1:11", "1:15")


def complexity(runs: Sequence[Run]) -> Section:
    """Table 2 and the efficiency columns of Table 3, in numbers for the teacher of these runs."""
    architecture = _architecture(runs)
    if architecture is None:
        return Section("complexity", "Complexity", missing=_NO_ARCHITECTURE)
    length = runs[0].config.search.context_length
    kinds = (("grouped-query attention", attention_layer(architecture)), ("Mamba", mamba_layer(architecture)))
    layers = [
        {
            "layer": name,
            "parameters": layer.parameters,
            "linear_flops": 2 * layer.linear_macs_per_token,
            "attention_flops": 4 * layer.attention_width * length,
            "scan_flops": layer.chunked_scan_flops_per_token,
            "bytes_per_token": 4 * layer.cached_values_per_token,
            "bytes_constant": 4 * (layer.ssm_values + layer.conv_values),
        }
        for name, layer in kinds
    ]
    layer_columns = (
        Column("layer", "one layer"), Column("parameters", "M parameters", scaled("parameters", 1e6, 3)),
        Column("linear_flops", "linear MFLOP/token", scaled("linear_flops", 1e6)),
        Column("attention_flops", f"attention MFLOP/token at {length:,}", scaled("attention_flops", 1e6)),
        Column("scan_flops", "scan MFLOP/token", scaled("scan_flops", 1e6)),
        Column("bytes_per_token", "cache B/token", ",d"), Column("bytes_constant", "fixed cache B", ",d"),
    )  # fmt: skip
    rows = efficiency_rows(architecture, _layouts_by_ratio(architecture), length=length)
    columns = (
        Column("ratio", "ratio"), Column("parameters", "M parameters", scaled("parameters", 1e6)),
        Column("prefill_flops", "GFLOP, paper", scaled("prefill_flops", 1e9, 1)),
        Column("prefill_flops_full", "GFLOP, full", scaled("prefill_flops_full", 1e9, 1)),
        Column("decode_flops", "MFLOP/token", scaled("decode_flops", 1e6, 1)),
        Column("cache_bytes", "cache MB", scaled("cache_bytes", 1e6)),
        Column("break_even_length", "cache smaller above", ",d"),
        Column("break_even_length_with_weights", "with weights", ",d"),
    )  # fmt: skip
    return Section(
        "complexity",
        "Complexity",
        (
            f"Closed form for {architecture.name}, {length:,} tokens, cache in float32. Attention's cost grows with the"
            " context, a Mamba layer's does not; its fixed state, and its larger weights, pay off only above the"
            " contexts (tokens, one sequence) in the last columns.",
        ),
        tables=(
            Table("table_2_complexity", "Table 2 in numbers", layer_columns, layers),
            Table("efficiency", "Efficiency by ratio of attention to Mamba", columns, rows),
        ),
    )


def cache(runs: Sequence[Run]) -> Section:
    """Fig. 5: cache against context for every ratio, with the paper's points where the shape is CosyVoice 2's."""
    architecture = _architecture(runs)
    if architecture is None:
        return Section("cache", "Cache growth", missing=_NO_ARCHITECTURE)
    lengths = sorted({0, *paper_results.FIGURE_5_LENGTHS})
    layouts = _layouts_by_ratio(architecture)
    rows = [
        {"ratio": ratio, "length": length, "cache_bytes": cache_bytes(architecture, layout, length)}
        for ratio, layout in layouts
        for length in lengths
    ]
    published = _published_cache() if _cache_is_cosyvoice2(architecture) else []
    break_even = break_even_length(architecture, layouts[-1][1])
    figure = Figure(
        "figure_5_cache_growth",
        "Fig. 5: cache of one sequence in float32. Mamba layers add a constant, attention layers a slope.",
        "Line plot of cache size against context length, one line per ratio; hybrids start higher and grow slower."
        f" They are smaller than the teacher above {break_even} tokens.",
        cache_growth(rows, published, break_even),
        rows,
        size=(4.9, 3.9),
    )
    return Section("cache", "Cache growth", figures=(figure,))


def memory(runs: Sequence[Run]) -> Section:
    """Fig. 3: weights and cache of teacher and hybrids, and the paper's measured memory."""
    paper = [{"system": name, "GB": value} for name, value in paper_results.FIGURE_3_MEMORY_GB.items()]
    paper_figure = Figure(
        "figure_3_paper",
        "Fig. 3 of the paper: memory on Seed-TTS-eval, NVIDIA A6000 (whole pipeline, not only the language model).",
        "Bars: " + ", ".join(f"{row['system']} {row['GB']} GB" for row in paper) + ".",
        bars(paper, ("GB",), "system", "GB"),
        paper,
        size=(4.9, 2.4),
    )
    architecture = _architecture(runs)
    if architecture is None:
        return Section("memory", "Memory", figures=(paper_figure,), missing=_NO_ARCHITECTURE)
    length = runs[0].config.search.context_length
    rows: list[Row] = [
        {
            "system": "teacher" if ratio == "1:0" else f"hybrid {ratio}",
            "weights": 4 * total_parameters(architecture, layout) / 1e6,
            "cache": cache_bytes(architecture, layout, length) / 1e6,
        }
        for ratio, layout in _layouts_by_ratio(architecture)
    ]
    figure = Figure(
        "figure_3_memory",
        f"Fig. 3 of these runs, in closed form: weights of the language model and cache of one sequence of {length:,}"
        " tokens, float32.",
        "Bars: " + ", ".join(f"{row['system']} {row['weights'] + row['cache']:.1f} MB" for row in rows) + ".",
        bars(rows, ("weights", "cache"), "system", "MB"),
        rows,
        size=(4.9, 1.2 + 0.3 * len(rows)),
    )
    text = (
        "A Mamba mixer has more weights than the attention it replaces and less cache, so the total falls only above"
        " the context in the last column of the efficiency table. python benchmarks/memory.py measures the peak.",
    )
    return Section("memory", "Memory", text, figures=(figure, paper_figure))


def search(runs: Sequence[Run]) -> Section:
    """How the search went: all trials, the front of CE against cost, and whether cheap scores ranked well."""
    trials = [{"run": run.name, **row} for run in runs for row in run.trials]
    if not trials:
        return Section("search", "Search", missing="No trial yet: python -m mamtra_ray.search runs them.")
    figures = [_progress(trials)]
    cost = runs[0].config.search.cost
    if len({row[cost] for row in trials}) > 1:
        front = pareto_front(_highest_rung(trials), cost)
        caption = (
            "Every layout at the highest rung it reached; the joined ones are beaten by none at the last rung"
            " in both cross-entropy and cost."
        )
        description = f"Scatter plot of {len(front)} layouts, CE against {cost}."
        figures.append(Figure("search_front", caption, description, cost_front(front, cost), front))
    run_column = (Column("run", "run"),) if len(runs) > 1 else ()
    columns = (
        *run_column, LAYOUT, Column("origin", "from"), Column("ratio", "ratio"), Column("rung", "rung", "d"),
        Column("tokens", "tokens", ",d"), Column("ce_start", "CE at start", ".3f"), Column("ce", "CE", ".3f"),
        Column("kl", "KL", ".3f"), Column("seconds", "seconds", ".0f"),
    )  # fmt: skip
    rank_columns = (
        *run_column, Column("scores", "scores"), Column("ratio", "ratio"), Column("n", "layouts", "d"),
        Column("spearman", "Spearman [95 %]", with_interval("spearman")), Column("remark", "remark"),
    )  # fmt: skip
    shown = sorted(trials, key=lambda row: (-row["rung"], row["ce"]))
    tables = [Table("trials", "Trials, best first", columns, shown)]
    ranks = [{"run": run.name, **row} for run in runs for row in rank_agreement(run)]
    if ranks:
        tables.insert(0, Table("rank_agreement", "Do cheap scores rank as dearer ones do?", rank_columns, ranks))
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


def ledger(runs: Sequence[Run]) -> Section:
    """What every phase cost."""
    rows = [{"run": run.name, "phase": phase, **amounts} for run in runs for phase, amounts in run.ledger.items()]
    amounts = list(dict.fromkeys(key for row in rows for key in row if key not in ("run", "phase")))
    columns = [Column("phase", "phase")]
    for key in amounts:
        numeric = all(isinstance(row.get(key, 0), int | float) for row in rows)
        columns.append(Column(key, key.replace("_", " "), ",.0f" if numeric else ""))
    if len(runs) > 1:
        columns.insert(0, Column("run", "run"))
    missing = None if rows else "No ledger yet: python -m mamtra_ray.search writes one, phase by phase."
    tables = (
        [Table("ledger", "Wall-clock seconds of every phase, over all sessions", tuple(columns), rows)] if rows else []
    )
    by_rung = [{"run": run.name, **row} for run in runs for row in run.rungs]
    if by_rung:
        caption = (
            "What every rung cost: seconds of its workers, FLOPs as in the plan, bytes kept for others, and the tokens "
            "for which the cache stood in for the teacher's forward pass"
        )
        tables.append(Table("ledger_rungs", caption, _rung_columns(several=len(runs) > 1), by_rung))
    return Section("ledger", "What it cost", tables=tuple(tables), missing=missing)


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
    """Spearman of every cheaper score with the next dearer one, inside each ratio (never pooled over ratios)."""
    stages: list[tuple[str, dict[str, float]]] = [("probe", {row["layout"]: row["ce"] for row in run.probe})]
    for rung in sorted({row["rung"] for row in run.trials}):
        stages.append((f"rung {rung}", {row["layout"]: row["ce"] for row in run.trials if row["rung"] == rung}))
    stages.append(("finalist", {row["layout"]: row["ce"] for row in run.finalists}))
    rows = []
    for (cheap_name, cheap), (dear_name, dear) in itertools.pairwise(stages):
        both = sorted(set(cheap) & set(dear))
        for ratio in sorted({Layout(layout).ratio for layout in both}):
            chosen = [layout for layout in both if Layout(layout).ratio == ratio]
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


_NO_ARCHITECTURE = "These runs do not say the teacher's shape (architecture.json, which the search writes)."


def _architecture(runs: Sequence[Run]) -> Architecture | None:
    return next((run.architecture for run in runs if run.architecture is not None), None)


def _layouts_by_ratio(architecture: Architecture) -> list[tuple[str, Layout]]:
    layers = architecture.num_layers
    fitting = [ratio for ratio in _RATIOS_SHOWN if layers % (1 + int(ratio.split(":")[1])) == 0]
    return [("1:0", Layout("A" * layers))] + [(r, from_strategy("block_beginning", layers, r)) for r in fitting]


def _cache_is_cosyvoice2(architecture: Architecture) -> bool:
    published = cosyvoice2()
    same = (attention_layer(architecture).cached_values_per_token, mamba_layer(architecture).ssm_values)
    wanted = (attention_layer(published).cached_values_per_token, mamba_layer(published).ssm_values)
    return architecture.num_layers == published.num_layers and same == wanted


def _published_cache() -> list[Row]:
    constant, growth = paper_results.FIGURE_5_CONSTANT_MB, paper_results.FIGURE_5_GROWTH_AT_4096_MB
    return [
        {"ratio": ratio, "length": length, "cache_bytes": 1e6 * (constant[ratio] + growth[ratio] * length / 4096)}
        for ratio in paper_results.RATIOS
        for length in paper_results.FIGURE_5_LENGTHS
    ]


def _highest_rung(rows: Sequence[Row]) -> list[Row]:
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["rung"]):
        best[row["layout"]] = row
    return list(best.values())
