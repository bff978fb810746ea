"""All stages of the demo build in order, with the two gates between them.

Voice, codec, corpus, round trip (gate: no teacher before the codec keeps the voice's words), word times,
teacher, its error rates (gate), assets.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mamtra_ray.artifacts import content_hash, file_hash, read_json, write_json
from mamtra_ray.assets import MANIFEST
from mamtra_ray.demo_assets.build import (
    SAMPLING,
    BuildSettings,
    Sentences,
    build_codec,
    build_corpus,
    build_teacher,
    draw_corpus_sentences,
    examples,
    leave_out_long_sentences,
    speak_corpus,
    time_words,
)
from mamtra_ray.demo_assets.install import install
from mamtra_ray.demo_assets.language_model import load_with_transformers
from mamtra_ray.demo_assets.measure import (
    CODEC_LIMIT,
    TEACHER_LIMIT,
    compare,
    decoded_chunks,
    describe,
    hypotheses,
    in_chunks,
    speak_with_transformers,
    table,
)
from mamtra_ray.demo_assets.recordings import SpeechShards
from mamtra_ray.demo_assets.voice import Voice, WordTimer
from mamtra_ray.errors import InputError
from mamtra_ray.speech.demo_codec import load_codec
from mamtra_ray.speech.recognizer import Recognizer, load_recognizer
from mamtra_ray.speech.wer import WerResult, word_error_rate
from mamtra_ray.teachers.demo_grammar import detokenize_text

SCHEMA_VERSION = 1

_PLAN = (
    ("voice", "voice/*.npz", 27),
    ("codec", "codec-*.safetensors", 4),
    ("corpus", "corpus-*.parquet", 1),
    ("round trip", "heard-codec-*.json", 9),
    ("word times", "word-ends-*.json", 4),
    ("teacher", "teacher-*", 45),
    ("teacher's error rates", "heard-sampled-*.json", 10),
)


_OF_WORK = ("voice", "clauses-train", "cpu_seconds.json")
_OF_OUTPUT = (MANIFEST, "corpus_all_phases.parquet", "measured.json")


def plan(work: Path) -> str:
    """See :func:`plan_of`."""
    return plan_of(_PLAN, work)


def plan_of(stages: Sequence[tuple[str, str, int]], work: Path) -> str:
    """The stages, whether the work folder holds any output of them, and their CPU minutes at full scale.

    Args:
        stages: name, pattern of its outputs, minutes.
        work: where the outputs lie.
    """
    lines = [f"{'stage':<24}{'CPU minutes':>12}  found in {work}"]
    for stage, pattern, minutes in stages:
        lines.append(f"{stage:<24}{minutes:>12}  {len(list(work.glob(pattern))) or 'nothing'}")
    return "\n".join(lines)


def check_folders(work: Path, output: Path) -> None:
    """Refuse folders that are there, not empty, and that no build made.

    Raises:
        InputError: names the folder.
    """
    for folder, option, names in ((work, "--work", _OF_WORK), (output, "--output", _OF_OUTPUT)):
        is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not is_free and not any((folder / name).exists() for name in names):
            raise InputError(f"{folder} is there and holds no demo assets: give another {option}")


def build_all(
    settings: BuildSettings,
    work: Path,
    output: Path,
    voice_name: str,
    make_voice: Callable[[], Voice],
    make_timer: Callable[[], WordTimer],
    jobs: int = 1,
    recognizer: Recognizer | None = None,
) -> dict[str, Any]:
    """Build, measure and install the demo assets.

    Args:
        settings: what to build.
        work: stages in between; what is there and fits is reused.
        output: folder of the finished assets.
        voice_name: identifies the voice in hashes.
        make_voice: loads the voice in a worker process.
        make_timer: loads what knows when the voice ends each word.
        jobs: worker processes of the voice.
        recognizer: who listens; the offline Whisper tiny.en if None.

    Returns:
        The content of `measured.json`.

    Raises:
        InputError: a package of the build is missing, or a gate of `settings` does not hold.
    """
    work.mkdir(parents=True, exist_ok=True)
    listener: Recognizer = recognizer or load_recognizer()
    sentences = draw_corpus_sentences(settings)
    with cpu_time(work, "voice"):
        shards = speak_corpus(sentences, work, voice_name, make_voice, jobs)
    with cpu_time(work, "codec"):
        codec_path = build_codec(sentences, shards, work, voice_name, settings)
    with cpu_time(work, "corpus"):
        corpus = build_corpus(sentences, shards, codec_path, work)
    finished = leave_out_long_sentences(corpus, settings.longest_sentence, work)
    with cpu_time(work, "round trip"):
        results = _round_trip(settings, sentences, shards, codec_path, finished, work, listener)
    gates = {"codec - voice": compare(results["codec"][0], results["voice"][0], CODEC_LIMIT)}
    check_gates(gates, settings.gated)
    with cpu_time(work, "word times"):
        word_ends = time_words(sentences, work, voice_name, make_timer)
    with cpu_time(work, "teacher"):
        train, validation = (examples(corpus, split, word_ends) for split in ("train", "validation"))
        made_by = {"corpus": file_hash(corpus), "word_ends": content_hash(word_ends)}
        teacher = build_teacher(train, validation, made_by, settings.codec.codebook_size, work, settings.teacher)
    with cpu_time(work, "teacher's error rates"):
        results |= measure_teacher(settings, finished, teacher, codec_path, work, listener)
    for system in ("teacher greedy", "teacher sampled"):
        gates[f"{system} - codec"] = compare(results[system][0], results["codec"][0], TEACHER_LIMIT)
    measured = {
        "kind": "demo_measured",
        "schema_version": SCHEMA_VERSION,
        "recognizer": listener.name,
        "normalization": "demo",
        "voice": voice_name,
        "sampling": SAMPLING,
        "sentences": len(results["voice"][0].errors),
        "systems": {system: describe(result, seconds) for system, (result, seconds) in results.items()},
        "gates": gates,
        "cpu_minutes": {stage: round(seconds / 60, 1) for stage, seconds in cpu_seconds(work).items()},
    }
    write_json(work / "measured.json", measured)
    print(table(measured), flush=True)
    check_gates(gates, settings.gated)
    install(settings, measured, codec_path, finished, teacher, output)
    return measured


Measured = dict[str, tuple[WerResult, float]]
"""Per system its error rates and the seconds of sound they were heard from."""


def _round_trip(
    settings: BuildSettings,
    sentences: Sentences,
    shards: SpeechShards,
    codec_path: Path,
    corpus: Path,
    work: Path,
    recognizer: Recognizer,
) -> Measured:
    first, test = sentences.ranges["test"].start, sentences.of("test")
    texts = [
        detokenize_text(example.text_tokens) for example in examples(corpus, "test")[: settings.measured_sentences]
    ]
    made_by = content_hash([[path.name for path in shards.paths], file_hash(corpus)])
    spoken = shards.waveforms(first, first + len(test))
    waveforms = [spoken[test.index(text)] for text in texts]

    def listen(system: str, chunks: Iterator[list[np.ndarray]]) -> tuple[WerResult, float]:
        return listen_to(texts, chunks, recognizer, work / f"heard-{system}-{made_by}.json", system)

    return {
        "voice": listen("voice", in_chunks(waveforms)),
        "codec": listen("codec", round_trip_chunks(codec_path, corpus, len(texts))),
    }


def round_trip_chunks(codec_path: Path, corpus: Path, count: int) -> Iterator[list[np.ndarray]]:
    """The first `count` test sentences' own tokens, decoded."""
    tokens = [example.phases[0] for example in examples(corpus, "test")[:count]]
    yield from decoded_chunks(load_codec(codec_path), tokens)


