"""What a long run says on the screen, and its costs: phases, counts with the time left, a closing table."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamtra_ray.artifacts import read_manifest, write_checked_json
from mamtra_ray.errors import InputError
from mamtra_ray.runtime.pace import Pace

SECONDS_BETWEEN_NOTES = 5.0
_LONGEST_SILENCE = 9.0
"""Seconds, in a log; looked at every second, so that a line comes within ten."""
_SECONDS_BETWEEN_REDRAWS = 0.2


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


@dataclass(frozen=True)
class _Count:
    """How far a phase is."""

    done: float
    total: float
    unit: str
    note: str

    def __str__(self) -> str:
        return f"{self.done:,.0f}/{self.total:,.0f} {self.unit}"


class Screen:
    """Prints phases and their progress; on a terminal one line is redrawn, in a log there is one every ten seconds.

    Nothing is silent for longer: where a phase has nothing new to tell, what it is doing is said again.

    Args:
        phases: names, in their order.
        costs: where their seconds go.
        clock: seconds that never go back.
    """

    def __init__(self, phases: Sequence[str], costs: Costs, clock: Callable[[], float] = time.monotonic) -> None:
        self.phases, self.costs, self.clock = list(phases), costs, clock
        self.redraws = sys.stdout.isatty()
        # Reentrant: a signal may end the block that holds it inside a print.
        self._lock = threading.RLock()
        self._spoke = self._activity_began = clock()
        self._phase = self._activity = ""
        self._part: float | None = None
        self._count: _Count | None = None
        self._pace = Pace()

    @contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        """A numbered heading; the phase's seconds go into the costs, also when it is stopped or killed."""
        number = f"[{self.phases.index(name) + 1}/{len(self.phases)}]"
        self.say(f"{number} {name}: {what}")
        self._begin(name)
        began = self.clock()
        try:
            with self.costs.timed(name), repeatedly(self.beat):
                yield
        finally:
            self._begin("")
            self.say(f"{number} {name}: {duration(self.clock() - began)}")

    def now(self, what: str, part: float | None = None) -> None:
        """Name what is done at present beside the phase's count, such as ``starting workers``.

        The next count ends it, and what it took is not taken for the time of a step.

        Args:
            what: in words.
            part: of it that is done, 0 to 1.
        """
        with self._lock:
            if what != self._activity:
                self._activity, self._activity_began = what, self.clock()
            self._part = part
            self._show_if_due(_SECONDS_BETWEEN_REDRAWS)

    def count(self, done: float, total: float, unit: str, note: str = "", *, is_work: bool = True) -> None:
        """``done`` of ``total`` with the time left at the pace of the latest steps; ``note`` follows.

        Args:
            done, total: the first call of a phase, or of another unit, says where the count stands.
            unit: of both.
            note: more words.
            is_work: False where the count grew without work: an earlier session did it.
        """
        with self._lock:
            before = self._count if self._count and self._count.unit == unit else None
            if before is not None and done >= total and before.done >= before.total:
                return
            if before is None:
                self._pace = Pace()
            self._pace.note(done, self.clock(), is_work=is_work and not self._activity)
            self._count, self._activity = _Count(done, total, unit, note), ""
            if done >= total:
                self._print(f"    {self._count}  {note}".rstrip(), end="\n")
                self.now("finishing")
            else:
                self._show_if_due(_SECONDS_BETWEEN_REDRAWS)

    def beat(self) -> None:
        """Say again what the phase is doing, if nothing was said for a while."""
        with self._lock:
            self._show_if_due(1.0)

    def say(self, line: str) -> None:
        """Print a line of its own."""
        with self._lock:
            self._print(line, end="\n")

    def progress(self) -> tuple[str, float | None, float | None]:
        """The phase (empty between phases), the part of its count that is done, and its tokens per second."""
        with self._lock:
            count = self._count
            part = min(count.done / count.total, 1.0) if count and count.total else None
            return self._phase, part, self._pace.per_second if count and count.unit == "tokens" else None

    def _begin(self, phase: str) -> None:
        with self._lock:
            self._phase, self._activity, self._activity_began = phase, "", self.clock()
            self._part = self._count = None
            self._pace = Pace()

    def _show_if_due(self, seconds_on_terminal: float) -> None:
        if self._phase and self.clock() - self._spoke >= (seconds_on_terminal if self.redraws else _LONGEST_SILENCE):
            self._print(self._line(), end="" if self.redraws else "\n")

    def _line(self) -> str:
        now, count = self.clock(), self._count
        if self._activity or count is None:
            part = "" if self._part is None or not self._activity else f", {self._part:.0%}"
            doing = f"{self._activity or self._phase}{part}, {duration(now - self._activity_began)}"
            return f"    {count}  {doing}" if count and count.done < count.total else f"    {doing}"
        speed = self._pace.per_second
        pace = f"  {speed:,.0f}/s" if count.unit == "tokens" and speed else ""
        seconds = self._pace.seconds_left(count.total, now)
        left = "..." if seconds is None else f"{duration(seconds)} left"
        silent = self._pace.seconds_without_news(now)
        news = f"  (nothing new for {duration(silent)})" if silent else ""
        return f"    {count}{pace}  {left}{news}  {count.note}".rstrip()

    def _print(self, line: str, end: str) -> None:
        self._spoke = self.clock()
        if self.redraws and not end:
            # A line that wraps could not be redrawn.
            line = line[: shutil.get_terminal_size().columns - 1]
        print(f"\r\033[K{line}" if self.redraws else line, end=end, flush=True)


@contextmanager
def said_while(what: str) -> Iterator[None]:
    """Where no phase has begun: while the block runs, ``what`` and its seconds are printed about every ten seconds."""
    began = time.monotonic()
    with repeatedly(lambda: print(f"    {what}, {duration(time.monotonic() - began)}", flush=True), _LONGEST_SILENCE):
        yield


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
