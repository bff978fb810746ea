"""Choosing the next token: temperature, top-k, top-p, and CosyVoice's repetition-aware sampling.

Every row draws from uniform numbers of its own, made by its own seeded ``torch.Generator``, so what a row
becomes depends neither on its place in a batch nor on the batch's other rows.

Tensor letters: B batch, V vocabulary, W window of recent tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mamtra_ray.config import EvaluateConfig
from mamtra_ray.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Without ``repetition_window`` the order is Hugging Face's: temperature, then top-k, then top-p among what
    top-k left. With it, CosyVoice's repetition-aware sampling (``ras_sampling`` in its
    ``cosyvoice/utils/common.py``): at most ``top_k`` tokens, until they hold ``top_p`` of the *whole*
    distribution; if the drawn token occurs at least ``repetition_window * repetition_threshold`` times among the
    last ``repetition_window`` tokens, it is barred and one draw from the whole distribution replaces it.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token (and ignores the rest).
        top_k: number of most probable tokens to keep; 0 for all.
        top_p: probability mass of most probable tokens to keep; 1 for all.
        repetition_window: recent tokens to compare with; 0 switches repetition-aware sampling off.
        repetition_threshold: share of the window (tau_r).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_window: int = 0
    repetition_threshold: float = 0.1

    def __post_init__(self) -> None:
        limits = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "repetition_window": self.repetition_window >= 0,
            "repetition_threshold": self.repetition_threshold >= 0,
        }
        for name, valid in limits.items():
            if not valid:
                raise InputError(f"sampling: {name} cannot be {getattr(self, name)}")


GREEDY = Sampling(temperature=0.0)
COSYVOICE2 = Sampling(top_p=0.8, top_k=25, repetition_window=10, repetition_threshold=0.1)


def sampling_of(settings: EvaluateConfig, own: Mapping[str, Any] = MappingProxyType({})) -> Sampling:
    """What section ``evaluate`` asks for.

    Args:
        settings: what is None there is the teacher's own.
        own: :attr:`~mamtra_ray.teachers.teacher.Teacher.sampling`; a teacher that says nothing is greedy, and with a
            temperature draws from CosyVoice 2's nucleus.
    """
    usual = {"temperature": 0.0, "top_k": COSYVOICE2.top_k, "top_p": COSYVOICE2.top_p}
    asked = {name: getattr(settings, name) for name in usual if getattr(settings, name) is not None}
    if settings.repetition_aware is not None:
        asked["repetition_window"] = COSYVOICE2.repetition_window if settings.repetition_aware else 0
    return Sampling(**{**usual, **own, **asked})


def uniform_numbers(seed: int, count: int) -> Tensor:
    """(count, 2) numbers in [0, 1), float64: at each step one for the draw and one for a second draw."""
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def next_tokens(logits_BV: Tensor, sampling: Sampling, uniform_B2: Tensor, recent_BW: Tensor) -> Tensor:
    """Draw one token per row.

    Args:
        logits_BV: any float dtype; barred tokens at ``-inf``.
        sampling: see :class:`Sampling`.
        uniform_B2: from :func:`uniform_numbers`, on the logits' device.
        recent_BW: each row's last ``repetition_window`` tokens, -1 where there are fewer (W may be 0).

    Returns:
        (B,) int64 token ids.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    scores_BV = logits_BV.float() / sampling.temperature
    if not sampling.repetition_window:
        scores_BV = _keep_top_p(_keep_top_k(scores_BV, sampling.top_k), sampling.top_p)
        return _draw(scores_BV.softmax(-1), uniform_B2[:, 0])
    tokens_B = _nucleus_draw(scores_BV, sampling, uniform_B2[:, 0])
    repeats_B = (recent_BW == tokens_B[:, None]).sum(-1)
    repeated_B = repeats_B >= sampling.repetition_window * sampling.repetition_threshold
    barred_BV = scores_BV.scatter(1, tokens_B[:, None], -math.inf)
    # A row whose only possible token was drawn has nothing else to draw.
    repeated_B &= barred_BV.max(-1).values > -math.inf
    replacement_B = _draw(barred_BV.where(repeated_B[:, None], scores_BV).softmax(-1), uniform_B2[:, 1])
    return replacement_B.where(repeated_B, tokens_B)


def _keep_top_k(scores_BV: Tensor, top_k: int) -> Tensor:
    if not 0 < top_k < scores_BV.shape[-1]:
        return scores_BV
    smallest_B1 = scores_BV.topk(top_k, -1).values[:, -1:]
    return scores_BV.masked_fill(scores_BV < smallest_B1, -math.inf)


def _keep_top_p(scores_BV: Tensor, top_p: float) -> Tensor:
    if top_p >= 1:
        return scores_BV
    sorted_scores_BV, ids_BV = scores_BV.sort(dim=-1, descending=True, stable=True)
    probabilities_BV = sorted_scores_BV.softmax(-1)
    beyond_BV = probabilities_BV.cumsum(-1) - probabilities_BV >= top_p
    return scores_BV.masked_fill(beyond_BV.scatter(1, ids_BV, beyond_BV), -math.inf)


def _nucleus_draw(scores_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    candidates = min(sampling.top_k or scores_BV.shape[-1], scores_BV.shape[-1])
    top_BK, ids_BK = scores_BV.softmax(-1).topk(candidates, -1)
    before_BK = top_BK.cumsum(-1) - top_BK
    return ids_BK.gather(1, _draw(top_BK.where(before_BK < sampling.top_p, 0), uniform_B)[:, None])[:, 0]


def _draw(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Invert the cumulative sum: the first token whose cumulative weight exceeds the uniform share of the total.

    In float64, where a uniform number below 1 never reaches the total and weight 0 is never drawn.
    """
    cumulative_BV = weights_BV.double().cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
