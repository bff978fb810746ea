"""The demo assets from nothing: sentences, voice, codec, corpus, teacher, measured error rates.

Every stage's output lies in the work folder under its name and the hash of everything it was made
from. A stage whose output is there is not run again, so a stopped build goes on where it stood and a
changed setting rebuilds only what depends on it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import Qwen2ForCausalLM

from mamtra_ray.artifacts import content_hash, file_hash, read_json, write_json
from mamtra_ray.corpus.table import read_corpus, write_corpus
from mamtra_ray.demo_assets.codec import NUM_PHASES, CodecSettings, fit_codec
from mamtra_ray.demo_assets.language_model import Example, TeacherSettings, sequence_format, train_teacher
from mamtra_ray.demo_assets.recordings import SpeechShards, speak_sentences
from mamtra_ray.demo_assets.tracking import TrackingSettings
from mamtra_ray.demo_assets.voice import Voice, WordTimer
from mamtra_ray.speech.demo_codec import DecoderConfig, load_codec
from mamtra_ray.speech.tokenizer import TOKENS_PER_SECOND, Tokenizer, log_mel
from mamtra_ray.speech_lm.sequences import SequenceFormat
from mamtra_ray.teachers.demo_grammar import draw_splits, spoken_form, tokenize_text
from mamtra_ray.teachers.huggingface import FORMAT_FILE, write_format

SAMPLING = {"temperature": 0.8, "top_p": 0.8, "top_k": 25}
"""The teacher's own sampling settings, beside greedy decoding."""


