"""What a report consists of: sections of tables, figures and audio, before they become a page or files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamtra_ray.run.rows import columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

Row = dict[str, Any]
MISSING = "–"


@dataclass(frozen=True)
class Theme:
    """Colors of a figure, for a light or a dark page."""

    name: str
    background: str
    ink: str
    faint: str
    series: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """A column of a table: the row's ``key``, shown by ``show``, a format such as ``.3f`` or a function of the row."""

    key: str
    title: str
    show: str | Callable[[Row], str] = ""
    is_layout: bool = False
    """Drawn as a strip of one box per layer, with its letters beside it, which can be copied."""

    @property
    def is_number(self) -> bool:
        return bool(self.show)

    def text(self, row: Row) -> str:
        """What the cell shows."""
        value = row.get(self.key)
        if value is None:
            return MISSING
        if callable(self.show):
            return self.show(row)
        return format(value, self.show)


@dataclass(frozen=True)
class Table:
    """Rows shown as a sortable table and written as ``<slug>.csv``; ``shown`` limits the rows on the page only."""

    slug: str
    caption: str
    columns: tuple[Column, ...]
    rows: list[Row]
    shown: int = 100
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture drawn once per theme; ``rows`` is its data, written as ``<slug>.csv``."""

    slug: str
    caption: str
    description: str
    """What a reader who cannot see it needs to know."""
    draw: Callable[[MatplotlibFigure, Theme], None]
    rows: list[Row]
    size: tuple[float, float] = (4.9, 3.5)
    """Inches; narrow, so that its text stays readable on a phone."""


@dataclass(frozen=True)
class AudioRow:
    """One utterance spoken by several systems; ``clips`` in the order of the section's systems."""

    text: str
    clips: list[tuple[str, Path, str | None]]
    """(system, file, what the recognizer heard)."""


@dataclass(frozen=True)
class Section:
    """A part of the report. ``missing`` says what would produce it, if the runs do not hold its input."""

    slug: str
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    audio: tuple[AudioRow, ...] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Report:
    """All of it. ``facts`` are the figures at the top: (label, value, explanation)."""

    title: str
    subtitle: str
    summary: tuple[str, ...] = ()
    """Paragraphs: what was found, whether it is good, what to do next."""
    facts: tuple[tuple[str, str, str], ...] = ()
    alarms: tuple[str, ...] = ()
    """What contradicts itself in the runs, shown above everything else."""
    sections: tuple[Section, ...] = field(default=())


def as_rows(rows: Iterable[Any]) -> list[Row]:
    """Typed rows of a run as columns, for tables and figures."""
    return [columns(row) for row in rows]


def percent(key: str) -> Callable[[Row], str]:
    """Shows a fraction in percent."""
    return lambda row: f"{100 * row[key]:.2f}"


def percent_with_interval(key: str) -> Callable[[Row], str]:
    """Shows a fraction in percent with ``<key>_low`` and ``<key>_high``, where they are known."""

    def show(row: Row) -> str:
        low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
        interval = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
        return f"{100 * row[key]:.2f}{interval}"

    return show


def with_interval(key: str, digits: int = 2) -> Callable[[Row], str]:
    """Shows a number with ``<key>_low`` and ``<key>_high``, where they are known."""

    def show(row: Row) -> str:
        low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
        interval = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
        return f"{row[key]:.{digits}f}{interval}"

    return show


def scaled(key: str, unit: float, digits: int = 2) -> Callable[[Row], str]:
    """Shows a number divided by ``unit`` (1e6 for MB)."""
    return lambda row: f"{row[key] / unit:,.{digits}f}"
