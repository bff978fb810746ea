"""The rows of a run's Parquet tables, and the boundary where they become columns.

A column is a field; an error rate ``wer`` is ``wer``, ``wer_low`` and ``wer_high``; ``ratio`` follows from ``layout``.
Rates are fractions, cross-entropies nats per speech token, times seconds, caches bytes.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from mamtra_ray.artifacts import content_hash, written_atomically
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.speech.end_of_speech import EndOfSpeech
from mamtra_ray.speech.error_rate import ErrorRate

FINALIST_CURVE = "finalist"
"""The ``trial_id`` of a finalist's training curve; its rung is the one after the trials' last."""
RUNNING, FINISHED = "running", "finished"

_VERSION_KEY, _VERSION = b"mamtra_ray_rows", b"3"
_HASH_KEY = b"mamtra_ray_content"
_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), Layout: pa.string()}


@dataclass(frozen=True)
class TableRow:
    """What the rows of all tables have."""

    layout: Layout


@dataclass(frozen=True)
class ProbeRow(TableRow):
    """The score of one layout, nothing of it trained but its aligned mixers."""

    ce: float
    """Held-out cross-entropy with the corpus, nats per speech token."""
    kl: float
    """KL(teacher || student), nats per speech token (a lower bound with a top-k cache)."""
    tokens: int
    """Labeled positions that were scored."""
    seconds: float
    """This layout's share of the time of those that were scored together."""
    made_by: str = ""
    """Identifies teacher, library and tokens: scores of others do not compare."""


@dataclass(frozen=True)
class TrialRow(TableRow):
    """The score of one layout at one rung."""

    trial_id: str
    origin: str
    """A strategy of the paper, ``probe`` or ``optuna``."""
    rung: int
    """0-based fidelity."""
    tokens: int
    """Training tokens seen at this rung."""
    seconds: float
    """Of training since the first step."""
    tokens_per_second: float
    data_wait_fraction: float
    """Share of the time spent waiting for data."""
    ce: float
    kl: float
    """KL(teacher || student), held out."""
    ce_start: float
    """Before the first training step."""
    kl_start: float
    """Before the first training step."""
    cache_bytes: float
    decode_flops: float
    parameters: float
    status: str
    """``running`` or ``finished``: whether successive halving is done with the layout."""
    settings_hash: str
    """Identifies what the score depends on beside layout and rung."""
    wer: ErrorRate | None = None
    """Of validation sentences, at the last rung; None where nothing was spoken, like the next one."""
    token_error_rate: float | None = None
    """Edits between its free-running speech tokens and the teacher's, over the teacher's."""
    evaluation: str = ""
    """Identifies sentences and settings of what was heard."""


@dataclass(frozen=True)
class CurvePoint(TableRow):
    """One training step: loss terms of its batch; a term that is switched off is NaN."""

    trial_id: str
    rung: int
    step: int
    tokens: int
    total: float
    ce: float
    kl: float
    hidden: float
    learning_rate: float | None = None
    """Of the mixers; None in runs of earlier versions, like the next one."""
    grad_norm: float | None = None
    """Over all weights, before it is clipped."""


