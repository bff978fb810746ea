"""The report's pictures, by matplotlib: drawn for a light and for a dark page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter

from mamtra_ray.report.content import Figure, Row, Theme

# Hues that stay apart for the common color deficiencies; one ratio or initialization each.
LIGHT = Theme(
    "light", "#ffffff", "#1c2530", "#d8dee6", ("#0b62a8", "#c75a00", "#13795b", "#8a3f9e", "#8c6d00", "#b3264a")
)
DARK = Theme(
    "dark", "#151b23", "#e4e9ef", "#39434f", ("#6db6f2", "#f5a35c", "#58c7a0", "#d39be3", "#dcc15a", "#f28aa5")
)

MARKERS = {
    "block beginning": "o",
    "block end": "s",
    "front": "^",
    "middle": "D",
    "back": "v",
    "sandwich": "P",
    "importance wer": "X",
    "importance cosine": "p",
    "importance kl": "h",
    "wer": "X",
    "cosine": "p",
    "own": "d",
    "found": "*",
}
"""One per placement, as :mod:`mamtra_ray.report.naming` calls it; a found layout is a star."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "mamtra_ray",
}


def rendered(figure: Figure, theme: Theme, file_format: str) -> bytes:
    """The picture as ``svg`` or ``png`` bytes (PNG at 200 dots an inch)."""
    colours: dict[Any, Any] = {
        "text.color": theme.ink,
        "axes.edgecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.faint,
    }
    with matplotlib.rc_context({**_STYLE, **colours}):
        picture = MatplotlibFigure(figsize=figure.size, layout="constrained")
        FigureCanvasSVG(picture) if file_format == "svg" else FigureCanvasAgg(picture)
        figure.draw(picture, theme)
        content = io.BytesIO()
        metadata = {"Date": None} if file_format == "svg" else {}
        picture.savefig(content, format=file_format, dpi=200, metadata=metadata)
    return content.getvalue()


def ce_against_wer(
    rows: Sequence[Row], teacher: tuple[float, float] | None
) -> Callable[[MatplotlibFigure, Theme], None]:
    """Fig. 4: rows with strategy, ratio, ce, wer (and wer_low, wer_high); ``teacher`` is its (ce, wer)."""

    def draw(picture: MatplotlibFigure, theme: Theme) -> None:
        axes = picture.subplots()
        ratios = _in_order(row["ratio"] for row in rows)
        strategies = _in_order(row["strategy"] for row in rows)
        for row in rows:
            colour = _colour(theme, ratios.index(row["ratio"]))
            low, high = row.get("wer_low"), row.get("wer_high")
            wer = 100 * row["wer"]
            if low is not None and high is not None:
                axes.plot([row["ce"]] * 2, [100 * low, 100 * high], color=colour, alpha=0.4, linewidth=1, zorder=2)
            marker = MARKERS.get(row["strategy"], "o")
            size = 130 if marker == "*" else 42
            axes.scatter(
                row["ce"], wer, s=size, marker=marker, color=colour, edgecolor=theme.background, linewidth=0.4, zorder=3
            )
        if teacher is not None:
            axes.scatter(teacher[0], 100 * teacher[1], s=60, marker="h", color=theme.ink, zorder=3)
            axes.annotate("teacher", (teacher[0], 100 * teacher[1]), xytext=(6, 4), textcoords="offset points")
        _log_if_wide(axes, [100 * row["wer"] for row in rows])
        axes.set_xlabel("cross-entropy (nats per token)")
        axes.set_ylabel("WER (%)")
        axes.grid(True, linewidth=0.6)
        marks = [_mark(MARKERS.get(s, "o"), theme.ink, s.replace("_", " ")) for s in strategies]
        marks += [_mark("s", _colour(theme, i), ratio) for i, ratio in enumerate(ratios)]
        picture.legend(handles=marks, loc="outside lower center", ncols=3, handletextpad=0.2, columnspacing=1.2)

    return draw


def cache_growth(
    rows: Sequence[Row], published: Sequence[Row], break_even: int | None
) -> Callable[[MatplotlibFigure, Theme], None]:
    """Fig. 5: rows with ratio, length, cache_bytes; ``published`` points of the paper are drawn as crosses."""

    def draw(picture: MatplotlibFigure, theme: Theme) -> None:
        axes = picture.subplots()
        for index, (ratio, line) in enumerate(_by(rows, "ratio")):
            colour = theme.ink if ratio == "1:0" else _colour(theme, index - 1)
            label = "teacher (1:0)" if ratio == "1:0" else ratio
            x, y = [row["length"] for row in line], [row["cache_bytes"] / 1e6 for row in line]
            axes.plot(x, y, color=colour, linewidth=2, label=label, linestyle="--" if ratio == "1:0" else "-")
            crosses = [row for row in published if row["ratio"] == ratio]
            axes.scatter(
                [row["length"] for row in crosses], [row["cache_bytes"] / 1e6 for row in crosses],
                marker="x", s=28, color=colour, zorder=3,
            )  # fmt: skip
        if break_even is not None:
            axes.axvline(break_even, color=theme.ink, linewidth=0.8, linestyle=":")
            axes.annotate(
                f"hybrids smaller\nabove {break_even:,} tokens", (break_even, 1), xycoords=("data", "axes fraction"),
                xytext=(5, -2), textcoords="offset points", va="top", fontsize=9,
            )  # fmt: skip
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel("cache (MB)")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.grid(True, linewidth=0.6)
        handles, _ = axes.get_legend_handles_labels()
        if published:
            handles.append(_mark("x", theme.ink, "paper, Fig. 5"))
        picture.legend(handles=handles, loc="outside lower center", ncols=3)

    return draw


