"""Scores of sound beyond the words: likeness of the speaker and predicted opinion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mamtra_ray.errors import InputError, nearest_name


class Metric(Protocol):
    """A score of spoken utterances."""

    def score(
        self,
        waveforms: Sequence[np.ndarray],
        sample_rate: int,
        texts: Sequence[str],
        prompts: Sequence[Path | None],
    ) -> list[dict[str, float]]:
        """Named values of every utterance; an utterance without what a score needs gets none of it."""
        ...


_METRICS: dict[str, object] = {}


def metric_from_name(name: str) -> Metric:
    """The score behind an entry of ``evaluate.metrics``, ``kind`` or ``kind:PATH``."""
    kind, _, path = name.partition(":")
    if kind not in _METRICS:
        raise InputError(f"evaluate.metrics: unknown score {kind!r}: {nearest_name(kind, _METRICS)}")
    return _METRICS[kind](path or None)  # type: ignore[operator]
