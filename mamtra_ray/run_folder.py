"""What a search leaves in its run folder: the names of the files, their columns, and how to read them.

The search writes, the report and the listening test read; both take names and schemas from here. ::

    runs/<name>/
      config.yaml         the resolved search space                          (the only file a run must have)
      architecture.json   the teacher's shape, for costs in closed form      efficiency.Architecture
      trials.parquet      one row per layout and rung                        TRIAL_COLUMNS
      probe.parquet       one row per layout scored by a forward pass        PROBE_COLUMNS
      curves.parquet      training loss along the way                        CURVE_COLUMNS
      finalists.parquet   one row per layout that was distilled long         FINALIST_COLUMNS
      reference.json      the teacher's scores, and what the codec costs     Reference
      environment.json    versions and machine of every session              environment
      ledger.json         seconds of every phase; layouts, tokens, FLOPs, bytes of every rung
      audio/index.json    which audio/<system>/<utterance_id>.wav says what  AudioIndex
      best/               the checkpoint; its layout.json says which finalist it is
      report.html

Rates (WER, CER) are fractions, cross-entropies nats per speech token, times seconds, caches bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mamtra_ray.artifacts import read_json, read_manifest, write_json, written_atomically
from mamtra_ray.config import Config, load_config
from mamtra_ray.efficiency_architectures import Architecture, MambaShape
from mamtra_ray.errors import InputError

CONFIG = "config.yaml"
ARCHITECTURE = "architecture.json"
TRIALS = "trials.parquet"
PROBE = "probe.parquet"
CURVES = "curves.parquet"
FINALISTS = "finalists.parquet"
REFERENCE = "reference.json"
LEDGER = "ledger.json"
AUDIO = "audio"
AUDIO_INDEX = "audio/index.json"
BEST = "best"
BEST_LAYOUT = "best/layout.json"
REPORT = "report.html"

ORIGINAL, CODEC, TEACHER = "original", "codec", "teacher"
"""Systems of the audio that are no student: the recording, its round trip through the codec, the teacher.
A student's system name is its layout string."""

TRIAL_COLUMNS = (
    "trial_id",
    "layout",  # "AMAM..."
    "origin",  # a strategy of the paper, "probe" or "optuna"
    "ratio",  # attention:mamba in lowest terms
    "rung",  # 0-based fidelity
    "tokens",  # training tokens seen at this rung
    "seconds",
    "ce",
    "kl",  # KL(teacher || student), held out
    "ce_start",  # before the first training step
    "cache_bytes",
    "decode_flops",
    "parameters",
    "status",  # running | finished
)
PROBE_COLUMNS = ("layout", "ratio", "ce", "kl", "tokens", "seconds")
FINALIST_CURVE = "finalist"
"""The ``trial_id`` of a finalist's training curve; its rung is the one after the trials' last."""
CURVE_COLUMNS = ("trial_id", "layout", "rung", "step", "tokens", "total", "ce", "logits", "emb")
FINALIST_COLUMNS = (
    "layout",
    "origin",
    "ratio",
    "ce",
    "wer",  # null when no speech was generated, like the next three
    "wer_low",  # 95 % interval
    "wer_high",
    "cer",
    "tokens",
    "steps",
)
"""Also shown where present: wer_difference (to the teacher, paired; with _low and _high), speaker_similarity, utmos,
dnsmos, and the cost columns of the trials. A search also writes :data:`mamtra_ray.alarms.COLUMNS`, which tables of
earlier versions lack: shares of the sentences that ended wrongly, and ``alarm``, a text or null."""

