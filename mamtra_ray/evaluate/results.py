"""Scores of an evaluation: from rows of recognized sentences to rates, intervals, and the files of a run folder."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mamtra_ray.artifacts import checked_lines, content_hash, row_of_line, write_manifest, write_text
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.alarms import Measured
from mamtra_ray.evaluate.worker import Row
from mamtra_ray.run.folder import AudioIndex, Clip, read_audio_index, write_audio_index
from mamtra_ray.run.names import AUDIO, CODEC, TEACHER
from mamtra_ray.speech.end_of_speech import end_of_speech
from mamtra_ray.speech.error_rate import ErrorRate
from mamtra_ray.speech.normalization import MEAN_OVER_UTTERANCES
from mamtra_ray.speech.wer import PairedDifference, WerResult, bootstrap_interval, paired_difference, word_error_rate

SCHEMA_VERSION = 4
FOLDER = "evaluation"
SUMMARY = f"{FOLDER}/summary.json"
RATES = ("corpus_wer", "mean_utterance_wer", "corpus_cer", "mean_utterance_cer")
"""Words or characters; errors of all utterances over their length, or the unweighted mean of the utterances' rates."""
_OWN_COLUMNS = {"audio_seconds"}
_FILE_NAME, _LONGEST_NAME = re.compile(r"\w[\w .,@=+-]*"), 150


@dataclass(frozen=True)
class Evaluation:
    """One system's scores; rates are fractions."""

    system: str
    normalization: str
    wer: ErrorRate
    """Headline rate: corpus WER, or the mean over utterances where the normalization's benchmark has it so (seed)."""
    cer: float
    """Character errors over reference characters of all utterances."""
    rates: Mapping[str, ErrorRate]
    """All of :data:`RATES`, intervals by resampling utterances; ``wer`` and ``cer`` are two of them."""
    sentences: int
    rows: tuple[Row, ...]
    """Per utterance: what was said, heard and counted."""
    failures: tuple[Row, ...]
    """Rows that did not become speech or text, or ran into the length limit; the rates count them as they are."""
    difference_to_teacher: PairedDifference | None
    """WER minus the teacher's on the sentences both said; None for the teacher."""
    metrics: Mapping[str, float]
    """Mean over the utterances that have it, of every further score."""
    metric_utterances: Mapping[str, int]
    """How many utterances these means are over."""
    identity: str = ""
    """Of models, settings and sentences of the whole evaluation: the same for all systems heard in it."""

    def measured(self, ce: float | None = None) -> Measured:
        """For :mod:`mamtra_ray.evaluate.alarms`; ``ce`` where it is known."""
        return Measured(self.system, ce, self.wer, end_of_speech(self.rows))

    def summary(self) -> dict[str, Any]:
        """Everything but the rows, JSON-ready."""
        content = asdict(replace(self, rows=(), failures=()))
        del content["rows"]
        content["failures"] = [
            {"utterance_id": row["utterance_id"], "failure": row["failure"]} for row in self.failures
        ]
        content["unscored"] = [
            {"utterance_id": row["utterance_id"], "score": score, "reason": reason}
            for row in self.rows
            for score, reason in row.get("unscored", {}).items()
        ]
        return content


