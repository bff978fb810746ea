"""What trials say: a layout that has reached the last rung speaks a few sentences, and a recognizer listens.

The sentences are of the validation split: a layout must not be chosen by the test sentences that judge it later. The
trial's own process speaks and listens, with the code of the evaluation; it has its CPU or GPU already.

Beside the word error rate there is the token error rate: how far the free-running speech tokens are from those that
the teacher says for the same text. It needs no recognizer and is less coarse than words, but another pronunciation of
the right words counts as an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jiwer

from mamtra_ray.artifacts import content_hash, read_manifest_of, write_manifest
from mamtra_ray.corpus.selection import drawn
from mamtra_ray.corpus.table import Utterance, corpus_identity, read_corpus, utterances
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.evaluation import SENTENCES_PER_CHUNK, evaluation_made_by, evaluation_settings, with_language
from mamtra_ray.evaluate.pool import evaluated
from mamtra_ray.evaluate.results import scored
from mamtra_ray.evaluate.worker import Chunk, EvaluationSettings, EvaluationWorker, Row
from mamtra_ray.run.names import TEACHER
from mamtra_ray.run.session import Session
from mamtra_ray.runtime.progress import said_while
from mamtra_ray.speech.error_rate import ErrorRate
from mamtra_ray.speech.wer import NORMALIZATIONS

FILE = "trial_speech.json"
_KIND, _SCHEMA_VERSION = "trial speech", 1


@dataclass(frozen=True)
class TrialSpeech:
    """What a trial needs to be heard."""

    settings: EvaluationSettings
    sentences: tuple[Utterance, ...]
    teacher_tokens: Mapping[str, Sequence[int]]
    """What the teacher says, by utterance id."""
    teacher_wer: ErrorRate
    identity: str
    """Of teacher, sentences and settings: scores of others do not compare."""
    num_threads: int


@dataclass(frozen=True)
class SpeechScore:
    """What was heard of one layout."""

    wer: ErrorRate
    token_error_rate: float
    """Insertions, deletions and substitutions over the teacher's tokens."""


def prepare_trial_speech(session: Session) -> TrialSpeech | None:
    """Let the teacher speak the trials' sentences, once in a run; None where trials do not speak.

    Raises:
        InputError: the validation split has no sentence with a word, or the teacher says nothing.
    """
    config, folder = session.config, session.folder
    if not (config.search.sentences and config.evaluate.sentences):
        return None
    validation = read_corpus(config.corpus_path, "validation")
    sentences = validation_sentences(
        utterances(drawn(validation, config.corpus.seed)), config.search.sentences, config.evaluate.normalization
    )
    config = with_language(config, sentences)
    made_by = evaluation_made_by(config, session.shared_teacher, corpus_identity(validation).corpus_hash)
    made_by |= {"sentences": content_hash([sentence.utterance_id for sentence in sentences])}
    settings = evaluation_settings(config, session.shared_teacher)
    if manifest := read_manifest_of(folder / FILE, _KIND, _SCHEMA_VERSION, made_by):
        rows: list[Row] = manifest["rows"]
    else:
        session.screen.say(f"    the teacher speaks {len(sentences)} validation sentences, as the trials will")
        chunks = [Chunk(TEACHER, None, part, frozenset()) for part in _parts(sentences)]
        with session.screen.costs.timed("trials"), said_while("the teacher speaks"):
            rows = [row for _, heard, *_ in evaluated(settings, chunks, session.worker) for row in heard]
        write_manifest(folder / FILE, _KIND, _SCHEMA_VERSION, made_by, rows=rows)
    if not any(row["speech_tokens"] for row in rows):
        raise InputError(f"the teacher said nothing for the trials' sentences: {rows[0]['failure']}")
    return TrialSpeech(
        settings,
        tuple(sentences),
        {row["utterance_id"]: row["speech_tokens"] for row in rows},
        scored({TEACHER: rows}, config.evaluate.normalization)[TEACHER].wer,
        content_hash([made_by, config.evaluate.normalization]),
        session.worker.num_threads,
    )


def validation_sentences(candidates: Sequence[Utterance], count: int, normalization: str) -> list[Utterance]:
    """The first ``count`` of ``candidates`` that have a word after normalization.

    Raises:
        InputError: there are none.
    """
    normalize = NORMALIZATIONS[normalization]
    speakable = [sentence for sentence in candidates if normalize(sentence.text).split()][:count]
    if not speakable:
        raise InputError(
            f"search.sentences={count}: the validation split has no sentence with a word after {normalization} "
            "normalization; search.sentences=0 lets trials be silent"
        )
    return speakable


def speech_score(speech: TrialSpeech, system: str, student: Path) -> SpeechScore:
    """Speak with a saved student and listen, in this process.

    Raises:
        InputError: the recognizer or the codec cannot be loaded.
        GenerationCheckError: the student does not generate what it computes.
    """
    worker = _worker_of_this_process(speech)
    rows = [
        row for part in _parts(speech.sentences) for row in worker.run(Chunk(system, student, part, frozenset()))[0]
    ]
    wer = scored({system: rows}, speech.settings.evaluate.normalization)[system].wer
    return SpeechScore(wer, token_error_rate(rows, speech.teacher_tokens))


def token_error_rate(rows: Sequence[Row], teacher_tokens: Mapping[str, Sequence[int]]) -> float:
    """Edits between the rows' speech tokens and the teacher's, over the teacher's; its empty answers do not count."""
    theirs, ours = [], []
    for row in rows:
        if tokens := teacher_tokens[row["utterance_id"]]:
            theirs.append(" ".join(map(str, tokens)))
            ours.append(" ".join(map(str, row["speech_tokens"])))
    return float(jiwer.wer(theirs, ours))


_worker: tuple[str, EvaluationWorker] | None = None


def _worker_of_this_process(speech: TrialSpeech) -> EvaluationWorker:
    """A trial's process runs several trials: recognizer and codec are loaded once."""
    global _worker
    if _worker is None or _worker[0] != speech.identity:
        _worker = speech.identity, EvaluationWorker(speech.settings, speech.num_threads)
    return _worker[1]


def _parts(sentences: Sequence[Utterance]) -> list[tuple[Utterance, ...]]:
    ordered = sorted(sentences, key=lambda sentence: len(sentence.text_tokens))
    starts = range(0, len(ordered), SENTENCES_PER_CHUNK)
    return [tuple(ordered[start : start + SENTENCES_PER_CHUNK]) for start in starts]
