"""The cost sections of the report, in closed form: complexity, cache growth, memory."""

from __future__ import annotations

from collections.abc import Sequence

from mamtra_ray.efficiency import break_even_length, cache_bytes, efficiency_rows, total_parameters
from mamtra_ray.efficiency.architectures import Architecture, attention_layer, cosyvoice2, mamba_layer
from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.report import paper_results
from mamtra_ray.report.content import Column, Figure, Row, Section, Table, scaled
from mamtra_ray.report.figures import bars, cache_growth
from mamtra_ray.report.sections import speaks
from mamtra_ray.run.folder import Run

_RATIOS_SHOWN = ("1:1", "1:2", "1:3", "1:5", "1:7", "1:11", "1:15")


def complexity(runs: Sequence[Run]) -> Section:
    """Table 2 and the efficiency columns of Table 3, in numbers for the teacher of these runs."""
    architecture = _architecture(runs)
    if architecture is None:
        return Section("complexity", "Complexity", missing=_NO_ARCHITECTURE)
    length = runs[0].config.context_length
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
    """Fig. 5: cache against context for every ratio, and the paper's points on the closed form of its shape."""
    paper_figures = (_paper_cache(),) if speaks(runs) else ()
    architecture = _architecture(runs)
    if architecture is None:
        return Section("cache", "Cache growth", figures=paper_figures, missing=_NO_ARCHITECTURE)
    layouts = _layouts_by_ratio(architecture)
    rows = _cache_rows(architecture, layouts)
    break_even = break_even_length(architecture, layouts[-1][1])
    figure = Figure(
        "figure_5_cache_growth",
        "Fig. 5 of these runs: cache of one sequence, float32. Mamba layers add a constant, attention layers a slope.",
        "Line plot of cache size against context length, one line per ratio; hybrids start higher and grow slower."
        f" They are smaller than the teacher above {break_even} tokens.",
        cache_growth(rows, (), break_even),
        rows,
        size=(4.9, 3.9),
    )
    return Section("cache", "Cache growth", figures=(figure, *paper_figures))


def _cache_rows(architecture: Architecture, layouts: Sequence[tuple[str, Layout]]) -> list[Row]:
    return [
        {"ratio": ratio, "length": length, "cache_bytes": cache_bytes(architecture, layout, length)}
        for ratio, layout in layouts
        for length in (0, *paper_results.FIGURE_5_LENGTHS)
    ]


def _paper_cache() -> Figure:
    """The paper's Fig. 5 over the closed form of CosyVoice 2's shape."""
    architecture = cosyvoice2()
    kept = {ratio: Layout.from_attention_layers(a, 24) for ratio, a in paper_results.ATTENTION_LAYERS_KEPT.items()}
    layouts = [("1:0", Layout.all_attention(24)), *kept.items()]
    published = [
        {"ratio": ratio, "length": length, "cache_bytes": 1e6 * (constant + growth * length / 4096)}
        for ratio in paper_results.RATIOS
        for constant, growth in [
            (paper_results.FIGURE_5_CONSTANT_MB[ratio], paper_results.FIGURE_5_GROWTH_AT_4096_MB[ratio])
        ]
        for length in paper_results.FIGURE_5_LENGTHS
    ]
    return Figure(
        "figure_5_paper",
        "Fig. 5 of the paper (crosses: constant and growth added up) on the closed form of CosyVoice 2's shape (lines)."
        " The crosses lie up to 0.7 MB higher: its Mamba layers keep 8 unused bytes per token.",
        "Line plot of cache size against context length for the teacher and four ratios, with the paper's points.",
        cache_growth(_cache_rows(architecture, layouts), published, break_even_length(architecture, kept["1:1"])),
        published,
        size=(4.9, 3.9),
    )


def memory(runs: Sequence[Run]) -> Section:
    """Fig. 3: weights and cache of teacher and hybrids, and the paper's measured memory."""
    paper_figures = (_paper_memory(),) if speaks(runs) else ()
    architecture = _architecture(runs)
    if architecture is None:
        return Section("memory", "Memory", figures=paper_figures, missing=_NO_ARCHITECTURE)
    length = runs[0].config.context_length
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
    return Section("memory", "Memory", text, figures=(figure, *paper_figures))


def _paper_memory() -> Figure:
    """The paper's Fig. 3."""
    rows = [{"system": name, "GB": value} for name, value in paper_results.FIGURE_3_MEMORY_GB.items()]
    return Figure(
        "figure_3_paper",
        "Fig. 3 of the paper: memory on Seed-TTS-eval, NVIDIA A6000 (whole pipeline, not only the language model).",
        "Bars: " + ", ".join(f"{row['system']} {row['GB']} GB" for row in rows) + ".",
        bars(rows, ("GB",), "system", "GB"),
        rows,
        size=(4.9, 2.4),
    )


_NO_ARCHITECTURE = "These runs do not say the teacher's shape (architecture.json, which the search writes)."


def _architecture(runs: Sequence[Run]) -> Architecture | None:
    return next((run.architecture for run in runs if run.architecture is not None), None)


def _layouts_by_ratio(architecture: Architecture) -> list[tuple[str, Layout]]:
    layers = architecture.num_layers
    fitting = [ratio for ratio in _RATIOS_SHOWN if layers % (1 + int(ratio.split(":")[1])) == 0]
    return [("1:0", Layout.all_attention(layers))] + [(r, from_strategy("block_beginning", layers, r)) for r in fitting]
