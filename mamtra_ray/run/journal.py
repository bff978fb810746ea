"""A table that grows: rows are appended to a journal, and become a Parquet file when a phase begins or ends.

``trials.parquet`` has a ``trials.jsonl`` beside it while trials run. A row is on disk before :meth:`Journal.append`
returns; a line cut off by a crash was never acknowledged and is dropped.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Generic

from mamtra_ray.artifacts import checked_lines, disk_full_is_said, row_of_line
from mamtra_ray.errors import InputError
from mamtra_ray.run.rows import Row, columns, read_table, row_from_columns, write_table

TRIAL_KEY = ("settings_hash", "layout", "rung")
CURVE_KEY = ("trial_id", "layout", "rung", "step")
"""Fields that tell the rows of these tables apart: a later row with the same ones takes an earlier one's place."""


class Journal(Generic[Row]):
    """Rows of one kind, on disk and in memory.

    Args:
        path: the Parquet file; the journal lies beside it.
        kind: of the rows.
        key: fields by which a later row replaces an earlier one; none: every row stays.
    """

    def __init__(self, path: Path, kind: type[Row], key: tuple[str, ...] = ()) -> None:
        self.path, self.kind, self.key = path, kind, key
        self.rows = read_journal(path, kind, key)
        self.compact()

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows, durably: all of them or none.

        Raises:
            DiskFullError: there is no space left.
        """
        rows = list(rows)
        lines = checked_lines(map(columns, rows)).encode()
        path = _journal_of(self.path)
        with disk_full_is_said(path), path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                if file.write(lines) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                # What comes next must not follow half a line.
                file.truncate(before)
                raise
        self.rows = _merged(self.rows, rows, self.key)

    def compact(self) -> None:
        """Write all rows to the Parquet file, and begin a new journal."""
        if self.rows or self.path.exists():
            write_table(self.path, self.rows, self.kind)
        _journal_of(self.path).unlink(missing_ok=True)


def read_journal(path: Path, kind: type[Row], key: tuple[str, ...] = ()) -> list[Row]:
    """All rows: those of the Parquet file, then those of the journal.

    Raises:
        InputError: one of them is damaged.
    """
    rows, journal = read_table(path, kind), _journal_of(path)
    if not journal.exists():
        return rows
    *lines, rest = journal.read_bytes().split(b"\n")
    # A crash leaves the beginning of a row there, never more than one.
    if rest and (not rest.startswith(b"{") or _is_more_than_a_row(rest)):
        raise InputError(f"{journal}, line {len(lines) + 1}, is damaged: it is no beginning of a row")
    added = []
    for number, line in enumerate(lines):
        where = f"{journal}, line {number + 1},"
        content = row_of_line(line, where)
        try:
            added.append(row_from_columns(kind, content))
        except (ValueError, KeyError, TypeError, InputError) as error:
            raise InputError(f"{where} is damaged: {error}") from None
    return _merged(rows, added, key)


def _is_more_than_a_row(line: bytes) -> bool:
    try:
        text = line.decode(errors="replace")
        return json.JSONDecoder().raw_decode(text)[1] < len(text)
    except ValueError:
        return False


def _journal_of(path: Path) -> Path:
    return path.with_suffix(".jsonl")


def _merged(rows: list[Row], added: list[Row], key: tuple[str, ...]) -> list[Row]:
    """``added`` after ``rows``; a row with the key of an earlier one takes its place."""
    if not key:
        return [*rows, *added]
    by_key = {tuple(getattr(row, name) for name in key): row for row in [*rows, *added]}
    return list(by_key.values())
