"""A loaded teacher: its model, and what generation and evaluation must know about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mamtra_ray.errors import InputError
from mamtra_ray.speech_lm.sequences import SequenceFormat
from mamtra_ray.speech_lm.speech_lm import SpeechLM


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher and what generation and evaluation must know about it.

    Attributes:
        fingerprint: of the model, see :meth:`SpeechLM.fingerprint`.
        tokens_per_second: speech tokens per second of audio; None: its tokens are text.
        length_per_text_token: fewest and most speech tokens an utterance may have, per text token.
        max_length: longest sequence (text and speech) the model was trained for; None if not limited.
        sampling: the system's own sampling settings, by the names of :class:`mamtra_ray.speech_lm.generate.Sampling`.
        tokenizer: that a corpus must name; None where a corpus is not asked for it.
    """

    name: str
    model: SpeechLM
    sequence: SequenceFormat
    fingerprint: str
    tokens_per_second: float | None
    length_per_text_token: tuple[float, float]
    max_length: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None

    def length_bounds(self, text_tokens: Sequence[int], prompt_length: int | None = None) -> tuple[int, int]:
        """(fewest, most) speech tokens to generate for ``text_tokens``.

        Args:
            text_tokens: what is to be spoken.
            prompt_length: tokens of the whole prompt, where it holds a voice to continue too.

        Raises:
            InputError: nothing is left of the model's longest sequence.
        """
        fewest, most = self.length_per_text_token
        longest = int(most * len(text_tokens))
        if self.max_length is not None:
            longest = min(longest, self.max_length - len(self.sequence.prompt(text_tokens)))
        if longest < 1:
            raise InputError(f"a text of {len(text_tokens)} tokens leaves no room for speech")
        if self.max_length is not None and prompt_length is not None:
            longest = min(longest, self.max_length - prompt_length)
        if longest < 1:
            raise InputError(f"a prompt of {prompt_length} tokens leaves no room for speech")
        return min(int(fewest * len(text_tokens)), longest), longest
