"""What a long run says on the screen, and its costs: phases, counts with the time left, a closing table."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mamtra_ray.artifacts import read_manifest, write_checked_json


class Costs:
    """``costs.json``: seconds of every phase, over all sessions of the run, and what every rung cost."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_manifest(path, "costs", 1) if path.exists() else {}
        self.phases: dict[str, dict[str, Any]] = content.get("phases", {})
        self.rungs: list[dict[str, Any]] = content.get("rungs", [])

    def add(self, phase: str, **amounts: float | str) -> None:
        """Add numbers to a phase's totals (texts replace) and write the file."""
        totals = self.phases.setdefault(phase, {})
        for name, amount in amounts.items():
            totals[name] = totals.get(name, 0) + amount if not isinstance(amount, str) else amount
        self._write()

    def set_rungs(self, rows: list[dict[str, Any]]) -> None:
        """Replace the cost of the rungs, see :mod:`mamtra_ray.search.costs`."""
        self.rungs = rows
        self._write()

    def _write(self) -> None:
        content = {"kind": "costs", "schema_version": 1, "phases": self.phases, "rungs": self.rungs}
        write_checked_json(self.path, content)


class Screen:
    """Prints phases and their progress; on a terminal one line is redrawn, in a log a line every ten seconds."""

    def __init__(self, phases: Sequence[str], costs: Costs) -> None:
        self.phases, self.costs = list(phases), costs
        self.began = self.last_line = time.monotonic()
        self.complete = False
        self.redraws = sys.stdout.isatty()

    @contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        """A numbered heading, then the phase's seconds into the costs, also when it is interrupted."""
        number = f"[{self.phases.index(name) + 1}/{len(self.phases)}]"
        self.say(f"{number} {name}: {what}")
        self.began = self.last_line = time.monotonic()
        self.complete = False
        try:
            yield
        finally:
            seconds = time.monotonic() - self.began
            self.costs.add(name, seconds=round(seconds, 2))
            self.say(f"{number} {name}: {duration(seconds)}")

    def count(self, done: float, total: float, unit: str, note: str = "") -> None:
        """``done`` of ``total`` with the time left at the present pace; ``note`` follows."""
        now = time.monotonic()
        if self.complete or (done < total and now - self.last_line < (0.2 if self.redraws else 10)):
            return
        self.last_line, self.complete = now, done >= total
        elapsed = now - self.began
        pace = f"{done / elapsed:,.0f}/s  " if unit == "tokens" and elapsed else ""
        left = f"{duration(elapsed / done * max(total - done, 0))} left" if done else "..."
        line = f"    {done:,.0f}/{total:,.0f} {unit}  {pace}{left}  {note}"
        if self.redraws:
            print(f"\r\033[K{line}", end="\n" if done >= total else "", flush=True)
        else:
            print(line, flush=True)

    def say(self, line: str) -> None:
        """Print a line of its own."""
        print(f"\r\033[K{line}" if self.redraws else line, flush=True)


@contextmanager
def every_second(function: Callable[[], None]) -> Iterator[None]:
    """While the block runs, call ``function`` about once a second from a thread of its own."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(1.0):
            function()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _is_number(cell: object) -> bool:
    """Or looks like one, or stands where one is missing."""
    return isinstance(cell, int | float) or str(cell)[:1].isdigit() or not str(cell).strip("- ")


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``; hours appear when there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned by their widest cell; numbers to the right."""
    cells = [list(header), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
