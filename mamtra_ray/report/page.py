"""From a report's content to files: one self-contained page, and every table and figure as CSV and PNG."""

from __future__ import annotations

import base64
import csv
import io
from functools import partial
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from mamtra_ray.artifacts import check_outputs, write_output
from mamtra_ray.report.content import Figure, Report, Row, Table
from mamtra_ray.report.figures import DARK, LIGHT, rendered

TEMPLATE = "template.html"


def write_page(report: Report, folder: Path) -> None:
    """Write the report as one HTML file that needs no network: pictures, sound and script are inside.

    It lies beside ``folder``, which has the tables and figures of :func:`write_files`, and has its name.
    """
    # Autoescape: texts, hypotheses and run names are whatever users and recognizers made of them.
    environment = Environment(
        loader=PackageLoader("mamtra_ray.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template(TEMPLATE)
    page = template.render(report=report, picture=_picture, sound=_sound, sort_key=_sort_key)
    write_output(folder, page_name(folder), lambda path: path.write_text(page, encoding="utf-8"))


def page_name(folder: Path) -> str:
    """The page's place, relative to ``folder``."""
    return f"../{folder.name}.html"


def write_files(report: Report, folder: Path) -> list[Path]:
    """Write every table as ``<slug>.csv`` and every figure as ``<slug>.png`` with its data as ``<slug>.csv``."""
    written = []
    for section in report.sections:
        for table in section.tables:
            written.append(_write_csv(folder, f"{table.slug}.csv", table.rows, [c.key for c in table.columns]))
        for figure in section.figures:
            picture = rendered(figure, LIGHT, "png")
            written.append(write_output(folder, f"{figure.slug}.png", partial(_write_bytes, picture)))
            written.append(_write_csv(folder, f"{figure.slug}.csv", figure.rows, []))
    return written


def check_files(report: Report, folder: Path) -> None:
    """Refuse a folder in which the page or one of these files is there and not an earlier report's.

    Raises:
        InputError: names the first one.
    """
    tables = [f"{table.slug}.csv" for section in report.sections for table in section.tables]
    slugs = [figure.slug for section in report.sections for figure in section.figures]
    check_outputs(
        folder, [page_name(folder), *tables, *(f"{slug}.{kind}" for slug in slugs for kind in ("png", "csv"))]
    )


def _write_csv(folder: Path, name: str, rows: list[Row], first_columns: list[str]) -> Path:
    """All keys of the rows, the shown ones first."""
    names = list(dict.fromkeys([*first_columns, *(key for row in rows for key in row)]))
    content = io.StringIO()
    writer = csv.DictWriter(content, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_output(folder, name, lambda path: path.write_text(content.getvalue(), encoding="utf-8"))


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _picture(figure: Figure) -> dict[str, str]:
    """Data addresses of the light and the dark SVG; the browser picks one."""
    return {theme.name: _data_url("image/svg+xml", rendered(figure, theme, "svg")) for theme in (LIGHT, DARK)}


def _sound(path: Path) -> str:
    return _data_url("audio/wav", path.read_bytes())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _sort_key(table: Table, row: Row, key: str) -> str:
    """What a column is sorted by: the value itself, not its rounded text; empty and not-a-number sort last."""
    value = row.get(key)
    if value is None or value != value:
        return ""
    return format(value, ".17g") if isinstance(value, float) else str(value)
