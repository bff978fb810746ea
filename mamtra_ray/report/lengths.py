"""WER by the length of the sentences: a hybrid that forgets shows it in the long ones."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from mamtra_ray.evaluate.results import read_rows
from mamtra_ray.report.content import Column, Row, Section, Table, percent_with_interval
from mamtra_ray.report.distilled import hearing_of
from mamtra_ray.report.naming import student_names
from mamtra_ray.run.folder import Run
from mamtra_ray.run.names import CODEC, TEACHER
from mamtra_ray.speech.wer import bootstrap_interval

_GROUPS = 3
_FEWEST_SENTENCES = 6
"""With fewer there is nothing to divide."""


def wer_by_length(runs: Sequence[Run]) -> Section:
    """Every system's WER in thirds of the sentences, the shortest first."""
    heard = {run.name: _heard_of(run) for run in runs}
    lengths = sorted(row["words"] for systems in heard.values() for rows in systems.values() for row in rows)
    bounds = length_bounds(lengths)
    if not bounds:
        missing = (
            f"Needs at least {_FEWEST_SENTENCES} spoken sentences of different lengths: python -m mamtra_ray.search "
            "with evaluate.sentences above 0, or python -m mamtra_ray.evaluate."
        )
        return Section("wer_by_length", "WER by length", missing=missing)
    rows = [
        {"run": run, "system": system, **_rates(sentences, bounds)}
        for run, systems in heard.items()
        for system, sentences in systems.items()
    ]
    columns = [Column("system", "system")]
    for index, (low, high) in enumerate(bounds):
        title = f"WER %, {low} to {high} words" if high > low else f"WER %, {low} words"
        columns.append(Column(f"wer_{index}", title, percent_with_interval(f"wer_{index}")))
        columns.append(Column(f"sentences_{index}", "sentences", "d"))
    if len(runs) > 1:
        columns.insert(0, Column("run", "run"))
    text = ("Word errors over words in each third of the sentences, by the words of what was to be said.",)
    table = Table("wer_by_length", "WER of short, middle and long sentences [95 %]", tuple(columns), rows)
    return Section("wer_by_length", "WER by length", text, tables=(table,))


def length_bounds(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(fewest, most) words of each group, of about equally many sentences; none where they cannot be divided.

    Args:
        lengths: of all sentences, ascending.
    """
    if len(lengths) < _FEWEST_SENTENCES:
        return []
    tops = sorted({lengths[(len(lengths) * part - 1) // _GROUPS] for part in range(1, _GROUPS + 1)})
    if len(tops) < 2:
        return []
    bottoms = [lengths[0], *(lengths[bisect.bisect_right(lengths, top)] for top in tops[:-1])]
    return list(zip(bottoms, tops, strict=True))


def _heard_of(run: Run) -> dict[str, list[Row]]:
    """Scored sentences by system's name; the file of an earlier, longer evaluation has more, after these."""
    hearing = hearing_of(run)
    if hearing is None or not hearing.sentences:
        return {}
    names = {CODEC: CODEC, TEACHER: TEACHER} | student_names(run)
    scored = {row["utterance_id"] for row in read_rows(run.path, TEACHER)[: hearing.sentences]}
    heard = {}
    for system, name in names.items():
        rows = [row for row in read_rows(run.path, system) if row["utterance_id"] in scored]
        if rows and all("words" in row for row in rows):
            heard[name] = rows
    return heard


def _rates(sentences: Sequence[Row], bounds: Sequence[tuple[int, int]]) -> Row:
    rates: Row = {}
    for index, (low, high) in enumerate(bounds):
        chosen = [row for row in sentences if low <= row["words"] <= high]
        rates[f"sentences_{index}"] = len(chosen)
        if chosen:
            errors, words = (np.array([row[name] for row in chosen]) for name in ("word_errors", "words"))
            rates[f"wer_{index}"] = float(errors.sum() / words.sum())
            rates[f"wer_{index}_low"], rates[f"wer_{index}_high"] = bootstrap_interval(errors, words)
    return rates
