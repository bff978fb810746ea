"""Students distilled from the formats of the teacher cache, in turns on the same batches; a part of teacher_cache.py.

Tensor letters: N labeled positions, V speech vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from measurement import quartiles
from state_sharing import spoken
from torch import Tensor

from mamtra_ray.align.mixer_training import MixerTraining
from mamtra_ray.config import load_config
from mamtra_ray.corpus.table import Utterance
from mamtra_ray.distill.training import Distillation, validate
from mamtra_ray.layouts import from_strategy
from mamtra_ray.losses import IGNORE, HiddenTargets, TopKTargets
from mamtra_ray.speech.demo_codec import load_codec
from mamtra_ray.speech.recognizer import load_recognizer
from mamtra_ray.speech.wer import WerResult, bootstrap_interval, paired_difference, word_error_rate
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teacher_cache.batches import DistillBatch, batches
from mamtra_ray.teacher_cache.shared import SharedCache
from mamtra_ray.teachers.teacher import Teacher

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Source:
    """What a student learns from.

    Attributes:
        shared: the batches.
        targets: the rows as stored, rows computed by the teacher now, or all its logits in float16.
        hidden_weight: 0 where there are no hidden states to compare with.
    """

    name: str
    shared: SharedCache
    targets: Literal["cache", "online", "dense"]
    hidden_weight: float


@dataclass
class Lesson:
    """A student and every step of its training: loss terms, and seconds until the batch was there and learned."""

    training: Distillation
    losses: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def student(self) -> SpeechLM:
        return self.training.student


def endless(source: Source, teacher: Teacher, tokens_per_batch: int) -> Iterator[DistillBatch]:
    """Epoch after epoch; equal for all sources but for the teacher's rows."""
    epoch = 0
    while True:
        for batch in batches(source.shared, teacher.sequence, tokens_per_batch=tokens_per_batch, seed=0, epoch=epoch):
            yield batch if source.targets == "cache" else _retargeted(batch, teacher, source.targets)
        epoch += 1


def aligned_mixers(teacher: Teacher, source: Source, tokens: int) -> dict[int, dict[str, Tensor]]:
    """One mixer per layer that has learned its attention's output: where all students start."""
    config = load_config(overrides=[f"align.tokens={tokens}"]).align
    training = MixerTraining(teacher.model, config, "per_query_head", CPU)
    stream = endless(source, teacher, config.tokens_per_batch)
    training.fit_output_projections([next(stream) for _ in range(10)])
    while training.position.tokens < tokens:
        training.step(next(stream))
    return {layer: mixer.state_dict() for layer, mixer in training.mixers.items()}


def distil_in_turns(
    teacher: Teacher, sources: Sequence[Source], mixers: dict[int, dict[str, Tensor]], tokens: int
) -> dict[str, Lesson]:
    """A student of the layout 1:1 from every source, all from the same weights; sources take turns step by step."""
    layout = from_strategy("block_beginning", teacher.model.layout.num_layers, "1:1")
    lessons, streams = {}, {}
    for source in sources:
        overrides = [f"distill.tokens={tokens}", f"distill.hidden_weight={source.hidden_weight}"]
        config = load_config(overrides=overrides).distill
        student = make_student(teacher.model, layout, "aligned", mixers)
        lessons[source.name] = Lesson(Distillation(student, config, tokens, CPU))
        streams[source.name] = endless(source, teacher, config.tokens_per_batch)
    names = list(lessons)
    step = 0
    while lessons[names[0]].training.position.tokens < tokens:
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            lessons[name].losses.append(lessons[name].training.step(next(streams[name])).read())
            lessons[name].seconds.append(time.perf_counter() - began)
        step += 1
    return lessons


def scores(lesson: Lesson, baseline: Lesson, held_out: SharedCache, teacher: Teacher) -> dict[str, Any]:
    """Held-out CE and KL, and the time of a step (without the first ones) over the baseline's."""
    held = validate(lesson.student, batches(held_out, teacher.sequence, tokens_per_batch=4_000, seed=0, epoch=0))
    ratios = [own / base for own, base in zip(lesson.seconds, baseline.seconds, strict=True)]
    median, low, high = quartiles(ratios[1:])
    return {
        "student CE": round(held.ce, 4),
        "student KL": round(held.kl, 4),
        "step x": f"{median:.2f} [{low:.2f}, {high:.2f}]",
    }


class Listener:
    """Has the same sentences spoken by every model and counts the words that the recognizer gets wrong."""

    def __init__(self, teacher: Teacher, rows: list[Utterance]) -> None:
        self.teacher, self.rows = teacher, rows
        self.codec, self.recognizer = load_codec(), load_recognizer()

    def word_errors(self, model: SpeechLM) -> WerResult:
        hypotheses = spoken(self.teacher, model.eval(), self.rows, self.codec, self.recognizer)
        return word_error_rate([row.text for row in self.rows], hypotheses)


def wer_columns(result: WerResult, online: WerResult) -> dict[str, Any]:
    """WER in percent with its interval, and the difference to the online teacher's student in points."""
    low, high = bootstrap_interval(result.errors, result.words)
    gap = paired_difference(result, online).difference
    return {
        "WER %": f"{100 * result.wer:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        "WER minus online": f"{100 * gap.value:+.1f} [{100 * gap.low:.1f}, {100 * gap.high:.1f}]",
    }


def largest_difference(one: Lesson, other: Lesson) -> float:
    """Of any term of Eq. 5 at any step, relative."""
    return max(
        abs(a[term] - b[term]) / abs(b[term])
        for a, b in zip(one.losses, other.losses, strict=True)
        for term in ("ce", "kl", "hidden")
    )


def dense_targets(logits_NV: Tensor) -> TopKTargets:
    """All classes with their log-probabilities from float16 logits; nothing is left for the tail."""
    log_probs_NV = logits_NV.half().float().log_softmax(-1)
    ids_NV = torch.arange(logits_NV.shape[1]).expand_as(logits_NV)
    return TopKTargets(ids_NV, log_probs_NV, torch.full((len(logits_NV),), -torch.inf))


def _retargeted(batch: DistillBatch, teacher: Teacher, targets: str) -> DistillBatch:
    """The same batch with rows computed now, or with all logits in float16 (as a top-k row of all classes)."""
    with torch.no_grad():
        if targets == "online":
            hidden_ND = teacher.model.hidden_states(batch.input_ids_BL)[batch.labels_BL != IGNORE]
            return dataclasses.replace(batch, teacher_targets=HiddenTargets(hidden_ND))
        assert isinstance(batch.teacher_targets, HiddenTargets)
        hidden_ND = batch.teacher_targets.hidden_ND.float()
        return dataclasses.replace(batch, teacher_targets=dense_targets(teacher.model.head(hidden_ND)))