@dataclass(frozen=True)
class BuildSettings:
    """Everything the assets depend on. Two builds with equal settings make the same assets."""

    validation_sentences: int = 250
    test_sentences: int = 350
    train_sentences: int = 4_000
    codec_sentences: int = 1_200
    """The codec is fitted on the first so many sentences of the train split."""
    codec: CodecSettings = field(default_factory=CodecSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    longest_sentence: int = 16
    """In words. Longer sentences train the teacher, but it exchanges their words too often to be a reference: they
    stay out of the finished corpus and of the measurement."""
    measured_sentences: int = 300
    """The error rates are of the first so many sentences of the test split."""
    gated: bool = True
    """Stop when codec or teacher cost more words than they may."""
    seed: int = 2026


SCALES = {
    "full": BuildSettings(),
    "tiny": BuildSettings(
        validation_sentences=4,
        test_sentences=4,
        train_sentences=24,
        codec_sentences=24,
        longest_sentence=36,
        measured_sentences=4,
        gated=False,
        codec=CodecSettings(
            codebook_size=32,
            codebook_iterations=5,
            decoder=DecoderConfig(channels=16, num_blocks=1),
            steps=20,
            batch_segments=4,
            segment_tokens=16,
        ),
        teacher=TeacherSettings(
            num_layers=2,
            hidden_size=16,
            mlp_size=32,
            num_heads=2,
            num_kv_heads=1,
            max_length=160,
            cycles=(4, 2),
            tracking_from_step=2,
            tracking=TrackingSettings(layer=1),
            steps_per_checkpoint=3,
        ),
    ),
}
"""`full` makes what the package ships; `tiny` runs every stage in seconds and makes nothing of use."""


@dataclass(frozen=True)
class Sentences:
    """All sentences in the order of the corpus, and where each split lies in it."""

    texts: tuple[str, ...]
    ranges: dict[str, range]

    def of(self, split: str) -> list[str]:
        """The sentences of one split."""
        return [self.texts[index] for index in self.ranges[split]]


def draw_corpus_sentences(settings: BuildSettings) -> Sentences:
    """Distinct sentences of all splits."""
    splits = draw_splits(
        {
            "validation": settings.validation_sentences,
            "test": settings.test_sentences,
            "train": settings.train_sentences,
        },
        settings.seed,
    )
    ranges, start = {}, 0
    for split, sentences in splits.items():
        ranges[split] = range(start, start + len(sentences))
        start += len(sentences)
    return Sentences(tuple(text for sentences in splits.values() for text in sentences), ranges)


def speak_corpus(
    sentences: Sentences, work: Path, voice_name: str, make_voice: Callable[[], Voice], jobs: int
) -> SpeechShards:
    """Sound of all sentences, in `work/voice`."""
    return speak_sentences(
        [spoken_form(text) for text in sentences.texts], work / "voice", voice_name, make_voice, jobs
    )


def build_codec(
    sentences: Sentences, shards: SpeechShards, work: Path, voice_name: str, settings: BuildSettings
) -> Path:
    """The codec fitted on the train split, in `work/codec-<hash>.safetensors`."""
    first = sentences.ranges["train"].start
    texts = sentences.of("train")[: settings.codec_sentences]
    made_by = {
        "voice": voice_name,
        "sentences": content_hash(texts),
        "settings": content_hash(dataclasses.asdict(settings.codec)),
    }
    path = work / f"codec-{content_hash(made_by)}.safetensors"
    if not path.exists():
        waveforms = shards.waveforms(first, first + len(texts))
        fit_codec(waveforms, settings.codec, made_by).save(path)
    return path


def build_corpus(sentences: Sentences, shards: SpeechShards, codec_path: Path, work: Path) -> Path:
    """Speech tokens of all sentences, in `work/corpus-<hash>.parquet`.

    The train split comes in all phases of the token grid: first every sentence in phase 0, then every
    sentence in phase 1, and so on, so that a prefix of the split holds as many different sentences as it can.
    """
    made_by = {"codec": file_hash(codec_path), "sentences": content_hash(sentences.texts)}
    path = work / f"corpus-{content_hash(made_by)}.parquet"
    if path.exists():
        return path
    tokenizer = load_codec(codec_path).tokenizer
    rows: dict[int, list[dict[str, object]]] = {phase: [] for phase in range(NUM_PHASES)}
    for split, indices in sentences.ranges.items():
        waveforms = shards.waveforms(indices.start, indices.stop)
        for phase, found in token_rows(split, sentences.of(split), waveforms, tokenizer).items():
            rows[phase] += found
    write_corpus(path, [row for phase in rows.values() for row in phase], tokenizer="demo", made_by=made_by)
    return path


def token_rows(
    split: str, texts: Sequence[str], waveforms: Iterable[np.ndarray], tokenizer: Tokenizer
) -> dict[int, list[dict[str, object]]]:
    """Rows of a corpus per phase of the token grid: all phases for the train split, the first for the others."""
    rows: dict[int, list[dict[str, object]]] = {phase: [] for phase in range(NUM_PHASES if split == "train" else 1)}
    for number, (text, waveform) in enumerate(zip(texts, waveforms, strict=True)):
        mel_TM = log_mel(waveform)
        for phase, found in rows.items():
            found.append(
                {
                    "utterance_id": f"{split}-{number:05d}" + (f"-phase{phase}" if phase else ""),
                    "text": text,
                    "text_tokens": tokenize_text(text),
                    "speech_tokens": tokenizer.encode_mel(mel_TM, phase),
                    "split": split,
                }
            )
    return rows


def leave_out_long_sentences(corpus: Path, longest: int, work: Path) -> Path:
    """The corpus without sentences of more than ``longest`` words, in `work/short-<hash>.parquet`."""
    import pyarrow.compute as pc

    made_by = {"corpus": file_hash(corpus), "longest_sentence": longest}
    path = work / f"short-{content_hash(made_by)}.parquet"
    if not path.exists():
        table = read_corpus(corpus)
        kept = table.filter(pc.less_equal(pc.list_value_length(table["text_tokens"]), longest))
        write_corpus(path, kept, tokenizer="demo", made_by=made_by)
    return path


def first_phase(table: pa.Table) -> pa.Table:
    """The rows of a corpus without the further phases of the train split."""
    import pyarrow.compute as pc

    return table.filter(pc.invert(pc.match_substring(table["utterance_id"], "-phase")))


def time_words(
    sentences: Sentences, work: Path, voice_name: str, make_timer: Callable[[], WordTimer]
) -> dict[str, list[float]]:
    """When each word of every sentence ends (seconds), in `work/word-ends-<hash>.json`."""
    path = work / f"word-ends-{content_hash([voice_name, sentences.texts])}.json"
    if not path.exists():
        timer = make_timer()
        write_json(path, {text: [round(end, 4) for end in timer(spoken_form(text))] for text in sentences.texts})
    ends: dict[str, list[float]] = read_json(path)
    return ends


def examples(corpus: Path, split: str, word_ends: dict[str, list[float]] | None = None) -> list[Example]:
    """Sentences of a split with the speech tokens of all their phases, in the order of the corpus.

    `word_ends` (seconds per sentence) is only needed for training.
    """
    table = read_corpus(corpus, split)
    by_text: dict[str, Example] = {}
    for text, text_tokens, speech_tokens in zip(
        table["text"].to_pylist(), table["text_tokens"].to_pylist(), table["speech_tokens"].to_pylist(), strict=True
    ):
        example = by_text.setdefault(text, Example(text_tokens, [], word_ends[text] if word_ends else []))
        example.phases.append(speech_tokens)
    return list(by_text.values())


def build_teacher(
    train: list[Example],
    validation: list[Example],
    made_by: dict[str, str],
    codebook_size: int,
    work: Path,
    settings: TeacherSettings,
    make_start: Callable[[SequenceFormat], Qwen2ForCausalLM] | None = None,
) -> Path:
    """The trained teacher, in the folder `work/teacher-<hash>`.

    Args:
        train, validation: sentences with their word ends.
        made_by: hashes of what the sentences (and the start) come from.
        codebook_size: of the codec.
        work: folder of the stages.
        settings: shape and training.
        make_start: makes the model that training begins with; a new one if None.
    """
    made_by = {**made_by, "settings": content_hash(dataclasses.asdict(settings))}
    folder = work / f"teacher-{content_hash(made_by)}"
    if not (folder / FORMAT_FILE).exists():
        sequence = sequence_format(codebook_size)
        checkpoint = work / f"training-{content_hash(made_by)}.pt"
        start = make_start(sequence) if make_start else None
        model = train_teacher(train, validation, sequence, settings, checkpoint, start)
        save_teacher(model, sequence, train, settings, made_by, folder)
    return folder


def save_teacher(
    model: Qwen2ForCausalLM,
    sequence: SequenceFormat,
    train: list[Example],
    settings: TeacherSettings,
    made_by: dict[str, str],
    folder: Path,
) -> None:
    """Write the model in half precision, and `speech_lm.json` last: it marks the folder as complete."""
    half = copy.deepcopy(model).half()
    half.config.dtype = "float16"
    half.save_pretrained(folder)
    ratios = [len(example.phases[0]) / len(example.text_tokens) for example in train]
    write_format(
        folder,
        sequence,
        TOKENS_PER_SECOND,
        # A margin on both sides of the lengths that occur in the corpus.
        (round(0.7 * min(ratios), 2), round(1.5 * max(ratios), 2)),
        made_by,
        max_length=settings.max_length,
        sampling=SAMPLING,
    )
