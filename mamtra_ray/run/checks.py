"""What a dry run can say about the user's files in a second: no torch, no Ray, no tensor is read.

What it refuses, the run would refuse. What a run needs to load (a tensor of another shape, a damaged shard) it leaves
to the run, which checks that before anything long.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mamtra_ray.assets import PACKAGED
from mamtra_ray.config import Config
from mamtra_ray.corpus.check import check_against_teacher
from mamtra_ray.corpus.selection import usable
from mamtra_ray.corpus.table import (
    CorpusIdentity,
    corpus_identity,
    read_corpus,
    split_of,
)
from mamtra_ray.efficiency import closed_form
from mamtra_ray.efficiency.architectures import Architecture
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace, own_candidates
from mamtra_ray.speech.language import ENGLISH, language_of
from mamtra_ray.speech.quality import check_packages
from mamtra_ray.teachers.outline import TeacherOutline, teacher_outline


@dataclass(frozen=True)
class CheckedInputs:
    """What was found."""

    teacher: TeacherOutline
    corpus: CorpusIdentity
    train: pa.Table
    """What can be trained on, in the order in which a limit takes it."""
    validation: pa.Table
    left_out: int
    """Utterances of both that are longer than what the teacher was trained for."""
    space: SearchSpace

    @property
    def num_layers(self) -> int:
        """Decoder layers of the teacher."""
        return self.teacher.architecture.num_layers

    @property
    def architecture(self) -> Architecture:
        """Shape of the teacher."""
        return self.teacher.architecture

    def body_parameters(self) -> int:
        """Of the teacher's decoder, without tables."""
        return closed_form.parameters(self.architecture, Layout.all_attention(self.num_layers))


def check_inputs(config: Config, *, speech: bool) -> CheckedInputs:
    """Check teacher, corpus, layouts, and with ``speech`` what an evaluation needs.

    Raises:
        InputError: the first thing that the run would refuse.
    """
    outline = teacher_outline(config.teacher.kind, config.teacher.path, config.student.state_sharing)
    layers = outline.architecture.num_layers
    space = search_space(config, layers)
    own_candidates(space, config.search.layouts)
    if outside := [layer for layer in config.cache.layers if layer >= layers]:
        raise InputError(f"cache.layers has layer {outside[0]}, the teacher only 0 to {layers - 1}")
    corpus = read_corpus(config.corpus_path)
    check_against_teacher(corpus, outline, config.teacher)
    splits = {split: split_of(corpus, split) for split in ("train", "validation")}
    overhead, longest = outline.sequence_overhead, outline.max_length
    train, validation = (usable(rows, split, overhead, longest, config.corpus.seed) for split, rows in splits.items())
    left_out = sum(map(len, splits.values())) - len(train) - len(validation)
    if config.cache.format == "topk" and config.cache.top_k >= outline.speech_size:
        raise InputError(f"cache.top_k={config.cache.top_k} must be below the {outline.speech_size} ids it is of")
    if speech and config.evaluate.sentences:
        _check_speech(config, outline, corpus)
        if config.search.sentences and not any(text.strip() for text in validation["text"].to_pylist()):
            raise InputError(
                f"search.sentences={config.search.sentences}, but the validation split has no text to speak"
            )
    return CheckedInputs(outline, corpus_identity(corpus), train, validation, left_out, space)


def check_loggers(config: Config) -> None:
    """Before a search: are the packages of ``search.loggers`` there?

    Raises:
        InputError: one is not installed.
    """
    for name in config.search.loggers:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"search.loggers has {name}, which is not installed: pip install {name}, or leave it out")


def search_space(config: Config, num_layers: int) -> SearchSpace:
    """The layouts that ``config`` allows of a teacher of ``num_layers``.

    Raises:
        InputError: ratios or constraints that no layout can meet.
    """
    search = config.search
    return SearchSpace(num_layers, search.ratios, frozenset(search.keep_attention), frozenset(search.always_mamba))


def _check_speech(config: Config, outline: TeacherOutline, corpus: pa.Table) -> None:
    evaluate = config.evaluate
    test = split_of(read_corpus(evaluate.corpus) if evaluate.corpus else corpus, "test")
    check_against_teacher(test, outline, config.teacher)
    language = evaluate.language or language_of(test["text"].to_pylist())
    if evaluate.recognizer == "demo" and language != ENGLISH:
        raise InputError(
            f"evaluate.recognizer=demo hears English only, the sentences are {language!r}: give whisper:FOLDER of a "
            "multilingual Whisper, or set evaluate.language"
        )
    _folder(evaluate.recognizer.partition(":")[2], "evaluate.recognizer", "a folder with Whisper weights")
    for metric in evaluate.metrics:
        _exists(metric.partition(":")[2], f"evaluate.metrics={metric}")
        check_packages(metric)
    _exists(evaluate.codec or "", "evaluate.codec")
    if evaluate.codec is None and config.teacher.kind not in (*PACKAGED, "cosyvoice2"):
        raise InputError(
            f"teacher {config.teacher.kind!r} does not say how its tokens sound: give evaluate.codec (a CosyVoice 2 "
            "folder, an Xcodec2 folder, or a demo codec file), or evaluate.sentences=0 for no WER"
        )


def _exists(path: str, key: str) -> None:
    if path and not Path(path).exists():
        raise InputError(f"{key}: {path} does not exist")


def _folder(path: str, key: str, what: str) -> None:
    if path and not Path(path).is_dir():
        raise InputError(f"{key}: {path} is not {what}")
