"""All stages of the deep demo teacher: 24 layers that speak sentences of up to 62 words.

It shares codec, voice and vocabulary with the demo, and grows out of the demo's teacher. Clauses (read by the voice),
sentences joined of them, word times, training, error rates by length (gate), assets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mamtra_ray.artifacts import content_hash, file_hash, write_json
from mamtra_ray.assets import DEMO, demo_asset
from mamtra_ray.demo_assets.bands import bands_of, measure_bands
from mamtra_ray.demo_assets.build import SCALES as DEMO_SCALES
from mamtra_ray.demo_assets.build import Example, build_teacher, examples
from mamtra_ray.demo_assets.growing import grow
from mamtra_ray.demo_assets.install import install_deep
from mamtra_ray.demo_assets.joined_corpus import (
    JoinedCounts,
    build_split,
    draw_joined,
    speak_clauses,
    time_clauses,
    timed_examples,
)
from mamtra_ray.demo_assets.language_model import TeacherSettings, load_with_transformers
from mamtra_ray.demo_assets.measure import decoded_chunks, speak_with_transformers, table_of_bands
from mamtra_ray.demo_assets.stages import SCHEMA_VERSION, check_gates, cpu_seconds, cpu_time, plan_of
from mamtra_ray.demo_assets.tracking import TrackingSettings
from mamtra_ray.demo_assets.voice import Voice, WordTimer
from mamtra_ray.speech.demo_codec import load_codec
from mamtra_ray.speech.recognizer import Recognizer, load_recognizer


@dataclass(frozen=True)
class DeepSettings:
    """Everything the deep teacher depends on, beside the demo's assets."""

    train: JoinedCounts = field(default_factory=lambda: JoinedCounts(4_000, (700, 1_200, 1_500, 1_800, 1_800)))
    validation: JoinedCounts = field(default_factory=lambda: JoinedCounts(100, (10, 20, 20, 20, 20)))
    test: JoinedCounts = field(default_factory=lambda: JoinedCounts(1_500, (200, 200, 200, 200, 200)))
    lengthened: TeacherSettings = field(
        default_factory=lambda: TeacherSettings(
            max_length=1_024,
            cycles=(400, 400),
            constant_steps=200,
            learning_rate=2e-3,
            tokens_per_batch=6_000,
            tracking_from_step=0,
            tracking=TrackingSettings(layer=8, max_words=64),
        )
    )
    """First the demo's teacher learns long sentences as it is, at half the cost of a step."""
    teacher: TeacherSettings = field(
        default_factory=lambda: TeacherSettings(
            num_layers=24,
            max_length=1_024,
            cycles=(900,),
            learning_rate=1e-3,
            tokens_per_batch=6_000,
            tracking_from_step=0,
            tracking=TrackingSettings(layer=16, max_words=64),
        )
    )
    """Then that one grows and goes on."""
    measured_per_band: int = 200
    """The error rates are of the first so many test sentences of each band."""
    gated: bool = True
    """Stop when the teacher costs more words than it may in any band."""
    seed: int = 2027


_SMALLEST = dataclasses.replace(
    DEMO_SCALES["tiny"].teacher, tracking_from_step=0, tracking=TrackingSettings(layer=1, max_words=64)
)
SCALES = {
    "full": DeepSettings(),
    "tiny": DeepSettings(
        train=JoinedCounts(40, (4, 4, 4)),
        validation=JoinedCounts(20, (2, 1, 1)),
        test=JoinedCounts(20, (2, 1, 1)),
        lengthened=dataclasses.replace(_SMALLEST, max_length=512),
        teacher=dataclasses.replace(_SMALLEST, num_layers=4, max_length=512),
        measured_per_band=1,
        gated=False,
    ),
}
"""`full` makes what the package ships; `tiny` runs every stage in seconds and makes nothing of use. It grows a demo of
the tiny scale."""

_TRAINING = ("train", "validation")
_PLAN = (
    ("clauses", "clauses-*/*.npz", 14),
    ("word times", "clause-ends-*.json", 1),
    ("corpus", "sentences-*.parquet", 1),
    ("teacher", "teacher-*", 61),
    ("error rates", "heard-*.json", 25),
)


def plan(work: Path) -> str:
    """See :func:`mamtra_ray.demo_assets.stages.plan_of`."""
    return plan_of(_PLAN, work)


