"""One name for every finalist, wherever the report mentions it."""

from __future__ import annotations

from collections import Counter

from mamtra_ray.config.search import SEARCH_STRATEGIES
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import OWN
from mamtra_ray.report.distilled import distilled_of
from mamtra_ray.run.folder import Run, exported_layout
from mamtra_ray.run.names import best_folder


def placement(origin: str) -> str:
    """What a layout's origin is called: a strategy of the paper, ``own``, or ``found`` whoever proposed it."""
    return origin.replace("_", " ") if origin in (*SEARCH_STRATEGIES, OWN) else "found"


def exported_layouts(run: Run) -> set[Layout]:
    """Those in ``best/`` and its like, one of every ratio."""
    ratios = run.config.search.ratios
    found = {exported_layout(best_folder(run.path, ratio, ratios)) for ratio in ratios} | {run.best_layout}
    return {layout for layout in found if layout is not None}


def student_names(run: Run) -> dict[str, str]:
    """Of finalists and the student of ``distill``, by what an evaluation calls them."""
    found = distilled_of(run)
    names = {str(layout): name for layout, name in finalist_names(run).items()}
    return names | ({found.system: found.name} if found else {})


def finalist_names(run: Run) -> dict[Layout, str]:
    """Such as ``found 1:3``, with a number where there are several, and ``, exported`` after those that are."""
    exported = exported_layouts(run)
    plain = {row.layout: f"{placement(row.origin)} {row.layout.ratio}" for row in run.finalists}
    several = {name for name, count in Counter(plain.values()).items() if count > 1}
    names, seen = {}, Counter[str]()
    for layout, name in plain.items():
        seen[name] += 1
        number = f" no. {seen[name]}" if name in several else ""
        names[layout] = f"{name}{number}" + (", exported" if layout in exported else "")
    return names
