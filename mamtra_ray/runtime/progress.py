"""What a long run says on the screen, and its costs: phases, counts with the time left, a closing table."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mamtra_ray.artifacts import read_manifest, write_checked_json
from mamtra_ray.errors import InputError

SECONDS_BETWEEN_NOTES = 5.0


class Costs:
    """``costs.json``: seconds of every phase, over all sessions of the run, and what every rung cost."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_manifest(path, "costs", 1) if path.exists() else {}
        self.phases: dict[str, dict[str, Any]] = content.get("phases", {})
        self.rungs: list[dict[str, Any]] = content.get("rungs", [])
        self._writing = threading.Lock()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to ``phase``; they are on disk every few seconds, so that a kill loses few."""
        began, before = time.monotonic(), self.phases.get(phase, {}).get("seconds", 0.0)

        def note() -> None:
            with self._writing:
                self.phases.setdefault(phase, {})["seconds"] = round(before + time.monotonic() - began, 2)
                self._write()

        try:
            with repeatedly(note, SECONDS_BETWEEN_NOTES):
                yield
        except BaseException:
            # Where the disk is full, the error that says what could not be written is the block's own.
            with suppress(InputError):
                note()
            raise
        note()

    def add(self, phase: str, **amounts: float | str) -> None:
        """Add numbers to a phase's totals (texts replace) and write the file."""
        with self._writing:
            totals = self.phases.setdefault(phase, {})
            for name, amount in amounts.items():
                totals[name] = totals.get(name, 0) + amount if not isinstance(amount, str) else amount
            self._write()

    def set_rungs(self, rows: list[dict[str, Any]]) -> None:
        """Replace the cost of the rungs, see :mod:`mamtra_ray.search.costs`."""
        with self._writing:
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
        """A numbered heading; the phase's seconds go into the costs, also when it is stopped or killed."""
        number = f"[{self.phases.index(name) + 1}/{len(self.phases)}]"
        self.say(f"{number} {name}: {what}")
        self.began = self.last_line = time.monotonic()
        self.complete = False
        try:
            with self.costs.timed(name):
                yield
        finally:
            self.say(f"{number} {name}: {duration(time.monotonic() - self.began)}")

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
def repeatedly(function: Callable[[], None], seconds: float = 1.0) -> Iterator[None]:
    """While the block runs, call ``function`` every so many seconds from a thread of its own.

    It only shows or notes how far the block is: where that fails, the next call may succeed, and an error that matters
    is the block's own too.
    """
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            with suppress(Exception):
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