def scored(rows: Mapping[str, Sequence[Row]], normalization: str, identity: str = "") -> dict[str, Evaluation]:
    """Rates of every system; ``rows`` by system, each in the order of the sentences.

    Args:
        rows: with at least ``utterance_id``, ``text``, ``hypothesis``, ``failure``.
        normalization: a name in :data:`~mamtra_ray.speech.wer.NORMALIZATIONS`.
        identity: of the evaluation.
    """
    evaluations = {}
    for system, own in rows.items():
        result = _result(own, normalization)
        rates = {}
        for name in RATES:
            counts = counts_of_rate(result, name)
            rates[name] = ErrorRate(counts.wer, *bootstrap_interval(counts.errors, counts.words))
        headline = rates[headline_rate(normalization)]
        counted = tuple(
            {
                **row,
                "normalized_hypothesis": hypothesis,
                "word_errors": int(errors),
                "words": int(words),
                "character_errors": int(character_errors),
                "characters": int(characters),
            }
            for row, hypothesis, errors, words, character_errors, characters in zip(
                own,
                result.hypotheses,
                result.errors,
                result.words,
                result.character_errors,
                result.characters,
                strict=True,
            )
        )
        scores = _scores(counted)
        evaluations[system] = Evaluation(
            system=system,
            normalization=normalization,
            wer=headline,
            cer=result.cer,
            rates=rates,
            sentences=len(counted),
            rows=counted,
            failures=tuple(row for row in counted if row["failure"]),
            difference_to_teacher=None,
            metrics={name: float(np.mean(values)) for name, values in scores.items()},
            metric_utterances={name: len(values) for name, values in scores.items()},
            identity=identity,
        )
    if TEACHER in evaluations:
        for system in set(evaluations) - {TEACHER}:
            difference = compare(evaluations[system], evaluations[TEACHER])
            evaluations[system] = replace(evaluations[system], difference_to_teacher=difference)
    return evaluations


def silent_systems(evaluations: Mapping[str, Evaluation]) -> dict[str, str]:
    """Systems that could not say a single sentence, such as a model whose logits are not finite; with the reason."""
    return {
        name: str(evaluation.rows[0]["failure"])
        for name, evaluation in evaluations.items()
        if all(row["failure"] and not row["stopped"] and not row["speech_tokens"] for row in evaluation.rows)
    }


def compare(a: Evaluation, b: Evaluation, rate: str | None = None) -> PairedDifference:
    """A rate of ``a`` minus that of ``b`` on the sentences both have, both resampled together.

    Args:
        rate: one of :data:`RATES`; the headline WER if None.

    Raises:
        InputError: no sentence in common, or different normalizations.
    """
    shared = {row["utterance_id"] for row in a.rows} & {row["utterance_id"] for row in b.rows}
    if not shared or a.normalization != b.normalization:
        raise InputError(f"{a.system} and {b.system} have no sentence and normalization in common to compare")

    def counts(evaluation: Evaluation) -> WerResult:
        rows = sorted((row for row in evaluation.rows if row["utterance_id"] in shared), key=_by_id)
        return counts_of_rate(_result(rows, evaluation.normalization), rate or headline_rate(evaluation.normalization))

    return paired_difference(counts(a), counts(b))


def _by_id(row: Row) -> str:
    return row["utterance_id"]


def _result(rows: Sequence[Row], normalization: str) -> WerResult:
    return _heard(tuple(row["text"] for row in rows), tuple(row["hypothesis"] for row in rows), normalization)


@functools.lru_cache(maxsize=256)
def _heard(texts: tuple[str, ...], hypotheses: tuple[str, ...], normalization: str) -> WerResult:
    # Every pair of systems is compared in four rates: alignments of the same sentences are not computed again.
    return word_error_rate(texts, hypotheses, normalization)


def headline_rate(normalization: str) -> str:
    """The rate that the normalization's benchmark reports."""
    return "mean_utterance_wer" if normalization in MEAN_OVER_UTTERANCES else "corpus_wer"


def counts_of_rate(result: WerResult, rate: str) -> WerResult:
    """A result whose corpus WER is ``rate`` of :data:`RATES`: characters as words, or all utterances equally long."""
    errors, lengths = (result.errors, result.words)
    if rate.endswith("_cer"):
        errors, lengths = (result.character_errors, result.characters)
    if rate.startswith("mean_"):
        errors, lengths = errors / lengths, np.ones(len(lengths))
    return replace(result, wer=float(errors.sum() / lengths.sum()), errors=errors, words=lengths)