@dataclass(frozen=True)
class FinalistRow(TableRow):
    """A layout that was distilled long, and what was heard of it."""

    origin: str
    tokens: int
    steps: int
    seconds: float
    ce: float
    kl: float
    ce_start: float
    kl_start: float
    cache_bytes: float
    decode_flops: float
    parameters: float
    wer: ErrorRate | None = None
    """None where no speech was generated, like the next ones."""
    cer: float | None = None
    wer_difference: ErrorRate | None = None
    """WER minus the teacher's on the same sentences."""
    ends: EndOfSpeech | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further scores by name, such as speaker_similarity or utmos."""
    alarm: str | None = None
    """What contradicts itself, see :mod:`mamtra_ray.evaluate.alarms`."""
    evaluation: str = ""
    """Identifies the evaluation that heard it; empty where no speech was generated."""


class Trained(typing.Protocol):
    """A row or report of a training: held-out scores now and before the first step, nats per token."""

    @property
    def ce(self) -> float: ...
    @property
    def kl(self) -> float: ...
    @property
    def ce_start(self) -> float: ...
    @property
    def kl_start(self) -> float: ...


def is_worse_than_start(row: Trained) -> bool:
    """Whether its training has left a layout with a higher held-out CE or KL than it began with."""
    return row.ce > row.ce_start or row.kl > row.kl_start


Row = TypeVar("Row", bound=TableRow)


def columns(row: Any) -> dict[str, Any]:
    """A row as its columns, plain values only."""
    content: dict[str, Any] = {}
    for name, kind in _fields(cast(Any, type(row))).items():
        value = getattr(row, name)
        if kind is ErrorRate:
            parts = (value.value, value.low, value.high) if value else (None, None, None)
            content |= dict(zip((name, f"{name}_low", f"{name}_high"), parts, strict=True))
        elif kind is EndOfSpeech:
            content |= value.columns() if value else dict.fromkeys(EndOfSpeech.COLUMNS)
        elif kind is Mapping:
            content |= value
        elif kind is Layout:
            content |= {name: str(value), "ratio": value.ratio}
        else:
            content[name] = value
    return content


def row_from_columns(kind: type[Row], content: Mapping[str, Any]) -> Row:
    """What :func:`columns` made of a row."""
    left = dict(content)
    left.pop("ratio", None)
    values: dict[str, Any] = {}
    rest = None
    for name, part in _fields(cast(Any, kind)).items():
        if part is ErrorRate:
            rate = [left.pop(column) for column in (name, f"{name}_low", f"{name}_high")]
            values[name] = None if rate[0] is None else ErrorRate(*rate)
        elif part is EndOfSpeech:
            shares = {column: left.pop(column) for column in EndOfSpeech.COLUMNS}
            values[name] = None if None in shares.values() else EndOfSpeech(**shares)
        elif part is Mapping:
            rest = name
        else:
            value = left.pop(name, None) if name in _added_later(cast(Any, kind)) else left.pop(name)
            values[name] = Layout.from_string(value) if part is Layout else value
    if rest is not None:
        values[rest] = {name: value for name, value in left.items() if value is not None}
    return kind(**values)


def read_table(path: Path, kind: type[Row]) -> list[Row]:
    """Rows of a Parquet table; none if there is no such file.

    Raises:
        InputError: damaged, of another version, or without a column.
    """
    if not path.exists():
        return []
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(use_threads=False)
        contents, metadata = table.to_pylist(), table.schema.metadata or {}
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        raise InputError(f"{path} is damaged or no Parquet file: {' '.join(str(error).split())[:200]}") from None
    required = [name for name in _schema(cast(Any, kind)).names if name not in _added_later(cast(Any, kind))]
    missing = [name for name in required if name not in table.column_names]
    if missing:
        raise InputError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}")
    if (found := metadata.get(_VERSION_KEY)) != _VERSION:
        raise InputError(f"{path} has schema version {found!r}, this code reads {_VERSION.decode()}: begin another run")
    if metadata.get(_HASH_KEY) != _rows_hash(contents):
        raise InputError(f"{path} is damaged: its rows do not have the hash that they were written with")
    return [row_from_columns(kind, content) for content in contents]


def write_table(path: Path, rows: Sequence[Row], kind: type[Row]) -> None:
    """Write ``rows`` as Parquet, atomically; an empty table has its columns too."""
    contents = [columns(row) for row in rows]
    schema = _schema(cast(Any, kind))
    extra = dict.fromkeys(name for content in contents for name in content if name not in schema.names)
    schema = pa.schema([*schema, *(pa.field(name, pa.float64()) for name in extra)])
    table = pa.table({name: [content.get(name) for content in contents] for name in schema.names}, schema)
    table = table.replace_schema_metadata({_VERSION_KEY: _VERSION, _HASH_KEY: _rows_hash(table.to_pylist())})
    with written_atomically(path) as temporary:
        pq.write_table(table, temporary)


def _rows_hash(contents: Sequence[Mapping[str, Any]]) -> bytes:
    return content_hash([list(content.items()) for content in contents]).encode()


@cache
def _fields(kind: Any) -> dict[str, Any]:
    """Type of every field; of an optional one the type that it has when it is there."""
    hints = typing.get_type_hints(kind)
    found = {}
    for part in dataclasses.fields(kind):
        hint = hints[part.name]
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        origin = typing.get_origin(hint)
        if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
            found[part.name] = Mapping
        else:
            found[part.name] = options[0] if options else hint
    return found


@cache
def _added_later(kind: Any) -> frozenset[str]:
    """Columns that files of earlier versions lack, which are read all the same: plain ones that may be None."""
    return frozenset(
        part.name for part in dataclasses.fields(kind) if part.default is None and _fields(kind)[part.name] in _ARROW
    )


@cache
def _schema(kind: Any) -> pa.Schema:
    fields: list[tuple[str, pa.DataType]] = []
    for name, part in _fields(kind).items():
        if part is ErrorRate:
            fields += [(column, pa.float64()) for column in (name, f"{name}_low", f"{name}_high")]
        elif part is EndOfSpeech:
            fields += [(column, pa.float64()) for column in EndOfSpeech.COLUMNS]
        elif part is Layout:
            fields += [(name, pa.string()), ("ratio", pa.string())]
        elif part is not Mapping:
            fields.append((name, _ARROW[part]))
    return pa.schema(fields)
