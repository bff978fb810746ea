"""An auxiliary loss that teaches the demo teacher to keep its place in the text.

At most positions the next speech token follows from the sound so far; only where a word ends must the
model know which word comes next, so the ordinary loss teaches the order of the words slowly. The voice
knows when each word ends. From a middle layer, at every speech position, two linear heads tell which
word of the text is being said (its index) and which word follows (its id). The heads are thrown away
after training.

Tensor letters: B utterances, L positions, D model width, N tracked positions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamtra_ray.losses import IGNORE
from mamtra_ray.speech.tokenizer import FRAMES_PER_TOKEN, HOP_SIZE, SAMPLE_RATE
from mamtra_ray.teachers.demo_grammar import WORDS

NO_WORD = len(WORDS)
"""What follows the last word."""


@dataclass(frozen=True)
class TrackingSettings:
    """Where the heads read, and how much their loss counts."""

    layer: int = 8
    """Number of layers below the heads."""
    weight: float = 0.5
    max_words: int = 48
    """More words than any sentence has."""


def tracked_words(
    text_tokens: Sequence[int], word_ends: Sequence[float], num_speech: int, phase: int, length: int
) -> Tensor:
    """Index of the word being said and id of the word after it, int64 (length, 2).

    Args:
        text_tokens: ids of the words.
        word_ends: seconds at which each word ends.
        num_speech: speech tokens S; the last S + 1 positions are tracked, the first of them before any sound.
        phase: 10 ms steps by which the token grid starts later.
        length: positions of the sequence; those that are not tracked are `IGNORE`.
    """
    following = [*text_tokens[1:], NO_WORD, NO_WORD]
    words = [(IGNORE, IGNORE)] * (length - num_speech - 1)
    for position in range(num_speech + 1):
        # The center of the last frame the model has heard at this position.
        heard = (FRAMES_PER_TOKEN * position + phase - 1) * HOP_SIZE / SAMPLE_RATE
        index = bisect_right(word_ends, heard) if position else 0
        words.append((index, following[index]))
    return torch.tensor(words)


class Tracker(nn.Module):
    """The two heads. Their weights start from `seed`, whatever was drawn before."""

    def __init__(self, hidden_size: int, settings: TrackingSettings, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.index = nn.Linear(hidden_size, settings.max_words)
            self.following = nn.Linear(hidden_size, len(WORDS) + 1)

    def forward(self, hidden_BLD: Tensor, words_BL2: Tensor) -> Tensor:
        """Mean of the two cross-entropies in nats, over the tracked positions."""
        is_tracked_BL = words_BL2[..., 0] != IGNORE
        # The residual stream has no fixed scale.
        hidden_ND = functional.rms_norm(hidden_BLD[is_tracked_BL], hidden_BLD.shape[-1:])
        index_N, following_N = words_BL2[is_tracked_BL].unbind(1)
        index_loss = functional.cross_entropy(self.index(hidden_ND), index_N)
        return (index_loss + functional.cross_entropy(self.following(hidden_ND), following_N)) / 2
