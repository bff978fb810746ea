"""A run folder, read: its settings, tables, scores and audio. Names of the files: :mod:`mamtra_ray.run.names`.

Rates (WER, CER) are fractions, cross-entropies nats per speech token, times seconds, caches bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamtra_ray.artifacts import file_hash, read_manifest, write_checked_json
from mamtra_ray.config import Config, load_config
from mamtra_ray.efficiency.architectures import Architecture, MambaShape
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.run.distilled import read_distilled
from mamtra_ray.run.journal import CURVE_KEY, TRIAL_KEY, read_journal
from mamtra_ray.run.names import (
    ARCHITECTURE,
    AUDIO,
    AUDIO_INDEX,
    BEST,
    CONFIG,
    COSTS,
    CURVES,
    EXPORTED_LAYOUT,
    FINALISTS,
    PROBE,
    REFERENCE,
    TRIALS,
)
from mamtra_ray.run.rows import CurvePoint, FinalistRow, ProbeRow, TrialRow, read_table
from mamtra_ray.runtime.progress import Costs
from mamtra_ray.speech.error_rate import ErrorRate

_SCHEMA_VERSION = 3
_MANIFEST_KEYS = ("kind", "schema_version", "made_by", "checksum")


@dataclass(frozen=True)
class Score:
    """Error rates of one system."""

    wer: ErrorRate
    cer: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Further scores by name, such as speaker_similarity or utmos."""

    def columns(self) -> dict[str, float | None]:
        """As columns of a table."""
        rates = {"wer": self.wer.value, "wer_low": self.wer.low, "wer_high": self.wer.high, "cer": self.cer}
        return {**rates, **self.metrics}


@dataclass(frozen=True)
class Reference:
    """What students are compared with; ``None`` where nothing was generated."""

    teacher_ce: float
    evaluation_sentences: int
    teacher: Score | None = None
    codec: Score | None = None
    """The recordings after a round trip through the codec: the floor of every model that speaks through it."""
    teacher_alarm: str | None = None
    """What is wrong with the teacher's own speech, see :mod:`mamtra_ray.evaluate.alarms`."""
    evaluation: str = ""
    """Identifies the evaluation that heard the teacher; the finalists' rows name the same one."""


@dataclass(frozen=True)
class Clip:
    """One audio file. ``file`` is relative to the ``audio`` folder."""

    system: str
    utterance_id: str
    file: str
    hypothesis: str | None = None
    """What the recognizer heard."""
    sha256: str = ""
    """Of the file; empty only before the index is written."""


@dataclass(frozen=True)
class AudioIndex:
    """The audio of a run: ``texts`` by utterance id, ``systems`` in the order to show them."""

    systems: tuple[str, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    clips: tuple[Clip, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run folder, read. What is not there yet is empty or ``None``."""

    path: Path
    name: str
    """The folder's; :func:`read_runs` puts parents before it where two would be called the same."""
    config: Config
    architecture: Architecture | None
    trials: list[TrialRow]
    probe: list[ProbeRow]
    curves: list[CurvePoint]
    finalists: list[FinalistRow]
    reference: Reference | None
    phases: dict[str, dict[str, Any]]
    rungs: list[dict[str, Any]]
    audio: AudioIndex
    best_layout: Layout | None
    """The finalist that was exported to ``best/``."""
    distilled: FinalistRow | None = None
    """Of the student of ``python -m mamtra_ray.distill``."""


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
    finalists, reference = read_table(path / FINALISTS, FinalistRow), read_reference(path)
    _check_one_evaluation(path, finalists, reference)
    costs = Costs(path / COSTS)
    return Run(
        path=path,
        name=path.resolve().name,
        config=load_config(path / CONFIG),
        architecture=read_architecture(path),
        trials=read_trials(path),
        probe=latest_scores(path),
        curves=read_journal(path / CURVES, CurvePoint, CURVE_KEY),
        finalists=finalists,
        reference=reference,
        phases=costs.phases,
        rungs=costs.rungs,
        audio=read_audio_index(path),
        best_layout=exported_layout(path / BEST),
        distilled=read_distilled(path),
    )


def _check_one_evaluation(path: Path, finalists: Sequence[FinalistRow], reference: Reference | None) -> None:
    """Refuse rates of finalists beside a teacher's of another evaluation."""
    heard_in = reference.evaluation if reference else ""
    if other := next((row.layout for row in finalists if row.evaluation != heard_in), None):
        raise InputError(
            f"{path / FINALISTS} and {path / REFERENCE} are of different evaluations ({other} was heard in another one "
            f"than the teacher): python -m mamtra_ray.evaluate --run {path} writes both anew"
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


def read_trials(folder: Path) -> list[TrialRow]:
    """Rows of ``trials.parquet``, and those that a running search has added since."""
    return read_journal(folder / TRIALS, TrialRow, TRIAL_KEY)


def latest_scores(folder: Path) -> list[ProbeRow]:
    """Rows of ``probe.parquet`` made with the data of its last row: scores on other tokens, or with another mixer
    library, do not compare."""
    rows = read_table(folder / PROBE, ProbeRow)
    return [row for row in rows if row.made_by == rows[-1].made_by]


def exported_layout(folder: Path) -> Layout | None:
    """The layout of an exported checkpoint; None if there is none in the folder."""
    if not (folder / EXPORTED_LAYOUT).exists():
        return None
    return Layout.from_string(read_manifest(folder / EXPORTED_LAYOUT, "layout", 1)["layout"])


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
        fields = {name: content[name] for name in content if name not in (*_MANIFEST_KEYS, "mamba")}
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
        scores = {name: _score(content[name]) for name in ("teacher", "codec")}
        return Reference(
            content["teacher_ce"],
            content["evaluation_sentences"],
            **scores,
            teacher_alarm=content["teacher_alarm"],
            evaluation=content["evaluation"],
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is no reference of a run: {error}") from None


def _score(content: dict[str, Any] | None) -> Score | None:
    if content is None:
        return None
    return Score(ErrorRate(**content["wer"]), content["cer"], content["metrics"])


def write_audio_index(folder: Path, index: AudioIndex) -> None:
    """Write ``audio/index.json``; the files it names must already be there."""
    for clip in index.clips:
        if not (folder / AUDIO / clip.file).exists():
            raise ValueError(f"{clip.file} is in the audio index but not in {folder / AUDIO}")
    clips = tuple(
        clip if clip.sha256 else dataclasses.replace(clip, sha256=file_hash(folder / AUDIO / clip.file))
        for clip in index.clips
    )
    _write(folder / AUDIO_INDEX, "audio_index", dataclasses.asdict(dataclasses.replace(index, clips=clips)))


def read_audio_index(folder: Path, *, check_sound: bool = True) -> AudioIndex:
    """Read ``audio/index.json``; an empty index if the run has no audio.

    Args:
        folder: of the run.
        check_sound: whether the sound files are read, too, and compared with their hashes.

    Raises:
        InputError: damaged, or it names a file outside the audio folder, or one that is missing or damaged.
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
        if check_sound and file_hash(file) != clip.sha256:
            raise InputError(f"{file} is damaged, or not the file that {path} describes: speak again with evaluate")
        if clip.utterance_id not in index.texts:
            raise InputError(f"{path} has no text for utterance {clip.utterance_id}")
    return index


def _write(path: Path, kind: str, content: dict[str, Any]) -> None:
    write_checked_json(path, {"kind": kind, "schema_version": _SCHEMA_VERSION, **content})


def _read(path: Path, kind: str) -> dict[str, Any]:
    return read_manifest(path, kind, _SCHEMA_VERSION)
