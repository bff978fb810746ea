"""The README's picture, docs/picture.svg: what a hybrid saves, for CosyVoice 2's shape.

    python benchmarks/picture.py            a second; run it again when the result file has changed

Left, in closed form: the cache of one sequence by context. Right, ``results/revisions_generate.json``: decoding speed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mamtra_ray.efficiency import ARCHITECTURES, cache_bytes
from mamtra_ray.layouts import Layout, from_strategy

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "picture.svg"
INK, FAINT = "#1c2530", "#d8dee6"
LINES = {"1:0": INK, "1:1": "#0b62a8", "1:3": "#c75a00", "1:5": "#13795b", "1:11": "#8a3f9e"}
LENGTHS = tuple(range(0, 8_193, 512))
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
        draw_cache(left)
        draw_speed(right, json.loads((RESULTS / "revisions_generate.json").read_text())["rows"])
        figure.savefig(PICTURE, format="svg", metadata={"Date": None})
    print(f"wrote {PICTURE}")


def draw_cache(axes: Axes) -> None:
    """A line per ratio, labeled at its end."""
    shape = ARCHITECTURES["cosyvoice2"]
    for ratio, color in LINES.items():
        teacher = ratio == "1:0"
        layout = Layout.all_attention(24) if teacher else from_strategy("block_beginning", 24, ratio)
        y = [cache_bytes(shape, layout, length) / 1e6 for length in LENGTHS]
        axes.plot(LENGTHS, y, color=color, linestyle="--" if teacher else "-")
        name = "teacher" if teacher else ratio
        axes.annotate(name, (LENGTHS[-1], y[-1]), (5, 0), textcoords="offset points", va="center", color=color)
    axes.set_title("Cache of one sequence, MB", fontsize=9, loc="left")
    axes.set_xlabel("tokens of context")
    axes.set_xlim(0, 9_300)
    axes.set_xticks([0, 2_048, 4_096, 8_192], ["0", "2,048", "4,096", "8,192"])
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)


def draw_speed(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """A bar per ratio: tokens per second of all sequences together."""
    speed = {row["what"].split(",")[0]: row["after"] for row in rows if row["measure"] == "tokens/s"}
    names = {ratio: "teacher" if ratio == "1:0" else ratio for ratio in LINES}
    for place, (ratio, name) in enumerate(names.items()):
        axes.bar(place, speed[name], width=0.7, color=LINES[ratio], alpha=0.85)
        axes.annotate(f"{speed[name]:.1f}", (place, speed[name]), (0, 2), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.set_title("Decoding at 8,192 tokens, 8 sequences: tokens per second", fontsize=9, loc="left")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    main()
