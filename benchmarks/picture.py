"""The README's picture, docs/picture.svg, from two result files of this folder.

    python benchmarks/picture.py            a second; run it again when one of the files has changed

Left, ``results/memory.json``: memory of decoding at its peak, above the weights, by context. Right,
``results/demo_search.json``: word error rates of the demo teacher's 1:1 layouts with their 95 % intervals.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "picture.svg"
INK, FAINT, FOUND, OTHER = "#1c2530", "#d8dee6", "#c75a00", "#0b62a8"
LINES = {"1:0": INK, "1:1": "#0b62a8", "1:3": "#c75a00", "1:5": "#13795b", "1:11": "#8a3f9e"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "mamtra_ray",
}


def main() -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.1), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2)
        draw_memory(left, rows_of("memory"))
        draw_word_errors(right, rows_of("demo_search"))
        figure.savefig(PICTURE, format="svg", metadata={"Date": None})
    print(f"wrote {PICTURE}")


def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows of ``results/<name>.json``."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return rows


def draw_memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """A line per ratio, labeled at its end."""
    batch = json.loads((RESULTS / "memory.json").read_text())["settings"]["batch"]
    for ratio, color in LINES.items():
        points = sorted((row["context"], row["decode peak MB"]) for row in rows if row["ratio"] == ratio)
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=color, marker="o", markersize=3, linestyle="--" if ratio == "1:0" else "-")
        name = "teacher" if ratio == "1:0" else ratio
        axes.annotate(name, (x[-1], y[-1]), (5, 0), textcoords="offset points", va="center", color=color)
    axes.set_title("CosyVoice 2's shape: memory of decoding", fontsize=9, loc="left")
    axes.set_xlabel("tokens of context")
    axes.set_ylabel(f"MB above the weights, {batch} sequences")
    axes.set_xlim(0, 9_300)
    axes.set_xticks([0, 2_048, 4_096, 8_192], ["0", "2,048", "4,096", "8,192"])
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)


def draw_word_errors(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """A bar per 1:1 layout below the teacher's, best CE on top."""
    shown = [row for row in rows if row["from"] == "teacher" or row["ratio"] == "1:1"]
    for place, row in enumerate(reversed(shown)):
        value, low, high = map(float, re.findall(r"[\d.]+", row["WER %"]))
        found = row["from"].startswith("found")
        color = INK if row["from"] == "teacher" else FOUND if found else OTHER
        axes.barh(place, value, height=0.6, color=color, alpha=0.85)
        axes.plot([low, high], [place, place], color=INK, linewidth=1)
    names = ["found" if row["from"].startswith("found") else row["from"].replace("_", " ") for row in shown]
    labels = [f"{name}  {row['layout']}" for name, row in zip(names, shown, strict=True)]
    axes.set_yticks(range(len(shown)), labels[::-1], family="monospace", fontsize=7)
    axes.set_title("Demo: six of twelve layers replaced", fontsize=9, loc="left")
    axes.set_xlabel("word error rate, %, with 95 % interval")
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    main()
