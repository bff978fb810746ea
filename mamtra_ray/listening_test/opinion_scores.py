"""Mean opinion scores of a listening test, with an interval that respects listeners and utterances.

Ratings of one listener resemble each other, and so do ratings of one utterance. The usual 1.96 s / sqrt(n) takes all
ratings for independent and comes out several times too narrow (0.06 where the interval below is 0.20, at 15
listeners and 50 utterances). We use the two-way variance of CrowdMOS (Ribeiro, Florencio, Zhang, Seltzer, ICASSP
2011)::

    rating = mean + utterance + listener + rest        with variances  v_s, v_w, v_u

    v_s + v_u        mean over listeners of the variance among their ratings
    v_w + v_u        mean over utterances of the variance among their ratings
    v_s + v_w + v_u  variance of all ratings               (solved for the three; negative ones become 0)

    variance of the mean = v_s sum(M_s^2)/T^2 + v_w sum(N_w^2)/T^2 + v_u/T
    interval             = t(0.975, min(listeners, utterances) - 1) * sqrt(variance of the mean)

with M_s ratings of an utterance, N_w of a listener, T in all. One departure: variances divide by n - 1. Divided by n,
as in the published code, the intervals cover 96 to 99 % instead of 95 in simulations with known effects.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mamtra_ray.artifacts import read_json, read_manifest, write_manifest
from mamtra_ray.errors import InputError

KEY = "key.json"
SCORES = "mean_opinion_scores.json"
SCHEMA_VERSION = 1
SCALE = ((5, "Excellent"), (4, "Good"), (3, "Fair"), (2, "Poor"), (1, "Bad"))
"""Absolute category rating, ITU-T P.800."""


@dataclass(frozen=True)
class OpinionScore:
    """A mean with its 95 % interval ``mean`` +- ``half_width`` (``None`` with one listener or one utterance)."""

    system: str
    mean: float
    half_width: float | None
    listeners: int
    utterances: int
    ratings: int
    difference: float | None = None
    """Mean of the paired differences to the first system: same listener, same utterance."""
    difference_half_width: float | None = None


@dataclass(frozen=True)
class Rating:
    """One listener's score of one system's rendition of one utterance."""

    listener: str
    system: str
    utterance_id: str
    score: float


def half_width(ratings_WS: np.ndarray) -> float | None:
    """Half of the 95 % interval of the mean of ``ratings_WS``: listeners x utterances, NaN where nothing was rated."""
    rated = ~np.isnan(ratings_WS)
    ratings_WS = ratings_WS[rated.any(1)][:, rated.any(0)]
    rated = ~np.isnan(ratings_WS)
    if min(ratings_WS.shape) < 2:
        return None
    total = rated.sum()
    within_listeners, within_utterances = _mean_variance(ratings_WS), _mean_variance(ratings_WS.T)
    # Where every listener rated one utterance only (or the reverse), that part cannot be told from the rest.
    v_su = within_listeners if within_listeners is not None else 0.0
    v_wu = within_utterances if within_utterances is not None else 0.0
    v_swu = float(np.var(ratings_WS[rated], ddof=1))
    v_s, v_w = max(v_swu - v_wu, 0.0), max(v_swu - v_su, 0.0)
    v_u = max(v_su + v_wu - v_swu, 0.0)
    per_utterance, per_listener = rated.sum(0), rated.sum(1)
    variance = (v_s * (per_utterance**2).sum() + v_w * (per_listener**2).sum()) / total**2 + v_u / total
    return float(stats.t.ppf(0.975, min(ratings_WS.shape) - 1) * math.sqrt(variance))


def opinion_scores(ratings: Iterable[Rating], systems: Sequence[str]) -> list[OpinionScore]:
    """Every system's score, in the order of ``systems``; differences are to the first one."""
    matrices = _matrices(list(ratings), systems)
    scores = []
    for system in systems:
        ratings_WS = matrices[system]
        if np.isnan(ratings_WS).all():
            continue
        rated = ~np.isnan(ratings_WS)
        difference_WS = ratings_WS - matrices[systems[0]]
        paired = system != systems[0] and not np.isnan(difference_WS).all()
        scores.append(
            OpinionScore(
                system=system,
                mean=float(np.nanmean(ratings_WS)),
                half_width=half_width(ratings_WS),
                listeners=int(rated.any(1).sum()),
                utterances=int(rated.any(0).sum()),
                ratings=int(rated.sum()),
                difference=float(np.nanmean(difference_WS)) if paired else None,
                difference_half_width=half_width(difference_WS) if paired else None,
            )
        )
    return scores