def measure_teacher(
    settings: BuildSettings, corpus: Path, teacher: Path, codec_path: Path, work: Path, recognizer: Recognizer
) -> Measured:
    """The teacher's free-running error rates, greedy and sampled, from its finished folder."""
    rows = examples(corpus, "test")[: settings.measured_sentences]
    model, sequence = load_with_transformers(teacher)
    texts = [detokenize_text(example.text_tokens) for example in rows]
    made_by = content_hash([file_hash(teacher / "model.safetensors"), file_hash(codec_path), SAMPLING])

    def listen(name: str, sampling: dict[str, float] | None) -> tuple[WerResult, float]:
        path = work / f"heard-{name}-{made_by}.json"
        return listen_to(texts, speak(sampling), recognizer, path, f"teacher {name}")

    def speak(sampling: dict[str, float] | None) -> Iterator[list[np.ndarray]]:
        # A generator: nothing is generated for sentences that a stopped build has heard in full.
        tokens = speak_with_transformers(model, sequence, [example.text_tokens for example in rows], sampling)
        yield from decoded_chunks(load_codec(codec_path), tokens)

    return {"teacher greedy": listen("greedy", None), "teacher sampled": listen("sampled", SAMPLING)}


def listen_to(
    texts: list[str], chunks: Iterator[list[np.ndarray]], recognizer: Recognizer, path: Path, label: str
) -> tuple[WerResult, float]:
    """Error rates of what is heard in `chunks`, and the seconds of sound; see `hypotheses`."""
    heard, seconds = hypotheses(texts, chunks, recognizer, path, label)
    return word_error_rate(texts, heard), seconds


def check_gates(gates: dict[str, Any], gated: bool) -> None:
    """Refuse a gate that does not hold; nothing if not `gated`."""
    for name, gate in gates.items():
        if gated and not gate["holds"]:
            raise InputError(
                f"the demo's gate '{name}' does not hold: {100 * gate['difference']:.2f} points of WER, at most "
                f"{100 * gate['limit']:.0f} are allowed; use more sentences, longer training or fewer words"
            )


def cpu_seconds(work: Path) -> dict[str, float]:
    """CPU seconds of every stage so far."""
    path = work / "cpu_seconds.json"
    found: dict[str, float] = read_json(path) if path.exists() else {}
    return found


@contextlib.contextmanager
def cpu_time(work: Path, stage: str) -> Iterator[None]:
    """Add the CPU seconds of this process and its finished children to the stage's, over all runs."""

    def now() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    started = now()
    try:
        yield
    finally:
        spent = cpu_seconds(work)
        spent[stage] = round(spent.get(stage, 0.0) + now() - started, 1)
        write_json(work / "cpu_seconds.json", spent)