def _scores(rows: Iterable[Row]) -> dict[str, list[float]]:
    """Values of every further score."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float) and name not in _OWN_COLUMNS:
                values.setdefault(name, []).append(value)
    return values


def rows_file(folder: Path, system: str) -> Path:
    """``evaluation/<system>.jsonl``."""
    return folder / FOLDER / f"{system}.jsonl"


def audio_file(folder: Path, system: str, utterance_id: str) -> Path:
    """``audio/<system>/<utterance_id>.wav``; an id that is no file name, or too long for one, gets a hash."""
    name = utterance_id
    if not _FILE_NAME.fullmatch(name) or len(name.encode()) > _LONGEST_NAME:
        name = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80].lstrip('.')}-{content_hash(utterance_id)}"
    return folder / AUDIO / system / f"{name}.wav"


def write_rows(folder: Path, system: str, rows: Iterable[Row]) -> None:
    """Write a system's rows as JSON lines with checksums, atomically."""
    write_text(rows_file(folder, system), checked_lines(rows))


def read_rows(folder: Path, system: str) -> list[Row]:
    """A system's rows as last written; none if there is no file.

    Raises:
        InputError: the file is damaged.
    """
    path = rows_file(folder, system)
    if not path.exists():
        return []
    try:
        # Not splitlines(), which also breaks at characters that may stand in a text, such as U+2028.
        lines = path.read_bytes().split(b"\n")
        if lines.pop():
            raise InputError(f"{path} is damaged: its last line is cut off")
        rows = [row_of_line(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]
        if all(row.get("utterance_id") and row.get("evaluation_hash") for row in rows):
            return rows
        raise InputError(f"{path} is no evaluation")
    except (OSError, InputError) as error:
        raise InputError(f"{error}; move the file away, and its sentences are spoken again") from None


def write_summary(
    folder: Path,
    evaluations: Mapping[str, Evaluation],
    made_by: Mapping[str, Any],
    without_words: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """``evaluation/summary.json``: every system's rates and failures, all pairs compared, sentences left out.

    ``settings`` is what a comparison with another run depends on, in words.
    """
    pairs = [
        {"a": a, "b": b, **{rate: asdict(compare(evaluations[a], evaluations[b], rate)) for rate in RATES}}
        for a, b in combinations(evaluations, 2)
    ]
    write_manifest(
        folder / SUMMARY,
        "evaluation",
        SCHEMA_VERSION,
        made_by,
        systems={name: evaluation.summary() for name, evaluation in evaluations.items()},
        paired_differences=pairs,
        left_out_no_words_after_normalization=list(without_words),
        settings=dict(settings),
    )


def write_audio(folder: Path, evaluations: Mapping[str, Evaluation], examples: Sequence[str]) -> None:
    """Add the examples' sound files of these systems to ``audio/index.json``; other systems' clips stay."""
    old = read_audio_index(folder, check_sound=False)
    systems = [CODEC] * (CODEC in evaluations) + [TEACHER] * (TEACHER in evaluations)
    systems += [name for name in evaluations if name not in systems]
    clips, texts = [], dict(old.texts)
    for name in systems:
        for row in evaluations[name].rows:
            path = audio_file(folder, name, row["utterance_id"])
            # A sound file that is there may be of an earlier evaluation, in which the system said something.
            if row["utterance_id"] in examples and "audio_sha256" in row:
                file = str(path.relative_to(folder / AUDIO))
                clips.append(Clip(name, row["utterance_id"], file, row["hypothesis"], row["audio_sha256"]))
                texts[row["utterance_id"]] = row["text"]
    kept = [clip for clip in old.clips if clip.system not in evaluations]
    clips = kept + clips
    used = {clip.utterance_id for clip in clips}
    order = [name for name in old.systems if name not in evaluations]
    # What students are compared with comes first.
    references = [name for name in systems if name in (CODEC, TEACHER)]
    order = references + order + [name for name in systems if name not in references]
    write_audio_index(
        folder, AudioIndex(tuple(order), {key: text for key, text in texts.items() if key in used}, tuple(clips))
    )
