"""Text to sound with one model, in one process and without Ray: what the verb does, for programs.

    speaker = load_speaker(run="runs/demo")
    speech = speaker.say("open the letter behind the bridge on friday")

The past is a :class:`~mamtra_ray.models.cache.DecoderCache`: its attention layers grow with every token, its Mamba
layers do not.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from mamtra_ray.artifacts import content_hash
from mamtra_ray.config import Config
from mamtra_ray.errors import InputError
from mamtra_ray.runtime.device import device_of_this_process
from mamtra_ray.speak.models import Chosen, choose, read_student, settings_of
from mamtra_ray.speak.prompts import NO_PROMPT, Prompt
from mamtra_ray.speech.vocoders import vocoder_of_teacher
from mamtra_ray.speech.voice import StreamingVocoder, Vocoder
from mamtra_ray.speech_lm.generate import drawn, prefill
from mamtra_ray.speech_lm.generation_check import check_generation
from mamtra_ray.speech_lm.sampling import Sampling, sampling_of
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.teacher import Teacher
from mamtra_ray.teachers.text import TextTokenizer, text_tokenizer


@dataclass(frozen=True)
class Stack:
    """What all models of one teacher share."""

    teacher: Teacher
    tokenize: TextTokenizer
    vocoder: Vocoder
    sampling: Sampling
    seed: int
    device: str

    @classmethod
    def of(cls, config: Config) -> Self:
        """Load teacher, tokenizer and vocoder; on the GPU if there is one.

        Raises:
            InputError: a file or package is missing, or no codec is known for this teacher.
        """
        source, device = config.teacher, device_of_this_process().type
        path = Path(source.path) if source.path else None
        codec = Path(config.evaluate.codec) if config.evaluate.codec else None
        vocoder = vocoder_of_teacher(source.kind, path, codec)
        tokenize = text_tokenizer(source.kind, path)
        teacher = load_teacher(source.kind, path, device=device)
        sampling = sampling_of(config.evaluate, teacher.sampling)
        return cls(teacher, tokenize, vocoder, sampling, config.seed, device)

    @property
    def streams(self) -> bool:
        """Whether the vocoder makes sound before a sentence has ended."""
        return isinstance(self.vocoder, StreamingVocoder)


class Speaking:
    """One sentence while it is spoken: iterate over it, once, for its sound; float32 waveforms in [-1, 1].

    Attributes:
        sample_rate: samples per second of the sound.
        tokens: speech tokens so far.
        stopped: whether the model ended the sentence by itself.
        samples: that were handed out so far.
        token_seconds: of the model, prompt included.
        sound_seconds: of the vocoder.
        first_sound_seconds: until the first waveform; None before it.
        cache_bytes, positions: of the model's past at the end, and how many tokens it holds.
    """

    def __init__(self, speaker: Speaker, text: str, prompt: Prompt, in_blocks: bool) -> None:
        self.speaker, self.text, self.prompt, self.in_blocks = speaker, text, prompt, in_blocks
        self.sample_rate = speaker.stack.vocoder.sample_rate
        self.tokens: list[int] = []
        self.stopped = False
        self.samples = 0
        self.token_seconds = self.sound_seconds = 0.0
        self.first_sound_seconds: float | None = None
        self.cache_bytes = self.positions = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        sound = self._sound()
        while True:
            began, tokens_before = time.perf_counter(), self.token_seconds
            waveform = next(sound, None)
            self.sound_seconds += time.perf_counter() - began - (self.token_seconds - tokens_before)
            if waveform is None:
                return
            if self.first_sound_seconds is None:
                self.first_sound_seconds = self.token_seconds + self.sound_seconds
            self.samples += len(waveform)
            yield waveform

    @property
    def seconds(self) -> float:
        """Length of the sound."""
        return self.samples / self.sample_rate

    def _sound(self) -> Iterator[np.ndarray]:
        tokens, vocoder, voice = self._timed_tokens(), self.speaker.stack.vocoder, self.prompt.voice
        first = next(tokens, None)
        if first is None:
            return
        tokens = itertools.chain([first], tokens)
        if self.in_blocks and isinstance(vocoder, StreamingVocoder):
            yield from vocoder.decode_stream(tokens, voice)
        else:
            yield vocoder.decode(list(tokens), voice)

    def _timed_tokens(self) -> Iterator[int]:
        tokens = self._drawn_tokens()
        while True:
            began = time.perf_counter()
            token = next(tokens, None)
            self.token_seconds += time.perf_counter() - began
            if token is None:
                return
            self.tokens.append(token)
            yield token

    def _drawn_tokens(self) -> Iterator[int]:
        model, stack = self.speaker.model, self.speaker.stack
        text = stack.tokenize(self.text)
        if not text:
            raise InputError(f"there is nothing to say in {self.text!r}")
        ids_L = stack.teacher.sequence.prompt(text, self.prompt.text_tokens, self.prompt.speech_tokens)
        bounds = stack.teacher.length_bounds(text, len(ids_L))
        # Of the sentence: its speech does not depend on what is said before it.
        seed = int(content_hash([stack.seed, self.text])[:8], 16)
        start = prefill(model, [ids_L])
        for _, tokens_B in drawn(model, start, [bounds], stack.sampling, [seed]):
            self.cache_bytes, self.positions = start.cache.num_bytes, start.cache.length
            token = int(tokens_B)
            if token in model.vocabulary.stop_ids:
                self.stopped = True
                return
            yield token


@dataclass(frozen=True, eq=False)
class Speech:
    """A spoken sentence."""

    waveform: np.ndarray = field(repr=False)
    """float32 (samples,) in [-1, 1]; empty if the model said nothing."""
    sample_rate: int
    tokens: tuple[int, ...] = field(repr=False)
    stopped: bool
    """Whether the model ended it by itself."""
    cache_bytes: int
    """Of the model's past at the end."""
    tokens_per_second: float
    real_time_factor: float
    """Seconds of work, model and vocoder, for a second of sound."""


