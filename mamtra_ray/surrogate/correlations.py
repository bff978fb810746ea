"""Correlations with confidence intervals: does a cheap score rank layouts as the expensive one does?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Correlation:
    """A coefficient over ``n`` pairs with its 95 % interval; all ``None`` under four pairs or without variation."""

    n: int
    value: float | None = None
    low: float | None = None
    high: float | None = None


def pearson(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Pearson's r; interval by Fisher's z."""
    if not _is_defined(x, y):
        return Correlation(len(x))
    found = stats.pearsonr(x, y)
    r = float(found.statistic)
    if abs(r) >= 1:
        return Correlation(len(x), r)
    interval = found.confidence_interval()
    return Correlation(len(x), r, float(interval.low), float(interval.high))


def spearman(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Spearman's rank correlation; interval by Fisher's z with variance (1 + r^2/2)/(n - 3) (Bonett, Wright 2000)."""
    if not _is_defined(x, y):
        return Correlation(len(x))
    r = float(stats.spearmanr(x, y).statistic)
    if abs(r) >= 1:
        return Correlation(len(x), r)
    # scipy has no interval for it.
    half_width = stats.norm.ppf(0.975) * math.sqrt((1 + r**2 / 2) / (len(x) - 3))
    z = math.atanh(r)
    return Correlation(len(x), r, math.tanh(z - half_width), math.tanh(z + half_width))


def _is_defined(x: Sequence[float], y: Sequence[float]) -> bool:
    """Three points often correlate perfectly by chance, and a constant has no correlation."""
    return len(x) >= 4 and len(set(x)) > 1 and len(set(y)) > 1