def build_deep(
    settings: DeepSettings,
    work: Path,
    output: Path,
    voice_name: str,
    make_voice: Callable[[], Voice],
    make_timer: Callable[[], WordTimer],
    jobs: int = 1,
    recognizer: Recognizer | None = None,
    demo: Path = DEMO,
) -> dict[str, Any]:
    """Build, measure and install the deep teacher.

    Args:
        settings: what to build.
        work: stages in between; what is there and fits is reused.
        output: folder of the finished assets.
        voice_name: identifies the voice in hashes.
        make_voice: loads the voice in a worker process.
        make_timer: loads what knows when the voice ends each word.
        jobs: worker processes of the voice.
        recognizer: who listens; the offline Whisper tiny.en if None.
        demo: the demo's assets, with the codec and the teacher to grow.

    Returns:
        The content of `measured.json`.

    Raises:
        InputError: a package of the build is missing, or a gate of `settings` does not hold.
    """
    work.mkdir(parents=True, exist_ok=True)
    listener: Recognizer = recognizer or load_recognizer()
    codec_path, grown_from = demo_asset("codec/codec.safetensors", demo), demo_asset("teacher", demo)
    counts = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    joined = draw_joined(counts, settings.seed)
    with cpu_time(work, "clauses"):
        shards = {
            split: speak_clauses(split, found, work, voice_name, make_voice, jobs) for split, found in joined.items()
        }
    with cpu_time(work, "word times"):
        ends = {split: time_clauses(split, joined[split], work, voice_name, make_timer) for split in _TRAINING}
    with cpu_time(work, "corpus"):
        corpora = {split: build_split(split, joined[split], shards[split], codec_path, work) for split in joined}
    with cpu_time(work, "teacher"):
        training = {
            split: timed_examples(split, joined[split], shards[split], ends[split], corpora[split])
            for split in _TRAINING
        }
        made_by = {
            "corpus": content_hash([file_hash(corpora[split]) for split in _TRAINING]),
            "word_ends": content_hash(ends),
        }
        teacher, codec = grown_from, load_codec(codec_path)
        for shape in (settings.lengthened, settings.teacher):
            teacher = _train_on(teacher, shape, training, made_by, codec.num_tokens, work)
    with cpu_time(work, "error rates"):
        bands = bands_of(examples(corpora["test"], "test"), settings.measured_per_band)
        model, sequence = load_with_transformers(teacher)

        def round_trip(rows: list[Example]) -> Iterator[list[np.ndarray]]:
            return decoded_chunks(codec, [row.phases[0] for row in rows])

        def speak(rows: list[Example]) -> Iterator[list[np.ndarray]]:
            # A generator: nothing is generated for sentences that a stopped build has heard in full.
            yield from decoded_chunks(
                codec, speak_with_transformers(model, sequence, [row.text_tokens for row in rows])
            )

        systems = {
            "codec": (round_trip, file_hash(corpora["test"])),
            "teacher greedy": (speak, [file_hash(teacher / "model.safetensors"), file_hash(codec_path)]),
        }
        measured_bands = measure_bands(bands, systems, listener, work)
    measured = {
        "kind": "demo_measured",
        "schema_version": SCHEMA_VERSION,
        "recognizer": listener.name,
        "normalization": "demo",
        "voice": voice_name,
        "bands": measured_bands,
        "training": [
            {"layers": shape.num_layers, "steps": shape.steps, "tokens_per_batch": shape.tokens_per_batch}
            for shape in (settings.lengthened, settings.teacher)
        ],
        "cpu_minutes": {stage: round(seconds / 60, 1) for stage, seconds in cpu_seconds(work).items()},
    }
    write_json(work / "measured.json", measured)
    print(table_of_bands(measured_bands), flush=True)
    for name, band in measured_bands.items():
        check_gates({f"{gate}, {name}": found for gate, found in band["gates"].items()}, settings.gated)
    install_deep(dataclasses.asdict(settings), settings.teacher, measured, corpora, teacher, output)
    return measured


def _train_on(
    begun_with: Path,
    settings: TeacherSettings,
    training: dict[str, list[Example]],
    made_by: dict[str, str],
    codebook_size: int,
    work: Path,
) -> Path:
    """The teacher of `settings` that the one in the folder `begun_with` becomes."""
    trained, _ = load_with_transformers(begun_with)
    return build_teacher(
        training["train"],
        training["validation"],
        {**made_by, "begun_with": file_hash(begun_with / "model.safetensors")},
        codebook_size,
        work,
        settings,
        lambda sequence: grow(trained, sequence, settings),
    )
