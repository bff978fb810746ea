"""The unified vocabulary, and how text and speech make one sequence of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamtra_ray.errors import InputError
from mamtra_ray.losses import IGNORE


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of the three parts of the unified vocabulary, and the speech ids that end an utterance.

    A model of text alone predicts all its ids: they are all "speech" ids, and ``text_size`` is 0.

    Attributes:
        eos_id: speech id that training predicts after the last token.
        stop_ids: speech ids that end generation; contains ``eos_id``.
    """

    text_size: int
    speech_size: int
    control_size: int
    eos_id: int
    stop_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        if self.eos_id not in self.stop_ids:
            raise InputError(f"the stop ids {self.stop_ids} must contain the end-of-speech id {self.eos_id}")
        if not all(0 <= stop_id < self.speech_size for stop_id in self.stop_ids):
            raise InputError(f"the stop ids {self.stop_ids} must be speech ids below {self.speech_size}")

    @property
    def speech_offset(self) -> int:
        """Unified id of speech id 0."""
        return self.text_size

    @property
    def control_offset(self) -> int:
        """Unified id of the first control id."""
        return self.text_size + self.speech_size

    @property
    def size(self) -> int:
        return self.text_size + self.speech_size + self.control_size


@dataclass(frozen=True)
class SequenceFormat:
    """How text and speech make one sequence: prefix, text, separator, speech (``prefix`` etc. in unified ids).

    CosyVoice 2: prefix (sos,), separator (task,). Llasa: its chat template around the text. A model of text alone:
    prefix (start of text,), no text and no separator.
    """

    prefix: tuple[int, ...]
    separator: tuple[int, ...]
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", tuple(self.prefix))
        object.__setattr__(self, "separator", tuple(self.separator))

    @property
    def overhead(self) -> int:
        """Tokens of a sequence beside its text and speech."""
        return len(self.prefix) + len(self.separator)

    def training_example(
        self, text_tokens: Sequence[int], speech_tokens: Sequence[int], next_token: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Input ids and labels of one utterance, aligned: the label at a position is what it predicts.

        Args:
            text_tokens: text ids.
            speech_tokens: S speech ids, without the end.
            next_token: the speech id that follows, where they are a part of something longer; none: the end.

        Returns:
            ``(input_ids, labels)``, int64, equally long. The last S + 1 labels are speech ids (the separator's
            last position predicts the first speech token, the last speech token predicts the end), all others
            :data:`IGNORE`.
        """
        input_ids = self.prompt(text_tokens, prompt_speech_tokens=speech_tokens)
        labels = torch.full_like(input_ids, IGNORE)
        end = self.vocabulary.eos_id if next_token is None else next_token
        labels[len(labels) - len(speech_tokens) - 1 :] = torch.tensor([*speech_tokens, end])
        return input_ids, labels

    def prompt(
        self,
        text_tokens: Sequence[int],
        prompt_text_tokens: Sequence[int] = (),
        prompt_speech_tokens: Sequence[int] = (),
    ) -> Tensor:
        """Input ids (int64) after which generation starts; the prompt is the voice to continue, if any."""
        text = [*prompt_text_tokens, *text_tokens]
        self._check(text, self.vocabulary.text_size, "text token")
        speech_token = "speech token" if self.vocabulary.text_size else "token"
        self._check(prompt_speech_tokens, self.vocabulary.speech_size, speech_token)
        speech = [self.vocabulary.speech_offset + token for token in prompt_speech_tokens]
        return torch.tensor([*self.prefix, *text, *self.separator, *speech], dtype=torch.int64)

    @staticmethod
    def _check(tokens: Sequence[int], size: int, what: str) -> None:
        if len(tokens) and (min(tokens) < 0 or max(tokens) >= size):
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            raise InputError(f"{what} {wrong} is outside the vocabulary of {size}: was another tokenizer used?")
