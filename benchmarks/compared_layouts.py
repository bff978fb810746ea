"""What ``proxy_quality.py`` makes of layouts that were distilled and heard: correlations, bands, paired differences."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from mamtra_ray.evaluate.results import Evaluation, compare
from mamtra_ray.layouts import Layout

SCORES = ("probe KL", "probe CE", "short KL", "short CE", "final KL", "final CE", "WER")
BANDS = (9, 19, 29, 44, 62)
"""Most words of a sentence of each band of length."""


@dataclass(frozen=True)
class Compared:
    """What is distilled and heard at one budget."""

    ratio: str
    rows: dict[Layout, dict[str, Any]]
    """A row of the result for each layout, with its probe scores."""


def bootstrap_spearman(x: Sequence[float], y: Sequence[float], samples: int = 2_000) -> tuple[float, float, float]:
    """(correlation, lower, upper) with a 95 % percentile interval over resampled layouts."""
    rng, x_N, y_N = np.random.default_rng(0), np.array(x), np.array(y)
    values = []
    for _ in range(samples):
        rows = rng.integers(len(x_N), size=len(x_N))
        if np.ptp(x_N[rows]) > 0 and np.ptp(y_N[rows]) > 0:
            values.append(spearmanr(x_N[rows], y_N[rows]).statistic)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(spearmanr(x_N, y_N).statistic), float(low), float(high)


def agreement_of_halves(evaluations: Sequence[Evaluation], samples: int = 1_000) -> float:
    """Median Spearman correlation of the systems' WERs on one half of the sentences with those on the other half."""
    columns = ("word_errors", "words")
    errors_SN, words_SN = (np.array([[row[name] for row in e.rows] for e in evaluations]) for name in columns)
    rng, values = np.random.default_rng(0), []
    for _ in range(samples):
        halves = np.array_split(rng.permutation(errors_SN.shape[1]), 2)
        first, second = (errors_SN[:, half].sum(1) / words_SN[:, half].sum(1) for half in halves)
        values.append(spearmanr(first, second).statistic)
    return float(np.median(values))


def wer_by_band(evaluation: Evaluation) -> dict[str, float]:
    """Word errors over words in each band of length."""
    rates, shortest = {}, 1
    for longest in BANDS:
        of_band = [row for row in evaluation.rows if shortest <= row["words"] <= longest]
        if of_band:
            errors, words = (sum(row[name] for row in of_band) for name in ("word_errors", "words"))
            rates[f"WER {shortest}-{longest}"] = round(errors / words, 4)
        shortest = longest + 1
    return rates


def paired_rows(compared: Sequence[Compared], evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Found layout minus every other one of its budget that has a name, and minus the teacher."""
    rows = []
    for one in compared:
        found = [layout for layout, row in one.rows.items() if row["from"] == "found"]
        others = {str(layout): row["from"] for layout, row in one.rows.items() if row["from"] not in ("", "found")}
        for layout in found:
            if str(layout) not in evaluations:
                continue
            for other, name in {**others, "teacher": "teacher"}.items():
                if other in evaluations:
                    result = compare(evaluations[str(layout)], evaluations[other])
                    difference = result.difference
                    rows.append(
                        {"budget": one.ratio, "found": str(layout), "minus": name, "other": other}
                        | {"WER difference": difference.value, "95 % low": difference.low}
                        | {"95 % high": difference.high, "not worse": result.probability_a_not_worse}
                    )
    return rows


def limits_of_prediction(compared: Sequence[Compared], evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """How far the noise of the WER lets anything predict it, for each budget."""
    limits = []
    for one in compared:
        half = agreement_of_halves([evaluations[str(layout)] for layout in one.rows])
        # Spearman-Brown: agreement of two measurements with all sentences; its root bounds any predictor.
        possible = max(0.0, 2 * half / (1 + half)) ** 0.5
        limits.append({"budget": one.ratio, "WER of two halves": half, "best possible": possible})
    return limits


def correlations(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Spearman of every pair of scores inside each budget."""
    found = []
    for one in compared:
        rows = list(one.rows.values())
        for first, second in itertools.combinations(SCORES, 2):
            value, low, high = bootstrap_spearman([row[first] for row in rows], [row[second] for row in rows])
            found.append(
                {"budget": one.ratio, "of": first, "with": second, "layouts": len(rows), "Spearman": value}
                | {"95 % low": low, "95 % high": high}
            )
    return found