@dataclass(frozen=True)
class Speaker:
    """A model that speaks."""

    name: str
    model: SpeechLM
    stack: Stack

    @classmethod
    def of(cls, chosen: Chosen, stack: Stack) -> Self:
        """Load a model, and check that it generates what it computes.

        Raises:
            InputError: its files cannot be used, or it is a student of another teacher.
            GenerationCheckError, NonFiniteLogitsError: it cannot speak.
        """
        model = stack.teacher.model if chosen.folder is None else read_student(chosen.folder, stack.device)
        if model.vocabulary != stack.teacher.model.vocabulary:
            raise InputError(
                f"{chosen.folder} has another vocabulary than the teacher {stack.teacher.name}, so it is a student of "
                "another one: give the settings of its run with --run or --space"
            )
        check_generation(model, stack.teacher.sequence, f"{chosen.name}")
        return cls(chosen.name, model, stack)

    def say(self, text: str, prompt: Prompt = NO_PROMPT) -> Speech:
        """Speak one sentence; its sound is what an evaluation would hear.

        Raises:
            InputError: the text is empty, too long, or holds a word that the teacher does not know.
        """
        speaking = Speaking(self, text, prompt, in_blocks=False)
        waveform = np.concatenate([np.zeros(0, np.float32), *speaking])
        seconds = speaking.token_seconds + speaking.sound_seconds
        return Speech(
            waveform,
            speaking.sample_rate,
            tuple(speaking.tokens),
            speaking.stopped,
            speaking.cache_bytes,
            len(speaking.tokens) / speaking.token_seconds,
            seconds / speaking.seconds if speaking.samples else float("inf"),
        )

    def stream(self, text: str, prompt: Prompt = NO_PROMPT) -> Speaking:
        """Speak one sentence: waveforms as they come, where the vocoder can do that, else one."""
        return Speaking(self, text, prompt, in_blocks=True)


def load_speaker(
    run: Path | str | None = None,
    *,
    layout: str | None = None,
    student: Path | str | None = None,
    teacher: bool = False,
    space: Path | str | None = None,
    overrides: Sequence[str] = (),
) -> Speaker:
    """The model that ``python -m mamtra_ray.speak`` would speak with.

    Args:
        run: a run folder; its best layout speaks, unless one of the next three says otherwise.
        layout: of a finalist.
        student: folder of a saved student or exported checkpoint; its run's settings are found where it lies in one.
        teacher: let the teacher speak.
        space: settings without a run.
        overrides: ``key=value`` on top of the settings.

    Raises:
        InputError: one of these cannot be used.
    """
    students = [Path(student)] if student else []
    settings = settings_of(str(space) if space else None, Path(run) if run else None, overrides, students)
    chosen = choose(settings.run, layouts=[layout] if layout else [], students=students, teacher=teacher)
    if len(chosen) > 1:
        raise InputError("a speaker is one model: give one of layout, student and teacher")
    return Speaker.of(chosen[0], Stack.of(settings.config))
