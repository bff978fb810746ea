"""Word and character error rates of recognized speech, with intervals from resampling utterances."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.speech.error_rate import ErrorRate
from mamtra_ray.speech.language import is_without_blanks, split_characters
from mamtra_ray.speech.normalization import PUBLISHED

# fmt: off
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
# fmt: on
_TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def _spell_digits(match: re.Match[str]) -> str:
    digits = match.group()
    if len(digits) > 2 or (len(digits) == 2 and digits[0] == "0"):
        return " ".join(_UNITS[int(digit)] for digit in digits)
    number = int(digits)
    if number < 20:
        return _UNITS[number]
    tens, units = divmod(number, 10)
    return _TENS[tens] + (f" {_UNITS[units]}" if units else "")


def normalize_demo(text: str) -> str:
    """Lower-case words without punctuation, digits spelled out.

    Whisper writes spoken numbers as digits; up to 99 they are read as a number, longer strings
    digit by digit ("20" -> "twenty", "914" -> "nine one four"), "#7" as "number seven".
    """
    text = text.lower().replace("#", " number ")
    text = re.sub(r"\bno\.\s*(?=\d)", "number ", text)
    text = re.sub(r"\d+", lambda match: f" {_spell_digits(match)} ", text)
    text = re.sub(r"[^a-z' ]", " ", text)
    return " ".join(text.split())


NORMALIZATIONS: dict[str, Callable[[str], str]] = {"demo": normalize_demo, **PUBLISHED}
"""Text normalization by name; applied to reference and hypothesis alike."""


@dataclass(frozen=True)
class WerResult:
    """Errors of recognized speech. Rates are fractions, not percent.

    `errors` and `words` are int64 arrays with one entry per utterance, so that intervals and paired
    comparisons can be made later without recognizing again.
    """

    wer: float
    """Sum of errors over sum of reference words (corpus WER)."""
    mean_utterance_wer: float
    """Unweighted mean of the utterances' WERs, as seed-tts-eval reports it."""
    cer: float
    """Character errors over reference characters, blanks included."""
    errors: np.ndarray
    words: np.ndarray
    character_errors: np.ndarray
    characters: np.ndarray
    hypotheses: tuple[str, ...]
    """Normalized hypotheses."""


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str], normalize: str = "demo") -> WerResult:
    """Word and character error rates through jiwer's alignment.

    Of a reference in a script without blanks between words, such as Chinese, every character counts as a word, and
    blanks do not count as characters.

    Args:
        references: what was to be said.
        hypotheses: what was recognized, in the same order.
        normalize: a name in `NORMALIZATIONS`.

    Raises:
        InputError: unequal counts, no utterance, an unknown normalization, or a reference without words.
    """
    import jiwer

    if normalize not in NORMALIZATIONS:
        raise InputError(f"unknown text normalization {normalize!r}: {nearest_name(normalize, NORMALIZATIONS)}")
    if len(references) != len(hypotheses) or not references:
        raise InputError(
            f"WER needs as many hypotheses as references and at least one; "
            f"got {len(references)} references and {len(hypotheses)} hypotheses."
        )
    apply = NORMALIZATIONS[normalize]
    normal_references = [apply(reference) for reference in references]
    normal_hypotheses = [apply(hypothesis) for hypothesis in hypotheses]
    counts = []
    for reference, hypothesis, original in zip(normal_references, normal_hypotheses, references, strict=True):
        if not reference.split():
            raise InputError(f"The reference {original!r} has no words after the {normalize!r} normalization.")
        pair = (reference, hypothesis)
        if is_without_blanks(reference):
            pair = (split_characters(reference), split_characters(hypothesis))
            reference, hypothesis = ("".join(text.split()) for text in pair)
        words = jiwer.process_words(*pair)
        characters = jiwer.process_characters(reference, hypothesis)
        counts.append(
            (
                words.substitutions + words.deletions + words.insertions,
                words.hits + words.substitutions + words.deletions,
                characters.substitutions + characters.deletions + characters.insertions,
                characters.hits + characters.substitutions + characters.deletions,
            )
        )
    errors, num_words, character_errors, num_characters = np.array(counts, np.int64).T
    return WerResult(
        wer=float(errors.sum() / num_words.sum()),
        mean_utterance_wer=float((errors / num_words).mean()),
        cer=float(character_errors.sum() / num_characters.sum()),
        errors=errors,
        words=num_words,
        character_errors=character_errors,
        characters=num_characters,
        hypotheses=tuple(normal_hypotheses),
    )


def bootstrap_interval(
    errors: Sequence[int] | np.ndarray,
    words: Sequence[int] | np.ndarray,
    seed: int = 0,
    level: float = 0.95,
    num_draws: int = 2000,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the corpus WER, resampling utterances.

    Args:
        errors, words: one entry per utterance, as in `WerResult`.
        seed: seed of the resampling.
        level: probability the interval should cover.
        num_draws: bootstrap samples.

    Returns:
        (low, high) as fractions.
    """
    low, high, _ = _bootstrap(_rate, (errors, words), seed, level, num_draws)
    return low, high


@dataclass(frozen=True)
class PairedDifference:
    """Corpus WER of a minus that of b on the same utterances."""

    difference: ErrorRate
    probability_a_not_worse: float
    """Share of the bootstrap samples in which a's WER is at most b's."""


def paired_difference(
    a: WerResult, b: WerResult, seed: int = 0, level: float = 0.95, num_draws: int = 2000
) -> PairedDifference:
    """Compare two systems on the same utterances; resampling both together removes sentence difficulty.

    Raises:
        InputError: the two results are not of the same references.
    """
    if not np.array_equal(a.words, b.words):
        raise InputError("A paired comparison needs both results on the same utterances in the same order.")
    low, high, differences = _bootstrap(_rate_difference, (a.errors, b.errors, a.words), seed, level, num_draws)
    difference = ErrorRate(a.wer - b.wer, low, high)
    return PairedDifference(difference, float((differences <= 0).mean()))


def _rate(errors: np.ndarray, words: np.ndarray, axis: int) -> np.ndarray:
    return errors.sum(axis) / words.sum(axis)


def _rate_difference(errors_a: np.ndarray, errors_b: np.ndarray, words: np.ndarray, axis: int) -> np.ndarray:
    return _rate(errors_a, words, axis) - _rate(errors_b, words, axis)


def _bootstrap(
    statistic: Callable[..., np.ndarray],
    counts: Sequence[Sequence[int] | np.ndarray],
    seed: int,
    level: float,
    num_draws: int,
) -> tuple[float, float, np.ndarray]:
    """Percentile interval of a statistic of utterances that are resampled together, and its value in every draw."""
    from scipy import stats

    data = [np.asarray(count, np.float64) for count in counts]
    if len(data[0]) == 1:  # of one utterance there is nothing to resample
        value = statistic(*data, axis=-1)
        return float(value), float(value), np.full(num_draws, value)
    result = stats.bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=True,
        confidence_level=level,
        n_resamples=num_draws,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high), result.bootstrap_distribution