def convergence(rows: Sequence[Row], unit: str) -> Callable[[MatplotlibFigure, Theme], None]:
    """Fig. 6: rows with series, tokens, ce; one line per series, ordered by tokens."""

    def draw(picture: MatplotlibFigure, theme: Theme) -> None:
        axes = picture.subplots()
        for index, (series, line) in enumerate(_by(rows, "series")):
            ordered = sorted(line, key=lambda row: row["tokens"])
            axes.plot(
                [row["tokens"] / 1000 for row in ordered], [row["ce"] for row in ordered],
                color=_colour(theme, index), linewidth=1.8, label=series, marker="o" if len(ordered) < 4 else None,
            )  # fmt: skip
        axes.set_xlabel("training tokens (thousands)")
        axes.set_ylabel(unit)
        _log_if_wide(axes, [row["ce"] for row in rows])
        axes.grid(True, linewidth=0.6)
        picture.legend(loc="outside lower center", ncols=2)

    return draw


def cost_front(rows: Sequence[Row], cost: str) -> Callable[[MatplotlibFigure, Theme], None]:
    """Rows with ratio, origin, ce, ``cost`` and on_front: every layout, the front that none of them beats joined."""

    def draw(picture: MatplotlibFigure, theme: Theme) -> None:
        axes = picture.subplots()
        unit, name = {"cache_bytes": (1e6, "cache (MB)"), "decode_flops": (1e9, "GFLOP per token")}.get(
            cost, (1e6, "parameters (millions)")
        )
        ratios = _in_order(row["ratio"] for row in rows if row["origin"] != "teacher")
        for row in rows:
            if row["origin"] == "teacher":
                place = (row[cost] / unit, row["ce"])
                axes.scatter(*place, s=60, marker="h", color=theme.ink, zorder=3)
                axes.annotate("teacher", place, xytext=(-6, 6), textcoords="offset points", ha="right")
                continue
            colour = _colour(theme, ratios.index(row["ratio"]))
            size, alpha = (60, 1.0) if row["on_front"] else (18, 0.55)
            axes.scatter(row[cost] / unit, row["ce"], s=size, alpha=alpha, color=colour, zorder=3)
        front = sorted((row[cost] / unit, row["ce"]) for row in rows if row["on_front"])
        axes.plot(*zip(*front, strict=True), color=theme.ink, linewidth=1, zorder=2)
        axes.set_xlabel(name)
        axes.set_ylabel("cross-entropy (nats per token)")
        axes.grid(True, linewidth=0.6)
        marks = [_mark("o", _colour(theme, index), ratio) for index, ratio in enumerate(ratios)]
        picture.legend(handles=marks, loc="outside lower center", ncols=4)

    return draw


def by_rung(rows: Sequence[Row]) -> Callable[[MatplotlibFigure, Theme], None]:
    """Rows with trial, origin, tokens, ce: a line per trial from its start through its rungs, colored by origin."""

    def draw(picture: MatplotlibFigure, theme: Theme) -> None:
        axes = picture.subplots()
        origins = _in_order(row["origin"] for row in rows)
        for _, line in _by(rows, "trial"):
            colour = _colour(theme, origins.index(line[0]["origin"]))
            x, y = [row["tokens"] / 1000 for row in line], [row["ce"] for row in line]
            axes.plot(x, y, color=colour, linewidth=1.2, alpha=0.8, marker="o", markersize=3.5)
        axes.set_xlabel("training tokens (thousands)")
        axes.set_ylabel("cross-entropy (nats per token)")
        axes.grid(True, linewidth=0.6)
        marks = [_mark("o", _colour(theme, index), name.replace("_", " ")) for index, name in enumerate(origins)]
        picture.legend(handles=marks, loc="outside lower center", ncols=3)

    return draw


def bars(rows: Sequence[Row], parts: Sequence[str], label: str, axis: str) -> Callable[[MatplotlibFigure, Theme], None]:
    """Fig. 3: one horizontal bar per row, its ``parts`` end to end, their sum beside it."""

    def draw(picture: MatplotlibFigure, theme: Theme) -> None:
        axes = picture.subplots()
        shown = list(reversed(rows))
        names, ends = [row[label] for row in shown], [0.0] * len(shown)
        for index, part in enumerate(parts):
            values = [row[part] for row in shown]
            drawn = axes.barh(names, values, left=ends, color=_colour(theme, index), label=part)
            ends = [end + value for end, value in zip(ends, values, strict=True)]
        axes.bar_label(drawn, [f"{end:,.4g}" for end in ends], padding=3)
        axes.margins(x=0.15)
        axes.set_xlabel(axis)
        if len(parts) > 1:
            picture.legend(loc="outside lower center", ncols=len(parts))

    return draw


def _by(rows: Sequence[Row], key: str) -> list[tuple[Any, list[Row]]]:
    order = _in_order(row[key] for row in rows)
    ordered = sorted(rows, key=lambda row: order.index(row[key]))
    return [(name, list(group)) for name, group in groupby(ordered, key=lambda row: row[key])]


def _in_order(values: Iterable[str]) -> list[str]:
    """Distinct values in the order of their first appearance."""
    return list(dict.fromkeys(values))


def _colour(theme: Theme, index: int) -> str:
    return theme.series[index % len(theme.series)]


def _mark(marker: str, colour: str, label: str) -> Line2D:
    return Line2D([], [], linestyle="none", marker=marker, color=colour, label=label, markersize=7)


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis when positive values span more than a factor of ten."""
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
