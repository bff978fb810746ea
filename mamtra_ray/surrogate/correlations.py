"""Correlations with confidence intervals: does a cheap score rank layouts as the expensive one does?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    """Pearson's r; interval by Fisher's z with standard error 1/sqrt(n - 3)."""
    return _with_interval(x, y, lambda: stats.pearsonr(x, y).statistic, lambda r: 1.0)


def spearman(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Spearman's rank correlation; interval by Fisher's z with variance (1 + r^2/2)/(n - 3) (Bonett, Wright 2000)."""
    return _with_interval(x, y, lambda: stats.spearmanr(x, y).statistic, lambda r: 1 + r**2 / 2)


def _with_interval(
    x: Sequence[float],
    y: Sequence[float],
    coefficient: Callable[[], float],
    variance_factor: Callable[[float], float],
) -> Correlation:
    n = len(x)
    # Three points often correlate perfectly by chance, and a constant has no correlation.
    if n < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        return Correlation(n)
    r = float(coefficient())
    if abs(r) >= 1:
        return Correlation(n, r)
    half_width = 1.96 * math.sqrt(variance_factor(r) / (n - 3))
    z = math.atanh(r)
    return Correlation(n, r, math.tanh(z - half_width), math.tanh(z + half_width))
