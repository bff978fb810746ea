"""One CPU (or GPU) of an evaluation: speaks a few sentences with a system, listens, and reports what it heard."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mamtra_ray.artifacts import content_hash
from mamtra_ray.config import EvaluateConfig, TeacherConfig
from mamtra_ray.corpus.table import Utterance
from mamtra_ray.errors import InputError
from mamtra_ray.run.names import CODEC
from mamtra_ray.speech.language import ENGLISH
from mamtra_ray.teachers.shared import SharedTeacher

Row = dict[str, Any]


@dataclass(frozen=True)
class EvaluationSettings:
    """What every worker of an evaluation must know."""

    evaluate: EvaluateConfig
    source: TeacherConfig
    """Where the teacher came from, and with it the codec."""
    teacher: SharedTeacher
    seed: int


@dataclass(frozen=True)
class Chunk:
    """Utterances that one system speaks in one batch."""

    system: str
    model: Path | None
    """Folder of a saved SpeechLM; None for the teacher and the codec."""
    utterances: tuple[Utterance, ...]
    keep_audio: frozenset[str]
    """Ids of those whose sound is sent back."""


@dataclass(frozen=True)
class Spoken:
    """Speech tokens of one utterance, whether the system ended it by itself, and what kept it from being spoken."""

    tokens: Sequence[int]
    stopped: bool
    failure: str = ""
    fewest_tokens: int = 0
    """Below which the system was not allowed to end it."""


class EvaluationWorker:
    """Holds recognizer, codec and teacher; loads a system when a chunk of another one arrives."""

    def __init__(self, settings: EvaluationSettings, num_threads: int = 1) -> None:
        self.settings = settings
        self.num_threads = num_threads
        self.prepared = False

    def prepare(self) -> None:
        """Load recognizer, codec and metrics (not in ``__init__``, whose errors Ray reports without their type).

        Raises:
            InputError: one of their files or packages is missing.
        """
        if self.prepared:
            return
        os.environ.setdefault("OMP_NUM_THREADS", str(self.num_threads))
        import torch

        from mamtra_ray.speech.quality import metric_from_name
        from mamtra_ray.speech.vocoders import vocoder_of_teacher
        from mamtra_ray.speech.whisper import recognizer_from_name

        torch.set_num_threads(self.num_threads)
        settings, source = self.settings.evaluate, self.settings.source
        from mamtra_ray.runtime.device import device_of_this_process

        self.device = device_of_this_process().type
        self.recognizer = recognizer_from_name(settings.recognizer, self.num_threads, settings.language or ENGLISH)
        self.metrics = [metric_from_name(name) for name in settings.metrics]
        self.vocoder = vocoder_of_teacher(
            source.kind,
            Path(source.path) if source.path else None,
            Path(settings.codec) if settings.codec else None,
        )
        self.teacher: Any = None
        self.speaker: tuple[Path | None, Any, str] | None = None
        self.prepared = True

    def run(self, chunk: Chunk) -> tuple[list[Row], dict[str, np.ndarray], int]:
        """Speak and recognize a chunk.

        Returns:
            One row per utterance (``utterance_id, text, hypothesis, speech_tokens, stopped, fewest_tokens,
            audio_seconds, failure`` and the metrics' values; where one is missing, ``unscored`` has its reason);
            waveforms of the kept ones, by id; and their sample rate.

        Raises:
            InputError: none of several utterances can be decoded or scored: the set-up is wrong.
            GenerationCheckError: the chunk's system does not generate what it computes.
        """
        self.prepare()
        spoken = self._speech_tokens(chunk)
        rows: list[Row] = []
        waveforms: list[np.ndarray] = []
        refused: list[str] = []
        for utterance, said in zip(chunk.utterances, spoken, strict=True):
            waveform, failure = np.zeros(0, np.float32), None
            try:
                waveform, failure = self._decode(said.tokens, utterance)
            except InputError as error:
                failure = f"decoding to sound failed: {error}"
                refused.append(failure)
            if not said.stopped:
                failure = said.failure or failure or "the model did not stop within the length limit"
            rows.append(
                {
                    "utterance_id": utterance.utterance_id,
                    "text": utterance.text,
                    "hypothesis": "",
                    "speech_tokens": [int(token) for token in said.tokens],
                    "stopped": said.stopped,
                    "fewest_tokens": said.fewest_tokens,
                    "audio_seconds": round(len(waveform) / self.vocoder.sample_rate, 3),
                    "failure": failure,
                }
            )
            waveforms.append(waveform)
        if len(refused) == len(rows) > 1:
            raise InputError(f"no utterance of system {chunk.system!r} can be heard: {refused[0]}")
        heard = [index for index, waveform in enumerate(waveforms) if len(waveform)]
        self._recognize(rows, waveforms, heard)
        self._score(rows, waveforms, heard, chunk.utterances)
        kept = {
            rows[index]["utterance_id"]: waveforms[index]
            for index in heard
            if rows[index]["utterance_id"] in chunk.keep_audio
        }
        return rows, kept, self.vocoder.sample_rate

    def _speech_tokens(self, chunk: Chunk) -> list[Spoken]:
        if chunk.system == CODEC:
            return [Spoken(utterance.speech_tokens.tolist(), True) for utterance in chunk.utterances]
        from mamtra_ray.speech_lm.generate import generate
        from mamtra_ray.speech_lm.sampling import sampling_of

        if self.teacher is None:
            self.teacher = self.settings.teacher.load()
            self.teacher.model.to(self.device)
        model, reason = self._speaker(chunk)
        if reason:
            return [Spoken((), False, reason) for _ in chunk.utterances]
        spoken: dict[str, Spoken] = {}
        prompts, bounds, seeds, ids = [], [], [], []
        for utterance in chunk.utterances:
            prompt = [utterance.prompt_text_tokens, utterance.prompt_speech_tokens]
            prompt_text, prompt_speech = [() if tokens is None else tokens.tolist() for tokens in prompt]
            text = utterance.text_tokens.tolist()
            # Tokens the teacher does not know mean another tokenizer, so another corpus: nothing to go on with.
            prompt_ids = self.teacher.sequence.prompt(text, prompt_text, prompt_speech)
            try:
                bound = self.teacher.length_bounds(text, len(prompt_ids))
            except InputError as error:  # a text too long for the teacher
                spoken[utterance.utterance_id] = Spoken((), False, str(error))
                continue
            bounds.append(bound)
            prompts.append(prompt_ids)
            # A sentence has its own seed, so its speech does not depend on how sentences are divided into chunks.
            seeds.append(int(content_hash([self.settings.seed, utterance.utterance_id])[:8], 16))
            ids.append(utterance.utterance_id)
        sampling = sampling_of(self.settings.evaluate, self.teacher.sampling)
        try:
            results = generate(model, prompts, bounds, sampling, seeds)
        except InputError as error:
            # Logits that are not finite: this system's other chunks and the other systems are still evaluated.
            return [spoken.get(one.utterance_id, Spoken((), False, str(error))) for one in chunk.utterances]
        for utterance_id, result, (fewest, _) in zip(ids, results, bounds, strict=True):
            spoken[utterance_id] = Spoken(result.tokens, result.stopped, fewest_tokens=fewest)
        return [spoken[utterance.utterance_id] for utterance in chunk.utterances]

    def _speaker(self, chunk: Chunk) -> tuple[Any, str]:
        """The chunk's model, checked when it is loaded, and why it cannot speak (empty if it can)."""
        from mamtra_ray.speech_lm.generation_check import NonFiniteLogitsError, check_generation
        from mamtra_ray.speech_lm.speech_lm import SpeechLM

        if self.speaker is None or self.speaker[0] != chunk.model:
            # Not two students at once in memory.
            self.speaker = None
            model = SpeechLM.load(chunk.model, device=self.device).eval() if chunk.model else self.teacher.model
            reason = ""
            try:
                check_generation(model, self.teacher.sequence, f"system {chunk.system!r}")
            except NonFiniteLogitsError as error:
                reason = str(error)
            self.speaker = (chunk.model, model, reason)
        return self.speaker[1:]

    def _decode(self, tokens: Sequence[int], utterance: Utterance) -> tuple[np.ndarray, str | None]:
        """A 1-D waveform, empty if there is none, and why."""
        from mamtra_ray.speech.voice import Voice

        silence = np.zeros(0, np.float32)
        if not len(tokens):
            return silence, "no speech token was generated"
        voice = None
        if utterance.prompt_audio or utterance.prompt_speech_tokens is not None:
            prompt = utterance.prompt_speech_tokens
            voice = Voice(
                np.zeros(0, np.int32) if prompt is None else prompt,
                Path(utterance.prompt_audio) if utterance.prompt_audio else None,
            )
        try:
            return self.vocoder.decode(tokens, voice), None
        except (RuntimeError, ValueError, OSError) as error:
            # One bad utterance must not end an evaluation of hours; it counts as not spoken, and is listed.
            return silence, f"decoding to sound failed: {error}"

    def _recognize(self, rows: list[Row], waveforms: list[np.ndarray], heard: list[int]) -> None:
        from mamtra_ray.speech.recognizer import SAMPLE_RATE
        from mamtra_ray.speech.resampling import resampled

        inputs = [resampled(waveforms[index], self.vocoder.sample_rate, SAMPLE_RATE) for index in heard]
        try:
            texts = self.recognizer.transcribe(inputs)
        except (RuntimeError, ValueError, IndexError):
            texts = [self._recognize_one(rows[index], sound) for index, sound in zip(heard, inputs, strict=True)]
        for index, text in zip(heard, texts, strict=True):
            rows[index]["hypothesis"] = text

    def _recognize_one(self, row: Row, waveform: np.ndarray) -> str:
        try:
            return self.recognizer.transcribe([waveform])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            row["failure"] = f"recognition failed: {error}"
            return ""

    def _score(
        self, rows: list[Row], waveforms: list[np.ndarray], heard: list[int], utterances: Sequence[Utterance]
    ) -> None:
        for name, metric in zip(self.settings.evaluate.metrics, self.metrics, strict=True):

            def score(indices: list[int], metric: Any = metric) -> list[dict[str, float]]:
                prompts = [utterances[index].prompt_audio for index in indices]
                return metric.score(
                    [waveforms[index] for index in indices],
                    self.vocoder.sample_rate,
                    [rows[index]["text"] for index in indices],
                    [Path(prompt) if prompt else None for prompt in prompts],
                )

            for index, result in zip(heard, _scores_or_reasons(score, heard, name), strict=True):
                if isinstance(result, str):
                    rows[index].setdefault("unscored", {})[name] = result
                else:
                    rows[index] |= result


def _scores_or_reasons(
    score: Callable[[list[int]], list[dict[str, float]]], indices: list[int], name: str
) -> list[dict[str, float] | str]:
    """What ``score`` gives for each utterance, or why it gave nothing; a failing batch is tried one by one.

    Raises:
        InputError: none of several utterances can be scored, and that is an error of the set-up.
    """
    try:
        return [_finite(result) for result in score(indices)]
    except Exception as error:  # what is wrong with one utterance must not end an evaluation of hours
        reason = " ".join(str(error).split()) or type(error).__name__
        if len(indices) == 1:
            return [reason]
        each = [_scores_or_reasons(score, [index], name)[0] for index in indices]
        if isinstance(error, InputError | ImportError) and all(isinstance(one, str) for one in each):
            raise InputError(f"evaluate.metrics={name}: {reason}") from None
        return each


def _finite(scores: dict[str, float]) -> dict[str, float] | str:
    wrong = [f"{name} is {value}" for name, value in scores.items() if not np.isfinite(value)]
    # A mean is taken of a row's floats (results.py): counts become some.
    return ", ".join(wrong) or {name: float(value) for name, value in scores.items()}