_TYPES = {"alarm": pa.string()}
"""Of columns that may be null in every row, from which Arrow could not tell."""
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Score:
    """Error rates of one system with the 95 % interval of the WER."""

    wer: float
    wer_low: float
    wer_high: float
    cer: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Further scores by name, such as speaker_similarity or utmos."""

    def columns(self) -> dict[str, float | None]:
        """As columns of a table."""
        rates = {"wer": self.wer, "wer_low": self.wer_low, "wer_high": self.wer_high, "cer": self.cer}
        return {**rates, **self.metrics}


@dataclass(frozen=True)
class Reference:
    """What students are compared with; ``None`` where nothing was generated."""

    teacher_ce: float
    evaluation_sentences: int
    teacher: Score | None = None
    codec: Score | None = None
    """The recordings after a round trip through the codec: the floor of every model that speaks through it."""
    original: Score | None = None
    """The recordings themselves: the recogniser's own errors."""
    teacher_alarm: str | None = None
    """What is wrong with the teacher's own speech, see :mod:`mamtra_ray.alarms`."""


@dataclass(frozen=True)
class Clip:
    """One audio file. ``file`` is relative to the ``audio`` folder."""

    system: str
    utterance_id: str
    file: str
    hypothesis: str | None = None
    """What the recogniser heard."""


@dataclass(frozen=True)
class AudioIndex:
    """The audio of a run: ``texts`` by utterance id, ``systems`` in the order to show them."""

    systems: tuple[str, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    clips: tuple[Clip, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run folder, read. Tables are lists of rows; what is not there yet is empty or ``None``."""

    path: Path
    name: str
    """The folder's; :func:`read_runs` puts parents before it where two would be called the same."""
    config: Config
    architecture: Architecture | None
    trials: list[dict[str, Any]]
    probe: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    finalists: list[dict[str, Any]]
    reference: Reference | None
    ledger: dict[str, dict[str, Any]]
    rungs: list[dict[str, Any]]
    audio: AudioIndex
    best_layout: str | None
    """The finalist that was exported to ``best/``."""


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        InputError: the folder is no run (no ``config.yaml``), or one of its files is damaged or lacks a column.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"run folder {path} does not exist")
    if not (path / CONFIG).exists():
        raise InputError(f"{path} is no run folder: it has no {CONFIG} (python -m mamtra_ray.search writes it)")
    ledger = read_json(path / LEDGER) if (path / LEDGER).exists() else {}
    if not isinstance(ledger, dict):
        raise InputError(f"{path / LEDGER} holds no phases")
    return Run(
        path=path,
        name=path.resolve().name,
        config=load_config(path / CONFIG),
        architecture=read_architecture(path),
        trials=read_rows(path / TRIALS, TRIAL_COLUMNS),
        probe=latest_scores(path),
        curves=read_rows(path / CURVES, CURVE_COLUMNS),
        finalists=read_rows(path / FINALISTS, FINALIST_COLUMNS),
        reference=read_reference(path),
        ledger=ledger.get("phases", {}),
        rungs=ledger.get("rungs", []),
        audio=read_audio_index(path),
        best_layout=_read(path / BEST_LAYOUT, "layout").get("layout") if (path / BEST_LAYOUT).exists() else None,
    )


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs that are to be compared, each under a name of its own.

    Raises:
        InputError: as :func:`read_run`, or a folder that is given twice.
    """
    resolved = [Path(path).resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise InputError(f"run folder {path} is given twice; every run to compare is another folder")
    runs = [read_run(path) for path in paths]
    # As many parents as it takes: a/demo and b/demo are two runs, and their layouts and clips must not be mixed up.
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    names = ["/".join(path.parts[-depth:]) for path in resolved]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def latest_scores(folder: Path) -> list[dict[str, Any]]:
    """Rows of ``probe.parquet`` made under the settings of its last row: scores on other tokens, or with another
    mixer library, do not compare."""
    rows = read_rows(folder / PROBE, PROBE_COLUMNS)
    return [row for row in rows if row.get("made_by") == rows[-1].get("made_by")]


def read_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a Parquet table that must have ``columns`` (and may have more); none if there is no such file."""
    if not path.exists():
        return []
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is damaged or no Parquet file: {error}") from None
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise InputError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}")
    return table.to_pylist()


