"""Do 95 % intervals of a mean opinion score hold the true mean? Ours, CrowdMOS as published, and two simpler ones.

    pip install mean-opinion-score             (the published formula; Python 3.11)
    python benchmarks/opinion_intervals.py     half a minute
    python benchmarks/opinion_intervals.py --quick

Ratings are 3.6 + listener + utterance + rest with standard deviations 0.35, 0.2 and 0.7; in the rows marked so they are
rounded to 1 ... 5 as listeners give them. ``low`` and ``high`` are the 95 % interval (Wilson) of the coverage itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import mean_opinion_score
import numpy as np
from measurement import print_table, write_result
from scipy import stats

from mamtra_ray.listening_test.opinion_scores import half_width

MEAN, SPREAD = 3.6, (0.35, 0.2, 0.7)
DESIGNS = [(15, 50, 0.0, False), (15, 50, 0.0, True), (6, 10, 0.0, False), (15, 50, 0.5, False)]
"""Listeners, utterances, part of the ratings that is missing, whether they are rounded; the first is the paper's."""


def simulated(
    randomness: np.random.Generator, listeners: int, utterances: int, missing: float, rounded: bool
) -> np.ndarray:
    """Listeners x utterances, NaN where nothing was rated."""
    of_listener, of_utterance, rest = SPREAD
    ratings_WS = MEAN + randomness.normal(0, of_listener, (listeners, 1))
    ratings_WS = ratings_WS + randomness.normal(0, of_utterance, (1, utterances))
    ratings_WS = ratings_WS + randomness.normal(0, rest, (listeners, utterances))
    if rounded:
        ratings_WS = np.clip(np.round(ratings_WS), 1, 5)
    ratings_WS[randomness.random(ratings_WS.shape) < missing] = np.nan
    return ratings_WS


def listener_level(ratings_WS: np.ndarray) -> float:
    """Student's interval over the listeners' means: utterances are taken for the only ones there are."""
    means = np.nanmean(ratings_WS, axis=1)
    return float(stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means)))


def true_mean(rounded: bool) -> float:
    """Of a rating; rounding and the ends of the scale move it a little."""
    if not rounded:
        return MEAN
    edges = (np.array([1.5, 2.5, 3.5, 4.5]) - MEAN) / math.sqrt(sum(s**2 for s in SPREAD))
    return float(5 - stats.norm.cdf(edges).sum())


INTERVALS: dict[str, Callable[[np.ndarray], float | None]] = {
    "ours (n - 1)": half_width,
    "CrowdMOS as published (n)": mean_opinion_score.get_ci95,
    "over listeners' means": listener_level,
    "1.96 s/sqrt(n)": mean_opinion_score.get_ci95_default,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions; nothing is written")
    options = parser.parse_args()
    repetitions = 50 if options.quick else 2000
    rows = []
    for listeners, utterances, missing, rounded in DESIGNS:
        randomness = np.random.default_rng(0)
        widths: dict[str, list[float]] = {name: [] for name in INTERVALS}
        covered = dict.fromkeys(INTERVALS, 0)
        for _ in range(repetitions):
            ratings_WS = simulated(randomness, listeners, utterances, missing, rounded)
            error = abs(np.nanmean(ratings_WS) - true_mean(rounded))
            for name, interval in INTERVALS.items():
                width = interval(ratings_WS)
                assert width is not None
                widths[name].append(width)
                covered[name] += error <= width
        for name in INTERVALS:
            low, high = stats.binomtest(covered[name], repetitions).proportion_ci(method="wilson")
            rows.append(
                {
                    "listeners": listeners,
                    "utterances": utterances,
                    "missing": missing,
                    "rounded": rounded,
                    "interval": name,
                    "half width": round(float(np.median(widths[name])), 3),
                    "coverage": round(covered[name] / repetitions, 3),
                    "low": round(float(low), 3),
                    "high": round(float(high), 3),
                }
            )
    print_table(rows)
    if not options.quick:
        write_result("opinion_intervals", rows, repetitions=repetitions)


if __name__ == "__main__":
    main()