def read_key(folder: Path) -> dict[str, Any]:
    """The key of the test in ``folder``: which clip is which system and utterance."""
    return read_manifest(folder / KEY, "listening_test", SCHEMA_VERSION)


def write_scores(folder: Path, test_id: str, scores: Sequence[OpinionScore]) -> None:
    """Write ``mean_opinion_scores.json``, which says how its intervals were computed."""
    made_by = {
        "test_id": test_id,
        "formula": "CrowdMOS two-way variance (Ribeiro et al., ICASSP 2011), 95 %, t quantile",
    }
    rows = [asdict(score) for score in scores]
    write_manifest(folder / SCORES, "mean_opinion_scores", SCHEMA_VERSION, made_by, scores=rows)


def read_scores(folder: Path) -> list[OpinionScore]:
    """The scores of the test in ``folder``, as :func:`write_scores` left them."""
    path = folder / SCORES
    content = read_manifest(path, "mean_opinion_scores", SCHEMA_VERSION)
    try:
        return [OpinionScore(**row) for row in content["scores"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def read_ratings(files: Sequence[Path], key: Mapping[str, Any]) -> list[Rating]:
    """Ratings from the page's ``.json`` files and webMUSHRA's ``lss.csv``.

    Raises:
        InputError: a file of another test, an unknown clip, a score outside 1 to 5, or a listener who comes twice.
    """
    ratings: list[Rating] = []
    heard_in: dict[str, Path] = {}
    for path in files:
        rows = _rows_of_webmushra(path, key) if path.suffix == ".csv" else _rows_of_page(path, key)
        for listener in dict.fromkeys(row[0] for row in rows):
            if listener in heard_in:
                raise InputError(f"{path}: listener {listener} is already in {heard_in[listener]}")
            heard_in[listener] = path
        seen = set()
        for listener, clip, score in rows:
            if clip not in key["clips"]:
                raise InputError(f"{path}: the test has no clip {clip!r}")
            if (listener, clip) in seen:
                raise InputError(f"{path}: listener {listener} rated clip {clip} twice")
            seen.add((listener, clip))
            if not 1 <= score <= 5:
                raise InputError(f"{path}: a score is from 1 to 5, not {score:g}")
            found = key["clips"][clip]
            ratings.append(Rating(listener, found["system"], found["utterance_id"], score))
    return ratings


def _rows_of_page(path: Path, key: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != "listening_test_responses":
        raise InputError(f"{path} holds no responses of a listening test")
    if content.get("test_id") != key["test_id"]:
        raise InputError(f"{path} is from another test ({content.get('test_id')}, not {key['test_id']})")
    try:
        return [(str(content["listener"]), str(r["clip"]), float(r["score"])) for r in content["ratings"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from None


def _rows_of_webmushra(path: Path, key: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    try:
        tests = {row["session_test_id"] for row in rows}
        if tests - {key["test_id"]}:
            raise InputError(f"{path} is from another test ({', '.join(sorted(tests))}, not {key['test_id']})")
        return [(row["listener"], row["stimuli"], float(row["stimuli_rating"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no lss.csv of webMUSHRA for this test: {error!r}") from None


def _matrices(ratings: Sequence[Rating], systems: Sequence[str]) -> dict[str, np.ndarray]:
    """Listeners x utterances of every system, NaN where nothing was rated."""
    listeners = {name: i for i, name in enumerate(sorted({rating.listener for rating in ratings}))}
    utterances = {name: i for i, name in enumerate(sorted({rating.utterance_id for rating in ratings}))}
    matrices = {system: np.full((len(listeners), len(utterances)), np.nan) for system in systems}
    for rating in ratings:
        matrices[rating.system][listeners[rating.listener], utterances[rating.utterance_id]] = rating.score
    return matrices


def _mean_variance(ratings: np.ndarray) -> float | None:
    """Mean over rows of the variance inside a row; rows with one rating have none."""
    several = (~np.isnan(ratings)).sum(1) > 1
    return float(np.mean(np.nanvar(ratings[several], axis=1, ddof=1))) if several.any() else None