def write_rows(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Write ``rows`` as Parquet, atomically; every row must have all ``columns`` and may have more.

    Raises:
        ValueError: a row lacks a column (a mistake of the writing code, not of a user).
    """
    for row in rows:
        missing = [column for column in columns if column not in row]
        if missing:
            raise ValueError(f"a row of {path.name} lacks {', '.join(missing)}")
    # Arrow would take the names from the first row alone; and an empty table still has its columns.
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    table = pa.table({name: pa.array([row.get(name) for row in rows], _TYPES.get(name)) for name in names})
    with written_atomically(path) as temporary:
        pq.write_table(table, temporary)


def write_architecture(folder: Path, architecture: Architecture) -> None:
    """Write ``architecture.json``."""
    _write(folder / ARCHITECTURE, "architecture", dataclasses.asdict(architecture))


def read_architecture(folder: Path) -> Architecture | None:
    """Read ``architecture.json``; ``None`` if the run has none."""
    path = folder / ARCHITECTURE
    if not path.exists():
        return None
    content = _read(path, "architecture")
    try:
        fields = {name: content[name] for name in content if name not in ("kind", "schema_version", "made_by", "mamba")}
        return Architecture(mamba=MambaShape(**content["mamba"]), **fields)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is no architecture: {error}") from None


def write_reference(folder: Path, reference: Reference) -> None:
    """Write ``reference.json``."""
    _write(folder / REFERENCE, "reference", dataclasses.asdict(reference))


def read_reference(folder: Path) -> Reference | None:
    """Read ``reference.json``; ``None`` if the run has none yet."""
    path = folder / REFERENCE
    if not path.exists():
        return None
    content = _read(path, "reference")
    try:
        scores = {name: content[name] and Score(**content[name]) for name in ("teacher", "codec", "original")}
        # Runs of earlier versions have no alarms.
        alarm = content.get("teacher_alarm")
        return Reference(content["teacher_ce"], content["evaluation_sentences"], **scores, teacher_alarm=alarm)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is no reference of a run: {error}") from None


def write_audio_index(folder: Path, index: AudioIndex) -> None:
    """Write ``audio/index.json``; the files it names must already be there."""
    for clip in index.clips:
        if not (folder / AUDIO / clip.file).exists():
            raise ValueError(f"{clip.file} is in the audio index but not in {folder / AUDIO}")
    _write(folder / AUDIO_INDEX, "audio_index", dataclasses.asdict(index))


def read_audio_index(folder: Path) -> AudioIndex:
    """Read ``audio/index.json``; an empty index if the run has no audio.

    Raises:
        InputError: damaged, or it names a file outside the audio folder, or one that is missing.
    """
    path = folder / AUDIO_INDEX
    if not path.exists():
        return AudioIndex()
    content = _read(path, "audio_index")
    try:
        clips = tuple(Clip(**clip) for clip in content["clips"])
        index = AudioIndex(tuple(content["systems"]), dict(content["texts"]), clips)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no audio index of a run: {error}") from None
    audio = (folder / AUDIO).resolve()
    for clip in index.clips:
        file = (audio / clip.file).resolve()
        # Run folders travel between people: an index must not make the report embed other files of this machine.
        if not file.is_relative_to(audio) or not file.is_file():
            raise InputError(f"{path} names {clip.file}, which is not in {folder / AUDIO}")
        if clip.utterance_id not in index.texts:
            raise InputError(f"{path} has no text for utterance {clip.utterance_id}")
    return index


def _write(path: Path, kind: str, content: dict[str, Any]) -> None:
    write_json(path, {"kind": kind, "schema_version": _SCHEMA_VERSION, **content})


def _read(path: Path, kind: str) -> dict[str, Any]:
    return read_manifest(path, kind, _SCHEMA_VERSION)
